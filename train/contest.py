"""Policies beside one another: the same frozen base, sites and splits, each certified, each timed on one device."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

import gati_jax
from gati_jax import Candidate, Certificate, CostTable, Plan, ReplayTable
from gati_jax.caches import on_its_own
from gati_jax.fitting import Candidates
from gati_jax.models import Chain
from gati_jax.planning import POLICIES, Score, max_probability, policy_table, replay_plan, shared_threshold_plan
from gati_jax.runtime import Cascade, Tile, predict_one, replay_logits, time_turns, tuned_chain

RESAMPLES = 2000
CALLS = 4


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
            for some in {tuple(sites), tuple(site for site in sites if site in ours)}:
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


def certified_step(contestant: Contestant, epsilon: float, delta: float, looks: int) -> Certificate:
    """Certify a policy's plan on the certify split, each as if it were the only one of this look."""
    return gati_jax.certify(contestant.plan, contestant.tables["certify"], epsilon, delta, looks=looks)


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


def exit_times(
    chain: Chain, candidates: Candidates, plans: Mapping[str, Plan], tile: Tile, image: np.ndarray, *, rounds: int
) -> dict[str, Float[np.ndarray, " exits"]]:
    """Time the way to every exit of every plan, lookups on the way included, all plans taking turns.

    Args:
        chain: The base.
        candidates: Among which are the plans'. A cascaded head is timed without its ensemble, which flatters it.
        plans: By name.
        tile: The tuning that all of them run by, at batch 1.
        image: A request.
        rounds: How often each is timed; medians are taken.

    Returns:
        Milliseconds of a request that leaves at each cache, and last, at the base.
    """
    base = tuned_chain(chain, tile)  # one for all: the weights of a copy for each would push one another out of memory
    programs = {}
    for name, plan in plans.items():
        caches = tuple(on_its_own(c) for c in candidates.take(plan.names))
        for exit_ in range(len(caches) + 1):
            # An infinite threshold is never reached, minus infinity always: the request leaves where it is told to.
            thresholds = [-np.inf if i == exit_ else np.inf for i in range(len(caches))]
            cascade = Cascade(base, caches, jnp.asarray(thresholds, jnp.float32))
            programs[name, exit_] = functools.partial(predict_one, cascade, image, tile.options)
    # A few calls in a row: the first finds its weights cold, as no server would leave them.
    turns = time_turns({f"{name} {exit_}": [run] * CALLS for (name, exit_), run in programs.items()}, rounds)
    median = {key: float(np.median(ms[:, 1:])) for key, ms in turns.items()}
    return {name: np.array([median[f"{name} {i}"] for i in range(len(plan.names) + 1)]) for name, plan in plans.items()}


def paired(ours: Float[np.ndarray, " n"], theirs: Float[np.ndarray, " n"]) -> dict[str, Any]:
    """Return how much longer the other takes, with a 95 % bootstrap interval over requests; pairs stay together."""
    difference = theirs - ours
    rows = np.random.default_rng(0).integers(0, len(difference), (RESAMPLES, len(difference)))
    low, high = np.quantile(difference[rows].mean(1), (0.025, 0.975))
    return {
        "mean_ms": float(difference.mean()),
        "low_ms": float(low),
        "high_ms": float(high),
        "ties": bool(low <= 0 <= high),
    }
