"""Early-exit rules from other papers on the same predictors, which composed plans are compared with.

A policy turns the logits of one kind of head at every site into a replay table: a class and a score for each request
at each site. Requests leave at the first site whose score reaches a threshold that all sites share, as in the papers;
``shared_threshold_plan`` lowers it step by step.

Two policies need no score of their own. Zero Time Waste (arXiv:2106.05409) is ``max_probability`` on cascaded heads,
whose logits are the geometric ensemble already. The paper's selector is what ``replay`` scored.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.special import log_softmax, logsumexp

from gati_jax import Candidate, CostTable, InputError, Plan, ReplayTable
from gati_jax.fitting import Candidates, replay_logits
from gati_jax.models import Chain
from gati_jax.planning import cascade_ms, replay_plan

Logits = Float[np.ndarray, "sites n classes"]
Score = Callable[[Logits], Float[np.ndarray, "sites n"]]
STEPS = 400  # of a path: each moves a quarter of a percent of the scores


def max_probability(logits: Logits) -> Float[np.ndarray, "sites n"]:
    """Return the log-odds of the largest probability (Shallow-Deep Networks, arXiv:1810.07052).

    They order requests as the probability does, but do not saturate in float32.
    """
    ordered = np.sort(logits.astype(np.float64), axis=-1)
    return ordered[..., -1] - logsumexp(ordered[..., :-1], axis=-1)


def negative_entropy(logits: Logits) -> Float[np.ndarray, "sites n"]:
    """Return the negative entropy of the probabilities (BranchyNet, arXiv:1709.01686)."""
    log_p = log_softmax(logits.astype(np.float64), axis=-1)
    return (np.exp(log_p) * log_p).sum(-1)


def patience(logits: Logits) -> Float[np.ndarray, "sites n"]:
    """Return how many sites in a row, just before this one, gave this one's class (PABEE, arXiv:2006.04152)."""
    classes = logits.argmax(-1)
    count = np.zeros(classes.shape)
    for site in range(1, len(classes)):
        count[site] = np.where(classes[site] == classes[site - 1], count[site - 1] + 1, 0)
    return count


POLICIES: dict[str, Score] = {
    "max probability (SDN)": max_probability,
    "entropy (BranchyNet)": negative_entropy,
    "patience (PABEE)": patience,
}


# --- Thresholds -----------------------------------------------------------------------------------------------------


def policy_table(table: ReplayTable, logits: Logits, score: Score) -> ReplayTable:
    """Return the classes and scores by which a policy lets requests leave.

    Args:
        table: Replay of one candidate at each site, in order.
        logits: Those candidates' logits.
        score: The policy's.
    """
    classes: Int[np.ndarray, "sites n"] = logits.argmax(-1)
    return dataclasses.replace(table, classes=classes, scores=score(logits))


def shared_threshold_plan(table: ReplayTable, costs: CostTable, *, epsilon: float) -> Plan:
    """Lower one threshold for all sites, from "no request leaves" to where more than epsilon of them disagree.

    Args:
        table: Replay of the select split, one candidate at each site, in order.
        costs: Measured times, in milliseconds.
        epsilon: The disagreement at which the path ends.
    """
    ranked = np.unique(table.scores[table.scores > -np.inf])[::-1]
    levels = ranked[np.unique(np.linspace(0, len(ranked) - 1, min(len(ranked), STEPS)).astype(int))]
    m = len(table.names)
    path = [np.full(m, np.inf, np.float32)]
    for level in levels:
        thresholds = np.full(m, level, np.float32)
        if replay_plan(table, thresholds).disagreement > epsilon:
            break
        path.append(thresholds)
    return Plan(
        names=table.names,
        sites=table.sites,
        depth=table.depth,
        path=np.stack(path),
        n=len(table),
        rows=table.rows,
        source=table.source,
        disagreement=np.array([replay_plan(table, thresholds).disagreement for thresholds in path]),
        mean_ms=np.array([cascade_ms(table, thresholds, costs) for thresholds in path]),
    )


def zero_error_thresholds(table: ReplayTable) -> Float[np.ndarray, " candidates"]:
    """Return Freeze Inference's thresholds: for each candidate, the next float32 above its largest wrong score.

    The paper's "hit if the confidence is greater" thereby becomes "at or above", as everywhere here. A candidate
    without a wrong answer always hits: its threshold is the lowest finite float32.

    Raises:
        InputError: The table is empty.
    """
    if len(table) == 0:
        raise InputError("table: expected at least one request, got none")
    lowest = np.finfo(np.float32).min
    wrong = np.where(table.agrees, -np.inf, table.scores).max(1, initial=-np.inf).astype(np.float32)
    return np.maximum(np.nextafter(wrong, np.float32(np.inf)), lowest)


def oracle_exits(table: ReplayTable) -> Int[np.ndarray, " n"]:
    """Return the earliest site where any candidate agrees with the base; the table's depth where none does."""
    sites = np.asarray(table.sites)[:, None]
    return np.where(table.agrees, sites, table.depth).min(axis=0, initial=table.depth)


# --- Policies with their plans --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedPolicy:
    """A policy, its plan, and its replay tables by split."""

    name: str
    heads: str  # the predictors that it uses
    plan: Plan
    tables: Mapping[str, ReplayTable]


def logits_of(
    chain: Chain, candidates: Candidates, images: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Float[np.ndarray, "n classes"]]]:
    """Return every predictor's logits, by split and name; candidates that differ in their selector count once."""
    distinct = candidates.take([c.name for c in candidates if "+" not in c.name])
    names = [c.name for c in distinct]
    return {
        split: dict(zip(names, replay_logits(chain, distinct, rows), strict=True)) for split, rows in images.items()
    }


def plan_policies(
    candidates: Candidates,
    tables: Mapping[str, ReplayTable],
    logits: Mapping[str, Mapping[str, Float[np.ndarray, "n classes"]]],
    costs: CostTable,
    *,
    default_sites: Sequence[int],
    epsilon: float,
) -> list[PlannedPolicy]:
    """Plan every policy with the heads and sites that are fastest for it on the select split.

    It is tried with all sites, and with those of the default plan. Replays and logits are by split.
    """
    heads = sorted({_head(c) for c in candidates})
    cascaded = sorted({_head(c) for c in candidates if c.previous})
    single = [head for head in heads if "+" not in head and head not in cascaded]
    policies: list[tuple[str, list[str], Score | None]] = [
        *((name, single, score) for name, score in POLICIES.items()),
        ("ZTW ensemble", cascaded, max_probability),
        ("the paper's selector", [head for head in heads if head.endswith("+linear")], None),
    ]
    planned = []
    for policy, usable, score in policies:
        tried = []
        for head in usable:
            sites = tuple(sorted(c.site for c in candidates if _head(c) == head))
            for chosen in {sites, tuple(site for site in sites if site in default_sites)} - {()}:
                names = [f"{head}@{site}" for site in chosen]
                own = {split: table.take(names) for split, table in tables.items()}
                if score is not None:
                    own = {
                        split: policy_table(table, np.stack([logits[split][name] for name in names]), score)
                        for split, table in own.items()
                    }
                plan = shared_threshold_plan(own["select"], costs, epsilon=epsilon)
                tried.append(PlannedPolicy(name=policy, heads=head, plan=plan, tables=own))
        if tried:
            planned.append(min(tried, key=lambda one: one.plan.mean_ms[-1]))
    return planned


def _head(candidate: Candidate) -> str:
    return candidate.name.partition("@")[0]


# --- Steps ----------------------------------------------------------------------------------------------------------


def step_at_accuracy(policy: PlannedPolicy, share: float) -> int:
    """Return the last step that keeps this share of the base's accuracy on the certify split, by one standard error.

    The margin guards against the most favourable of many steps. The select split would be too optimistic in any case,
    because the plan was composed on it.
    """
    table = policy.tables["certify"]
    assert table.labels is not None  # noqa: S101 (the caller has checked)
    needed = share * (table.answers == table.labels)
    kept = []
    for thresholds in policy.plan.path:
        surplus = (replay_plan(table, thresholds).classes == table.labels) - needed
        kept.append(surplus.mean() >= surplus.std() / np.sqrt(len(surplus)))
    return int(np.flatnonzero(kept)[-1])


def last_step_on_test(policy: PlannedPolicy, share: float) -> int:
    """Return the last step that keeps the accuracy on the test split itself, as published gains are read off."""
    table = policy.tables["test"]
    least = share * accuracy(table.answers, table)
    kept = [accuracy(replay_plan(table, thresholds).classes, table) >= least for thresholds in policy.plan.path]
    return int(np.flatnonzero(kept)[-1])


def accuracy(classes: np.ndarray, table: ReplayTable) -> float:
    """Return the share of classes that equal the table's labels."""
    return float((classes == table.labels).mean())
