"""Measured costs: what each block and each lookup takes on this device, the programs taking turns."""

import functools
import logging
import os
import platform
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from gati_jax.caches import Candidate
from gati_jax.models import Chain
from gati_jax.planning import CostTable

from .lookups import time_lookups
from .numerics import reference
from .options import Options, compiled
from .packing import Packed, pack, unpack
from .timing import spread, time_interleaved

_log = logging.getLogger(__name__)


def device_name() -> str:
    """Name the default device, fit for a file name: "cpu-" with the processor's model, or the accelerator's kind."""
    device = jax.devices()[0]
    kind = _processor() if device.platform == "cpu" else device.device_kind
    return re.sub(r"[^\w.+-]+", "-", f"{device.platform}-{kind}".lower())[:100].rstrip("-")


@functools.cache
def _processor() -> str:
    """Return the processor's model and how many cores this process may use."""
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        models = []
    model = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model} {cores} cores"


def prefix_program(
    chain: Chain, site: int, images: Shaped[Array | np.ndarray, "batch *input"], options: Options = ()
) -> Callable[[], Array]:
    """Return a compiled call of the base up to ``site``; N includes the classifier."""
    # All parameters are handed over, as to the whole network: that is part of its time up to any site.
    return functools.partial(
        compiled(_prefix, options, static=("site",), keep_unused=True), pack(chain), images, site=site
    )


@reference
def _prefix(packed: Packed[Chain], images: Shaped[Array | np.ndarray, "batch *input"], *, site: int) -> Array:
    chain = unpack(packed)
    x = chain.span(chain.prepare(images), 0, site)
    return chain.classify(x) if site == len(chain) else x


def measure_costs(
    chain: Chain,
    candidates: Iterable[Candidate],
    *,
    rounds: int = 60,
    batch: int = 1,
    options: Options = (),
    sites: Iterable[int] | None = None,
) -> CostTable:
    """Measure every block (as differences of prefixes of the base) and every lookup.

    Args:
        chain: The base.
        candidates: Whose lookups to time.
        rounds: Interleaved repeats, of which the medians are taken.
        batch: Requests at once.
        options: Compiler options of the programs.
        sites: Measure up to these only; blocks in between share a span's time equally. None: every block.
    """
    depth, candidates = len(chain), tuple(candidates)
    images = jnp.zeros((batch, *chain.input_spec.shape), chain.input_spec.dtype)
    stops = [*sorted({site for site in (range(1, depth) if sites is None else sites) if site}), depth]
    message = "measuring %d spans and %d lookups in batches of %d, %d rounds"
    _log.info(message, len(stops), len(candidates), batch, rounds)
    prefixes = {str(site): prefix_program(chain, site, images, options) for site in stops}
    times = time_interleaved(prefixes, rounds=rounds)
    until = np.maximum.accumulate([0.0, *(float(np.median(v)) for v in times.values())])
    return CostTable(
        device=device_name(),
        batch=batch,
        blocks_ms=tuple(np.diff(np.interp(range(depth + 1), [0, *stops], until)).tolist()),
        lookup_ms=time_lookups(chain, candidates, images, max(5, rounds // 2), options),
        spread=spread(times[str(depth)]),
    )
