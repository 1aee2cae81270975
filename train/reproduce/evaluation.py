"""What policies come to at the steps that were chosen for them: time, answers, exits; each way timed on one device."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gati_jax import Chain, Plan
from gati_jax.caches import on_its_own
from gati_jax.fitting import Candidates
from gati_jax.planning import replay_plan
from gati_jax.profiling import Tile, TunedCascade, Tuning, device_name, measure_batches, time_turns, tuned_chain
from gati_jax.runtime import Cascade, predict_one
from train.exploration import Explored

from .policies import Contestant, accuracy

BASE = "the base"
RESAMPLES = 2000
CALLS = 4
TIMED, TURNS = 500, 5  # requests, from all over the test split, and how often each


class Open(NamedTuple):
    """The caches that are on at a step of a plan: a bundle runs no others."""

    names: tuple[str, ...]
    thresholds: Float[np.ndarray, " caches"]

    @classmethod
    def of(cls, plan: Plan, step: int) -> "Open":
        """Leave out what is off."""
        thresholds = plan.thresholds(step)
        on = np.isfinite(thresholds)
        return cls(tuple(np.array(plan.names, object)[on]), thresholds[on])


def exit_times(
    chain: Chain, candidates: Candidates, ways: Mapping[str, Sequence[str]], tile: Tile, image: np.ndarray, rounds: int
) -> dict[str, Float[np.ndarray, " exits"]]:
    """Time the way to every exit of every cascade, lookups on the way included, all of them taking turns.

    Args:
        chain: The base.
        candidates: All that were explored; a cascaded one is timed without its ensemble, a few products.
        ways: By name, the caches of a cascade; none is the base alone.
        tile: Algorithms and options, the same for all.
        image: One request.
        rounds: How often.

    Returns:
        Milliseconds of a request that leaves at each cache, and last, at the base.
    """
    base = tuned_chain(chain, tile)  # one for all: the weights of a copy for each would push one another out of memory
    programs = {}
    for name, names in ways.items():
        caches = tuple(on_its_own(c) for c in candidates.take(names))
        for exit_ in range(len(caches) + 1):
            # An infinite threshold is never reached, minus infinity always: the request leaves where it is told to.
            thresholds = [-np.inf if i == exit_ else np.inf for i in range(len(caches))]
            cascade = Cascade(base, caches, jnp.asarray(thresholds, jnp.float32))
            programs[name, exit_] = functools.partial(predict_one, cascade, image, tile.options)
    # A few calls in a row: the first finds its weights cold, as no server would leave them.
    turns = time_turns({f"{name} {exit_}": [run] * CALLS for (name, exit_), run in programs.items()}, rounds)
    median = {key: float(np.median(ms[:, 1:])) for key, ms in turns.items()}
    return {name: np.array([median[f"{name} {i}"] for i in range(len(names) + 1)]) for name, names in ways.items()}


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


def judge(
    standings: Sequence[tuple[Contestant, Open]], ms: Mapping[str, np.ndarray], group: str, found: Explored
) -> list[dict[str, Any]]:
    """Say what each contestant does on test at its step; the first is what the others are compared with."""
    rows, first = [], None
    for one, on in standings:
        table = one.tables["test"].take(on.names)
        outcome = replay_plan(table, on.thresholds)
        latency = ms[f"{group} {one.name}"][outcome.exits]
        first = latency if first is None else first
        at = np.array([*table.sites, table.depth])[outcome.exits]
        rows.append(
            {
                "policy": one.name,
                "heads": one.heads,
                "caches": list(on.names),
                "thresholds": on.thresholds.tolist(),
                "mean_ms": float(latency.mean()),
                "full_ms": float(ms[BASE][0]),
                "disagreement": outcome.disagreement,
                "accuracy": accuracy(outcome.classes, table),
                **exits_summary(at, found),
                "slower_by": paired(first, latency),
            }
        )
    return rows


def exits_summary(at: np.ndarray, found: Explored) -> dict[str, Any]:
    """Return where requests leave, and the share of the base's time that this saves, lookups left out."""
    until = np.array([found.costs.until(site) for site in range(found.select.depth + 1)])
    counts = np.bincount(at, minlength=found.select.depth + 1)
    return {"exits": counts.tolist(), "saved_share": float(1 - until[at].mean() / found.costs.full_ms)}


def measure(chain: Chain, found: Explored, on: Open, images: np.ndarray) -> dict[str, Any]:
    """Run the cascade and the fastest full network side by side on real requests, one at a time."""
    caches = found.candidates.take(on.names)
    tuned = TunedCascade(
        Cascade(chain, tuple(caches), jnp.asarray(on.thresholds)), Tuning(device=device_name(), tiles=(found.tile,))
    )
    requests = images[np.linspace(0, len(images) - 1, min(TIMED, len(images))).astype(int)]
    speed = measure_batches(tuned, requests, batch=1, rounds=TURNS)
    return {
        "full_ms": speed.full_ms,
        "cascade_ms": speed.cascade_ms,
        "speedup": speed.speedup,
        "ideal": speed.ideal,
        "spread": speed.spread,
        "requests": len(speed.exits),
        "cache_bytes": sum(c.bytes for c in caches),
        "base_bytes": chain.bytes,
        "sites": [c.site for c in caches],
    }
