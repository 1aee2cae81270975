"""The latency figures of ``train.evaluate``: what the exits save ideally, and as measured."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from gati_jax import Bundle
from gati_jax.planning import ReplayTable, replay_plan
from gati_jax.profiling import Speed, device_name, expected_ms, measure_batches

from .results import Cost, Measured

_log = logging.getLogger("train.evaluate")


def measure_tuned(
    bundle: Bundle, images: np.ndarray, exits: np.ndarray, batches: Sequence[int], timed: int
) -> list[Measured]:
    """Time the tuned cascade, if there is one, at every batch size that the split fills.

    ``timed`` requests are timed, but at least two batches; ``exits`` says where each request of the split leaves.
    """
    tuned, rows = bundle.tuned, []
    if tuned is None:
        return []
    for batch in batches:
        requests = images[: max(timed // batch, 2) * batch]
        if len(requests) < batch:
            continue
        _log.info("timing %d requests in batches of %d", len(requests), batch)
        speed = measure_batches(tuned, requests, batch=batch)
        costs = tuned.costs(batch)
        predicted_ms = expected_ms(tuned.cascade, costs, tuned.schedule(batch), exits, batch)
        of_tiles = {"tiles": tuple(costs), "costs_spread": costs[min(costs)].spread}
        rows.append(describe(bundle, speed, numerics="fast", predicted_ms=predicted_ms, **of_tiles))
    return rows


def describe(bundle: Bundle, speed: Speed, **more: Any) -> Measured:  # noqa: ANN401 (fields of the record)
    """Return the record of one timing."""
    driver, dtype = "while_loop" if speed.batch == 1 else "tiles", str(bundle.chain.input_spec.dtype)
    return Measured.of(speed, driver=driver, dtype=dtype, requests=len(speed.exits), **more)


def cost(bundle: Bundle, exits: np.ndarray, speed: Speed, tuned: Sequence[Measured]) -> Cost:
    """Summarise what the exits save: all those of the split ideally, those of the timed requests as measured."""
    ideal_ms = float(np.mean([speed.exit_ms[int(exit_)] for exit_ in exits]))
    lookup_ms = {
        name: ms for table in bundle.costs if table.device == device_name() for name, ms in table.lookup_ms.items()
    }
    lookups = [
        sum(lookup_ms.get(c.name, 0.0) for c in bundle.cascade.caches if c.site <= exit_) for exit_ in speed.exits
    ]
    share = float(np.mean(lookups)) / speed.cascade_ms if lookup_ms else None
    one_by_one = describe(bundle, speed, numerics="reference", lookup_share=share)
    return Cost(
        blocks_mean=float(exits.mean()),
        saved_share=1 - ideal_ms / speed.full_ms,
        ideal_speedup=speed.full_ms / ideal_ms,
        measured=(one_by_one, *tuned),
    )


def oracle_saved_share(table: ReplayTable, speed: Speed) -> float:
    """Return what would be saved if each request left at the bundle's first cache that agrees with the base."""
    thresholds = np.zeros(len(table.names))
    exits = replay_plan(dataclasses.replace(table, scores=np.where(table.agrees, 1.0, -1.0)), thresholds).exits
    until = np.array([speed.exit_ms[exit_] for exit_ in (*table.sites, table.depth)])
    return float(1 - until[exits].mean() / speed.full_ms)
