"""Other people's rules for leaving early, on the same predictors: what composed plans are compared with.

A policy turns the logits of one kind of head at every site into the table that any plan is judged on: a class and a
score for each request at each site. All of them leave at the first site whose score reaches one threshold that all
sites share, as their papers do; ``shared_threshold_plan`` lays the path of that threshold.

Two policies need nothing of their own here. Zero Time Waste (arXiv:2106.05409) is ``max_probability`` on cascaded
heads, whose logits are the geometric ensemble already. The paper's selector is what ``replay`` scored.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp

import gati_jax
from gati_jax import Candidate, Certificate, CostTable, InputError, Plan, ReplayTable
from gati_jax.fitting import Candidates, replay_logits
from gati_jax.models import Chain
from gati_jax.planning import cascade_ms, replay_plan

Logits = Float[np.ndarray, "sites n classes"]
Score = Callable[[Logits], Float[np.ndarray, "sites n"]]
STEPS = 400  # of a path: each moves a quarter of a percent of the scores


def max_probability(logits: Logits) -> Float[np.ndarray, "sites n"]:
    """Return the log-odds of the largest probability (Shallow-Deep Networks, arXiv:1810.07052).

    Of the order of the probability itself, but it does not saturate in float32.
    """
    ordered = np.sort(logits.astype(np.float64), axis=-1)
    return ordered[..., -1] - logsumexp(ordered[..., :-1], axis=-1)


def negative_entropy(logits: Logits) -> Float[np.ndarray, "sites n"]:
    """Return the entropy's negative (BranchyNet, arXiv:1709.01686)."""
    log_p = logits.astype(np.float64) - logsumexp(logits.astype(np.float64), axis=-1, keepdims=True)
    return (np.exp(log_p) * log_p).sum(-1)


def patience(logits: Logits) -> Float[np.ndarray, "sites n"]:
    """Return how many sites in a row, before this one, said what this one says (PABEE, arXiv:2006.04152)."""
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


def policy_table(table: ReplayTable, logits: Logits, score: Score) -> ReplayTable:
    """Return the table that a policy would leave by.

    Args:
        table: Of one candidate at each site, in order.
        logits: Theirs.
        score: The policy's.
    """
    classes: Int[np.ndarray, "sites n"] = logits.argmax(-1)
    return dataclasses.replace(table, classes=classes, scores=score(logits))


def shared_threshold_plan(table: ReplayTable, costs: CostTable, *, epsilon: float) -> Plan:
    """Lay the path of a threshold that all sites share, from never leaving to where more than epsilon disagree.

    Args:
        table: Replay of the select split, one candidate at each site, in order.
        costs: Measured times.
        epsilon: The disagreement at which the path ends.
    """
    ranked = np.unique(table.scores[table.scores > -np.inf])[::-1]
    levels = ranked[np.unique(np.linspace(0, len(ranked) - 1, min(len(ranked), STEPS)).astype(int))]
    m = len(table.names)
    path, disagreement = [np.full(m, np.inf, np.float32)], [0.0]
    for level in levels:
        thresholds = np.full(m, level, np.float32)
        disagrees = replay_plan(table, thresholds).disagreement
        if disagrees > epsilon:
            break
        path.append(thresholds)
        disagreement.append(disagrees)
    return Plan(
        names=table.names,
        sites=table.sites,
        depth=table.depth,
        path=np.stack(path),
        n=len(table),
        rows=table.rows,
        source=table.source,
        disagreement=np.array(disagreement),
        mean_ms=np.array([cascade_ms(table, thresholds, costs) for thresholds in path]),
    )


def oracle_exits(table: ReplayTable) -> Int[np.ndarray, " n"]:
    """Return the earliest site where any candidate says what the base says; N where none does."""
    sites = np.asarray(table.sites)[:, None]
    return np.where(table.agrees, sites, table.depth).min(axis=0, initial=table.depth)


def zero_error_thresholds(table: ReplayTable) -> Float[np.ndarray, " candidates"]:
    """Return for each candidate the next float32 above its largest score of a wrong answer.

    "Hit iff the confidence is greater" is thereby the house's "at or above". A candidate that was never wrong is
    always believed: its threshold is the lowest number there is.

    Args:
        table: Of the requests on which nothing may go wrong.

    Raises:
        InputError: The table is empty.
    """
    if len(table) == 0:
        raise InputError("table: expected at least one request, got none")
    lowest = np.finfo(np.float32).min
    wrong = np.where(table.agrees, -np.inf, table.scores).max(1, initial=-np.inf).astype(np.float32)
    return np.maximum(np.nextafter(wrong, np.float32(np.inf)), lowest)


def freeze_plan(table: ReplayTable, costs: CostTable) -> Plan:
    """Return the plan of one step that opens every candidate at its zero-error threshold.

    Args:
        table: Replay of the rows that set the thresholds, one candidate at a site.
        costs: Measured times of the same base and candidates.

    Raises:
        InputError: The table is empty, or two candidates share a site.
    """
    if len(set(table.sites)) < len(table.sites):
        raise InputError(f"table: expected one candidate at a site, got {table.names} at {table.sites}")
    table = table.take([table.names[i] for i in np.argsort(table.sites)])
    path = np.stack([np.full(len(table.names), np.inf, np.float32), zero_error_thresholds(table)])
    return Plan(
        names=table.names,
        sites=table.sites,
        depth=table.depth,
        path=path,
        disagreement=np.array([replay_plan(table, thresholds).disagreement for thresholds in path]),
        mean_ms=np.array([cascade_ms(table, thresholds, costs) for thresholds in path]),
        n=len(table),
        rows=table.rows,
        source=table.source,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """A policy with a plan of its own: its tables are what it would leave by on each split."""

    name: str
    heads: str
    """Whose predictors it uses."""
    plan: Plan
    tables: Mapping[str, ReplayTable]


def logits_of(
    chain: Chain, candidates: Candidates, images: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Float[np.ndarray, "n classes"]]]:
    """Return what every predictor says, by split and name; candidates that differ in their selector count once."""
    distinct = candidates.take([c.name for c in candidates if "+" not in c.name])
    names = [c.name for c in distinct]
    return {
        split: dict(zip(names, replay_logits(chain, distinct, rows), strict=True)) for split, rows in images.items()
    }


def contestants(
    candidates: Candidates,
    tables: Mapping[str, ReplayTable],
    logits: Mapping[str, Mapping[str, Float[np.ndarray, "n classes"]]],
    costs: CostTable,
    *,
    ours: Sequence[int],
    epsilon: float,
) -> list[Contestant]:
    """Return every policy with the heads and sites that serve it best on the select split.

    Args:
        candidates: All that were explored.
        tables: Replays by split: "select", "certify", "test".
        logits: See ``logits_of``.
        costs: Measured times.
        ours: The sites of the default plan; policies may use these, or all.
        epsilon: The disagreement to be certified.
    """

    def judged_by(score: Score | None, own: list[str]) -> dict[str, ReplayTable]:
        """Return the tables of heads by a policy's score, or, for None, by their own selectors'."""
        taken = {split: table.take(own) for split, table in tables.items()}
        if score is None:
            return taken
        return {
            split: policy_table(table, np.stack([logits[split][name] for name in own]), score)
            for split, table in taken.items()
        }

    found = []
    for policy, heads, score in _rules(candidates):
        tried = []
        for head in heads:
            sites = sorted(c.site for c in candidates if _head(c) == head)
            for some in {tuple(sites), tuple(site for site in sites if site in ours)} - {()}:
                judged = judged_by(score, [f"{head}@{site}" for site in some])
                plan = shared_threshold_plan(judged["select"], costs, epsilon=epsilon)
                tried.append(Contestant(name=policy, heads=head, plan=plan, tables=judged))
        if tried:
            found.append(min(tried, key=lambda c: c.plan.mean_ms[-1]))
    return found


def _head(candidate: Candidate) -> str:
    return candidate.name.partition("@")[0]


def _rules(candidates: Candidates) -> list[tuple[str, list[str], Score | None]]:
    """Return every policy with the heads that it may use, and how it scores them."""
    heads = sorted({_head(c) for c in candidates})
    cascaded = sorted({_head(c) for c in candidates if c.previous})
    single = [head for head in heads if "+" not in head and head not in cascaded]
    return [
        *((name, single, score) for name, score in POLICIES.items()),
        ("ZTW ensemble", cascaded, max_probability),
        ("the paper's selector", [head for head in heads if head.endswith("+linear")], None),
    ]


def certified_step(
    contestant: Contestant, epsilon: float, delta: float, *, looks: int, base_saw_data: bool, duplicates: bool
) -> Certificate:
    """Certify a policy's plan on the certify split, as if it were the only one of this look.

    That is what a user of this policy alone would do. Of all the certificates of a contest, one counts: the default
    plan's, which was fixed before.
    """
    table = contestant.tables["certify"]
    return gati_jax.certify(
        contestant.plan, table, epsilon, delta, looks=looks, base_saw_data=base_saw_data, duplicates=duplicates
    )


def step_at_accuracy(contestant: Contestant, share: float) -> int:
    """Return the farthest step at which the certify split keeps this share of the base's accuracy.

    By one standard error: of the many steps, the farthest that seems to keep it is one that was lucky. On select, where
    the plan was composed to look well, it would be too far anyway.
    """
    table = contestant.tables["certify"]
    assert table.labels is not None  # noqa: S101 (the caller has checked)
    needed = share * (table.answers == table.labels)
    kept = []
    for thresholds in contestant.plan.path:
        spare = (replay_plan(table, thresholds).classes == table.labels) - needed
        kept.append(spare.mean() >= spare.std() / np.sqrt(len(spare)))
    return int(np.flatnonzero(kept)[-1])


def farthest_on_test(contestant: Contestant, share: float) -> int:
    """Return the step that keeps the accuracy on the test split itself: published gains are read off such curves."""
    table = contestant.tables["test"]
    least = share * accuracy(table.answers, table)
    kept = [accuracy(replay_plan(table, t).classes, table) >= least for t in contestant.plan.path]
    return int(np.flatnonzero(kept)[-1])


def accuracy(classes: np.ndarray, table: ReplayTable) -> float:
    """Return the share of right classes."""
    return float((classes == table.labels).mean())
