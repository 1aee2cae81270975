"""What ``train.evaluate`` says of time: what the exits save ideally, and really."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from gati_jax import Bundle
from gati_jax.planning import ReplayTable, replay_plan
from gati_jax.profiling import Speed, expected_ms, measure_batches
from gati_jax.profiling.costs import device_name

_log = logging.getLogger("train.evaluate")


def fast(
    bundle: Bundle, images: np.ndarray, exits: np.ndarray, batches: Sequence[int], timed: int
) -> list[dict[str, Any]]:
    """Time the tuned cascade at every batch size that the split fills; nothing where the bundle is not tuned.

    At least two groups of a batch are timed.
    """
    tuned, rows = bundle.tuned, []
    for batch in batches if tuned else ():
        requests = images[: max(timed // batch, 2) * batch]
        if tuned is None or len(requests) < batch:
            continue
        _log.info("timing %d requests in batches of %d", len(requests), batch)
        speed = measure_batches(tuned, requests, batch=batch)
        costs = tuned.costs(batch)
        predicted = expected_ms(tuned.cascade, costs, tuned.schedule(batch), exits, batch)
        driver, spread = "while_loop" if batch == 1 else "tiles", costs[min(costs)].spread
        row = measured(bundle, speed, driver=driver, numerics="fast")
        rows.append(row | {"predicted_ms": predicted, "tiles": list(costs), "costs_spread": spread})
    return rows


def measured(bundle: Bundle, speed: Speed, *, driver: str, numerics: str) -> dict[str, Any]:
    """Return an entry of ``cost.measured``."""
    return {
        "device": device_name(),
        "driver": driver,
        "numerics": numerics,
        "dtype": str(bundle.chain.input_spec.dtype),
        "batch": speed.batch,
        "requests": len(speed.exits),
        "full": speed.full,
        "full_ms": speed.full_ms,
        "cascade_ms": speed.cascade_ms,
        "speedup": speed.speedup,
        "ideal": speed.ideal,
        "conversion": speed.conversion,
        "spread": speed.spread,
    }


def cost(bundle: Bundle, exits: np.ndarray, speed: Speed, tuned: list[dict[str, Any]]) -> dict[str, Any]:
    """Say what the exits save: ideally, by the measured time up to each exit, and really, on the timed requests."""
    ideal_ms = float(np.mean([speed.exit_ms[int(exit_)] for exit_ in exits]))
    lookup_ms = {
        name: ms for table in bundle.costs if table.device == device_name() for name, ms in table.lookup_ms.items()
    }
    looked = [
        sum(lookup_ms.get(c.name, 0.0) for c in bundle.cascade.caches if c.site <= exit_) for exit_ in speed.exits
    ]
    share = float(np.mean(looked)) / speed.cascade_ms if lookup_ms else None
    one_by_one = measured(bundle, speed, driver="while_loop", numerics="reference") | {"lookup_share": share}
    return {
        "blocks_mean": float(exits.mean()),
        "saved_share": 1 - ideal_ms / speed.full_ms,
        "ideal_speedup": speed.full_ms / ideal_ms,
        "measured": [one_by_one, *tuned],
    }


def oracle_saved_share(table: ReplayTable, speed: Speed) -> float:
    """Return what would be saved if each request left at the bundle's first cache that agrees with the base."""
    thresholds = np.zeros(len(table.names))
    exits = replay_plan(dataclasses.replace(table, scores=np.where(table.agrees, 1.0, -1.0)), thresholds).exits
    until = np.array([speed.exit_ms[exit_] for exit_ in (*table.sites, table.depth)])
    return float(1 - until[exits].mean() / speed.full_ms)
