"""Policies beside one another: the same frozen base, sites and splits, each certified, each timed on one device."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

import gati_jax
from gati_jax import Candidate, Certificate, CostTable, Plan, ReplayTable
from gati_jax.fitting import Candidates
from gati_jax.models import Chain
from gati_jax.planning import POLICIES, Score, max_probability, policy_table, replay_plan, shared_threshold_plan
from gati_jax.runtime import replay_logits


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
    contestant: Contestant, epsilon: float, delta: float, *, looks: int, base_saw_data: bool, repeats: bool
) -> Certificate:
    """Certify a policy's plan on the certify split, as if it were the only one of this look.

    That is what a user of this policy alone would do. Of all the certificates of a contest, one counts: the default
    plan's, which was fixed before.
    """
    table = contestant.tables["certify"]
    return gati_jax.certify(
        contestant.plan, table, epsilon, delta, looks=looks, base_saw_data=base_saw_data, repeats=repeats
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
