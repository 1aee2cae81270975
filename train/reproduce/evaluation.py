"""Policies at the steps chosen for them: latency, agreement, accuracy and exits, each timed on the same device."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.stats import bootstrap

from gati_jax import Chain, Plan
from gati_jax.caches import on_its_own
from gati_jax.fitting import Candidates
from gati_jax.planning import replay_plan
from gati_jax.profiling import Tile, measure_batches, run_by, time_turns, tuned_chain
from gati_jax.runtime import Cascade, predict_one

from ..exploration import Explored
from .policies import PlannedPolicy, accuracy
from .results import Difference, Exits, Latency, PolicyResult

BASE = "the base"
RESAMPLES, AT_A_TIME = 2000, 100  # of the bootstrap; in memory at once
CALLS = 4
TIMED, TURNS = 500, 5  # requests, from all over the test split, and how often each


class OpenCaches(NamedTuple):
    """The caches that are on at one step of a plan; a bundle runs no others."""

    names: tuple[str, ...]
    thresholds: Float[np.ndarray, " caches"]

    @classmethod
    def of(cls, plan: Plan, step: int) -> "OpenCaches":
        """Select the caches with a finite threshold."""
        thresholds = plan.thresholds(step)
        on = np.isfinite(thresholds)
        return cls(tuple(np.array(plan.names, object)[on]), thresholds[on])


def exit_times(
    chain: Chain, candidates: Candidates, ways: Mapping[str, Sequence[str]], tile: Tile, image: np.ndarray, rounds: int
) -> dict[str, Float[np.ndarray, " exits"]]:
    """Time every cascade up to each of its exits, lookups on the way included; all of them take turns.

    Args:
        chain: The base.
        candidates: All that were explored; a cascaded one is timed without its ensemble, a few products.
        ways: By name, the caches of a cascade; none for the base alone.
        tile: Algorithms and compiler options, the same for all.
        image: One request.
        rounds: How often each is timed.

    Returns:
        By name, the milliseconds of a request that leaves at each cache and, last, at the base.
    """
    base = tuned_chain(chain, tile)  # shared: the weights of a copy for each would evict one another from the caches
    programs = {}
    for name, names in ways.items():
        caches = tuple(on_its_own(c) for c in candidates.take(names))
        for exit_ in range(len(caches) + 1):
            # No score reaches infinity and all reach minus infinity: every request leaves at ``exit_``.
            thresholds = [-np.inf if i == exit_ else np.inf for i in range(len(caches))]
            cascade = Cascade(base, caches, jnp.asarray(thresholds, jnp.float32))
            programs[name, exit_] = functools.partial(predict_one, cascade, image, tile.options)
    # A few calls in a row: the first finds its weights cold, as they would not be on a server.
    turns = time_turns({f"{name} {exit_}": [run] * CALLS for (name, exit_), run in programs.items()}, rounds)
    median = {key: float(np.median(ms[:, 1:])) for key, ms in turns.items()}
    return {name: np.array([median[f"{name} {i}"] for i in range(len(names) + 1)]) for name, names in ways.items()}


def paired_difference(first: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> Difference:
    """Return how much longer the other takes, with a 95 % bootstrap interval; requests are resampled as pairs."""
    difference = other - first
    rng = np.random.default_rng(0)
    options = {"n_resamples": RESAMPLES, "batch": AT_A_TIME, "confidence_level": 0.95, "method": "percentile"}
    interval = bootstrap((difference,), np.mean, rng=rng, **options).confidence_interval
    return Difference(mean_ms=float(difference.mean()), low_ms=float(interval.low), high_ms=float(interval.high))


def evaluate(
    policies: Sequence[tuple[PlannedPolicy, OpenCaches]],
    ms: Mapping[str, Float[np.ndarray, " exits"]],
    group: str,
    found: Explored,
) -> tuple[PolicyResult, ...]:
    """Evaluate each policy on the test split, with the caches that are on at its step, beside the first.

    Times are those of ``exit_times``, under names that begin with the group's, the operating point.
    """
    rows, first = [], None
    for policy, on in policies:
        table = policy.tables["test"].take(on.names)
        outcome = replay_plan(table, on.thresholds)
        latency = ms[f"{group} {policy.name}"][outcome.exits]
        first = latency if first is None else first
        rows.append(
            PolicyResult(
                policy=policy.name,
                heads=policy.heads,
                caches=on.names,
                thresholds=tuple(on.thresholds.tolist()),
                mean_ms=float(latency.mean()),
                full_ms=float(ms[BASE][0]),
                disagreement=outcome.disagreement,
                accuracy=accuracy(outcome.classes, table),
                slower_by=paired_difference(first, latency),
                **dict(count_exits(np.array([*table.sites, table.depth])[outcome.exits], found)),
            )
        )
    return tuple(rows)


def count_exits(sites: np.ndarray, found: Explored) -> Exits:
    """Count the requests that leave at each site, and the share of the base's time that this saves."""
    until = np.array([found.costs.until(site) for site in range(found.select.depth + 1)])
    counts = np.bincount(sites, minlength=found.select.depth + 1)
    return Exits(exits=tuple(counts.tolist()), saved_share=float(1 - until[sites].mean() / found.costs.full_ms))


def measure_latency(chain: Chain, found: Explored, on: OpenCaches, images: np.ndarray) -> Latency:
    """Time the cascade and the fastest full network side by side on real requests, one at a time."""
    caches = found.candidates.take(on.names)
    tuned = run_by(found.tuning, Cascade(chain, tuple(caches), jnp.asarray(on.thresholds)))
    requests = images[np.linspace(0, len(images) - 1, min(TIMED, len(images))).astype(int)]
    speed = measure_batches(tuned, requests, batch=1, rounds=TURNS)
    return Latency.of(
        speed,
        requests=len(speed.exits),
        cache_bytes=sum(c.bytes for c in caches),
        base_bytes=chain.bytes,
        sites=tuple(c.site for c in caches),
    )
