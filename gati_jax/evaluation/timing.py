"""Latency: what a bundle's exits save ideally, and as measured beside the fastest full network."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gati_jax.bundle import Bundle
from gati_jax.data import Images
from gati_jax.planning import CostTable, ReplayTable, cascade_ms, replay_plan
from gati_jax.profiling import (
    Speed,
    TunedCascade,
    Tuning,
    device_name,
    expected_ms,
    measure_batches,
    measure_speed,
    onnx_tuning,
    onnx_unavailable,
    probe,
    run_by,
)
from gati_jax.profiling.speed import FullNetwork
from gati_jax.runtime import Cascade

from .records import Cost, Measured, Oracle, record_of

_log = logging.getLogger(__name__)


def contenders(bundle: Bundle, size: int) -> dict[FullNetwork, TunedCascade]:
    """Return further ways to run the full network, one of which may be the fastest that a user has here.

    For each backend that the bundle has not been tuned for: the best of XLA's programs for ``size`` rows that a minute
    of trying finds, and ONNX Runtime where it is installed.
    """
    chain, first, found = bundle.chain, bundle.tuning_of(), dict[FullNetwork, Tuning]()
    for backend in ("xla", "onnxruntime"):
        tuning = bundle.tunings_here.get(backend)
        if tuning is None and backend == "xla":
            _log.info("trying programs of the full network, to compare with the fastest")
            tuning = probe(chain, sizes=(size,))
        if tuning is None and not onnx_unavailable(chain):
            tuning = onnx_tuning(chain)
        if tuning is not None and tuning is not first:
            found[backend] = tuning
    base = Cascade(chain, (), jnp.zeros(0))
    return {backend: run_by(tuning, base) for backend, tuning in found.items()}


def measure(
    bundle: Bundle, images: Images, exits: np.ndarray, batches: Sequence[int], timed: int
) -> tuple[Speed, list[Measured]]:
    """Time what answers by default beside the fastest full network: one request at a time, then in batches.

    Where the certified arithmetic answers, one at a time is all; a tuned cascade is timed at every batch size that the
    split fills. ``timed`` requests are timed, but at least two batches; ``exits`` says where each of the split leaves.

    Returns:
        The first measurement, and the records of all.
    """
    tuned = bundle.tuned
    if tuned is None or not bundle.checks:
        full = contenders(bundle, 1)
        if tuned is not None:
            full["tuned"] = tuned
        _log.info("timing %d requests, one at a time", min(timed, len(images)))
        speed = measure_speed(bundle.cascade, images[:timed], full=full)
        return speed, [describe(bundle, speed, numerics="reference", lookup_share=_lookup_share(bundle, speed))]
    full, speeds, rows = contenders(bundle, 8), [], []
    for batch in sorted({1, *batches}):
        requests = images[: max(timed // batch, 2) * batch]
        if len(requests) < batch:
            continue
        _log.info("timing %d requests in batches of %d", len(requests), batch)
        speeds.append(measure_batches(tuned, requests, batch=batch, full=full))
        costs = tuned.costs(batch)
        predicted_ms = expected_ms(tuned.cascade, costs, tuned.schedule(batch), exits, batch)
        of_tiles = {"tiles": tuple(costs), "costs_spread": costs[min(costs)].spread}
        rows.append(describe(bundle, speeds[-1], numerics="fast", predicted_ms=predicted_ms, **of_tiles))
    return speeds[0], rows


def describe(bundle: Bundle, speed: Speed, **more: Any) -> Measured:  # noqa: ANN401 (fields of the record)
    """Return the record of one timing."""
    backend = "xla" if (tuning := bundle.tuning_of()) is None or more["numerics"] == "reference" else tuning.backend
    driver = "spans" if backend == "onnxruntime" else "while_loop" if speed.batch == 1 else "tiles"
    dtype = str(bundle.chain.input_spec.dtype)
    return record_of(Measured, speed, driver=driver, backend=backend, dtype=dtype, requests=len(speed.exits), **more)


def _lookup_share(bundle: Bundle, speed: Speed) -> float | None:
    """Return the share of lookups in the time of the timed requests, by costs measured on this device."""
    table = next((table for table in bundle.costs if table.device == device_name()), None)
    if table is None:
        return None
    caches = [(cache.site, table.lookup_ms.get(cache.name, 0.0)) for cache in bundle.cascade.caches]
    lookups = np.mean([sum(ms for site, ms in caches if site <= exit_) for exit_ in speed.exits])
    return float(lookups / (lookups + np.mean([table.until(exit_) for exit_ in speed.exits])))


def cost(exits: np.ndarray, speed: Speed, measured: Sequence[Measured]) -> Cost:
    """Summarise what the exits save: all those of the split ideally, those of the timed requests as measured."""
    ideal_ms = float(np.mean([speed.exit_ms[int(exit_)] for exit_ in exits]))
    return Cost(
        blocks_mean=float(exits.mean()),
        saved_share=1 - ideal_ms / speed.full_ms,
        ideal_speedup=speed.full_ms / ideal_ms,
        measured=tuple(measured),
    )


def oracle(table: ReplayTable, speed: Speed, costs: CostTable | None) -> Oracle:
    """Return what would be saved if each request left at the bundle's first cache that agrees with the base.

    Args:
        table: The replay of the caches that are on.
        speed: With the time up to each exit, of which a share is saved: lookups are left out.
        costs: For its mean time with lookups, beside those of a path.
    """
    perfect = dataclasses.replace(table, scores=np.where(table.agrees, 1.0, -1.0))
    thresholds = np.zeros(len(table.names))
    exits = replay_plan(perfect, thresholds).exits
    until = np.array([speed.exit_ms[exit_] for exit_ in (*table.sites, table.depth)])
    ms = None if costs is None else cascade_ms(perfect, thresholds, costs)
    return Oracle(saved_share=float(1 - until[exits].mean() / speed.full_ms), ms=ms)
