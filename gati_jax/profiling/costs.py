"""Measured costs: the time of each block and each lookup on this device.

Programs that are compared take turns, so that a disturbance of the machine meets all of them.
"""

import dataclasses
import functools
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from gati_jax.caches import Candidate, Network, lookup
from gati_jax.errors import check_kind
from gati_jax.models import Chain, check_is_chain
from gati_jax.models.chain import reference
from gati_jax.planning import CostTable
from gati_jax.pytrees import Packed, pack, unpack
from gati_jax.runtime import CompilerOptions, compiled
from gati_jax.runtime.batched import BatchedCascade, Schedule, predict_tiled
from gati_jax.runtime.cascade import Cascade, predict_one

_log = logging.getLogger(__name__)


T = TypeVar("T")
Backend = Literal["xla", "onnxruntime"]


def missing_device() -> str:
    """Return in one line why JAX finds no device to run on; empty if it finds one."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # it asserts where a platform's plugin is not installed
        wanted = getattr(jax.config, "jax_platforms", None) or "of any kind"
        reason = (str(error).strip() or "JAX has no plugin for it").splitlines()[0]
        return f"JAX_PLATFORMS: expected a device that is here, got {wanted}: {reason}"
    return ""


def device_name(backend: Backend = "xla") -> str:
    """Return a file name for the device that a backend runs on.

    It is that of JAX's default device: "cpu-" and the processor's model, or platform and kind; or "onnxruntime-cpu-"
    and the processor's model, for ONNX Runtime always runs on the processor here.
    """
    device = jax.devices()[0]
    on_cpu = backend == "onnxruntime" or device.platform == "cpu"
    name = f"cpu-{_processor()}" if on_cpu else f"{device.platform}-{device.device_kind}"
    name = name if backend == "xla" else f"{backend}-{name}"
    return re.sub(r"[^\w.+-]+", "-", name.lower())[:100].rstrip("-")


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
    chain: Chain, site: int, images: Shaped[Array | np.ndarray, "batch *input"], options: CompilerOptions = ()
) -> Callable[[], Array]:
    """Return a compiled call of the base up to ``site``; N includes the classifier."""
    # All parameters are passed, as to the whole network: that is part of its time up to any site.
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
    options: CompilerOptions = (),
    sites: Iterable[int] | None = None,
    progress: bool = True,
) -> CostTable:
    """Measure the time of every block (as differences between prefixes of the base) and of every lookup.

    Args:
        chain: The base.
        candidates: The caches whose lookups are timed.
        rounds: Interleaved repeats, of which the medians are taken.
        batch: Requests at once.
        options: Compiler options of the programs.
        sites: Where to end prefixes; blocks between two of them share the time equally. None: after every block.
        progress: Whether to draw progress bars on a terminal.

    Returns:
        Milliseconds of the batch, for ``plan``. A line in the log says if they are ``unsteady``.
    """
    check_is_chain(chain)
    depth, candidates = len(chain), _checked(candidates)
    images = jnp.zeros((batch, *chain.input_spec.shape), chain.input_spec.dtype)
    stops = [*sorted({site for site in (range(1, depth) if sites is None else sites) if site}), depth]
    announce("XLA", len(stops), len(candidates), batch, rounds)
    prefixes = {str(site): prefix_program(chain, site, images, options) for site in stops}
    times = time_interleaved(prefixes, rounds=rounds, progress=progress)
    until = np.maximum.accumulate([0.0, *(float(np.median(v)) for v in times.values())])
    lookup_ms = time_lookups(_XlaPrograms(chain, images, options), candidates, max(5, rounds // 2), progress=progress)
    costs = CostTable(
        device=device_name(),
        batch=batch,
        blocks_ms=tuple(np.diff(np.interp(range(depth + 1), [0, *stops], until)).tolist()),
        lookup_ms=lookup_ms,
        spread=spread(times[str(depth)]),
    )
    warn_if_unsteady(costs)
    return costs


def _checked(candidates: Any) -> tuple[Candidate, ...]:  # noqa: ANN401 (checked here)
    items = tuple(candidates) if isinstance(candidates, Iterable) else (candidates,)
    for item in items:
        check_kind("candidates", item, Candidate, "what gati_jax.fit returns")
    return items


def announce(backend: str, spans: int, lookups: int, batch: int, rounds: int) -> None:
    """Log what is about to be measured."""
    text = "measuring %d spans and %d lookups on %s in batches of %d, %d rounds"
    _log.info(text, spans, lookups, backend, batch, rounds)


MOST_SPREAD = 0.1
_AGAIN = 2


def unsteady(costs: CostTable) -> str:
    """Return why measured times cannot be relied on, as on a busy machine; empty if they can."""
    if costs.spread > MOST_SPREAD:
        return f"the base's times spread by {costs.spread:.0%}, where {MOST_SPREAD:.0%} are allowed"
    if 0.0 in costs.blocks_ms:  # measure_costs makes them so where a prefix took no longer than a shorter one
        return f"the base up to block {costs.blocks_ms.index(0.0)} took no less time than with it"
    return ""


def warn_if_unsteady(costs: CostTable) -> None:
    """Log that costs cannot be relied on, if so."""
    if why := unsteady(costs):
        _log.warning("costs: %s: is the machine busy? A plan by them may not save what it says", why)


def measure_steadily(measure: Callable[[], CostTable]) -> CostTable:
    """Return a measurement that is not ``unsteady``, of at most three; if there is none, the steadiest of them."""
    tables: list[CostTable] = []
    while len(tables) <= _AGAIN:
        tables.append(measure())
        if not unsteady(tables[-1]):
            return tables[-1]
        _log.info("costs: measured %d of at most %d times", len(tables), 1 + _AGAIN)
    return min(tables, key=lambda table: (table.blocks_ms.count(0.0), table.spread))


LEAST_SHARE = 0.1
_TURN = 4  # calls
_REFRESH = 5  # turns
Call = Callable[[], object]


@runtime_checkable
class Programs(Protocol):
    """Calls on one backend, to be timed."""

    def lookup(self, cache: Candidate) -> Call:
        """Return the lookup of a cache by itself, on made-up activations."""
        ...

    def all_miss(self, caches: tuple[Candidate, ...]) -> Call:
        """Return the cascade in which every lookup misses."""
        ...


@dataclasses.dataclass(frozen=True)
class _XlaPrograms:
    """XLA's programs under some compiler options."""

    chain: Chain
    images: Shaped[Array, "batch *input"]
    options: CompilerOptions

    def lookup(self, cache: Candidate) -> Call:
        spec = self.chain.site_specs[cache.site]
        activation = jax.random.normal(jax.random.key(0), (len(self.images), *spec.shape)).astype(spec.dtype)
        return lookup_program(cache, activation, self.options)

    def all_miss(self, caches: tuple[Candidate, ...]) -> Call:
        cascade = Cascade(self.chain, caches, jnp.full(len(caches), jnp.inf))
        if len(self.images) == 1:
            return functools.partial(predict_one, cascade, self.images[0], self.options)
        one_tile = BatchedCascade.of(cascade, Schedule.of({len(self.images): 1.0}))
        return functools.partial(predict_tiled, one_tile, self.images, options=self.options)


def lookup_program(
    cache: Candidate, activation: Float[Array, "batch *site"], options: CompilerOptions = ()
) -> Callable[[], tuple[Array, Array]]:
    """Return a compiled call of a lookup by itself."""
    return functools.partial(compiled(_lookup, options), pack(cache), activation)


@reference
def _lookup(packed: Packed[Candidate], activation: Float[Array, "batch *site"]) -> tuple[Array, Array]:
    return lookup(unpack(packed), activation)


def time_lookups(
    programs: Programs, candidates: Iterable[Candidate], rounds: int, *, progress: bool = False
) -> dict[str, float]:
    """Return the time that each lookup adds to the cascade around it, by name.

    A lookup is too short to be timed alone: starting its program takes longer. So one at each site is timed in a
    cascade in which all of them miss, and the time by which that exceeds the base, turn by turn, is divided among them
    in proportion to their times alone. A predictor is timed once for all its selectors, which cost next to nothing:
    composition would choose among them by noise.

    The excess is a difference of two long times, and noise may make it vanish or negative. But no lookup is free, and a
    plan that takes one for free looks up everywhere: each costs at least ``LEAST_SHARE`` of its time alone. Most of
    that time is the start of its program, so clear differences are several times as large. A small network before the
    base is long enough to be timed alone.
    """
    alike: dict[tuple[object, ...], list[Candidate]] = {}
    for candidate in candidates:
        alike.setdefault(_predictor_key(candidate), []).append(candidate)
    distinct = [candidate for candidate, *_ in alike.values()]
    singly = {cache.name: programs.lookup(cache) for cache in distinct}
    alone = {
        name: float(np.median(ms)) for name, ms in time_interleaved(singly, rounds=rounds, progress=progress).items()
    }
    cascades = _cascades(cache for cache in distinct if not isinstance(cache.predictor, Network))
    calls = {str(i): [programs.all_miss(caches)] * _TURN for i, caches in enumerate([(), *cascades])}
    # The first call of a turn finds its weights cold.
    turns = {int(i): np.median(ms[:, 1:], axis=1) for i, ms in time_turns(calls, rounds, progress=progress).items()}
    milliseconds = {cache.name: alone[cache.name] for cache in distinct}
    for i, caches in enumerate(cascades, start=1):
        whole = sum(alone[cache.name] for cache in caches)
        added = max(LEAST_SHARE * whole, float(np.median(turns[i] - turns[0])))
        milliseconds |= {cache.name: added * alone[cache.name] / whole for cache in caches}
    return {other.name: milliseconds[first.name] for first, *rest in alike.values() for other in (first, *rest)}


def _cascades(candidates: Iterable[Candidate]) -> list[tuple[Candidate, ...]]:
    """Distribute candidates among cascades, each with one at a site."""
    groups: list[dict[int, Candidate]] = []
    for candidate in candidates:
        free = next((group for group in groups if candidate.site not in group), None)
        if free is None:
            groups.append(free := {})
        free[candidate.site] = candidate
    return [tuple(group[site] for site in sorted(group)) for group in groups]


def _predictor_key(candidate: Candidate) -> tuple[object, ...]:
    """Return the identity of a predictor: several candidates may share its arrays under different selectors."""
    arrays = jax.tree.leaves(candidate.params["predictor"])
    return candidate.site, candidate.predictor, *map(id, arrays)


def time_interleaved(
    programs: Mapping[str, Callable[[], object]], *, rounds: int, progress: bool = False
) -> dict[str, Float[np.ndarray, " rounds"]]:
    """Return the milliseconds of every run of programs that take turns, by name; see ``time_turns``."""
    turns = time_turns({name: [program] for name, program in programs.items()}, rounds, progress=progress)
    return {name: ms[:, 0] for name, ms in turns.items()}


def time_turns(
    programs: Mapping[str, Sequence[Callable[[], object]]], rounds: int, *, progress: bool = False
) -> dict[str, Float[np.ndarray, "rounds groups"]]:
    """Time programs in turn, each of them on all groups of requests before the next.

    A program that has just run has its weights in the processor's caches, as under traffic; with another one in
    between, it would find them cold.

    Args:
        programs: By name, a call for each group.
        rounds: How often each takes its turn, after one to warm up, which compiles it.
        progress: Whether to draw a progress bar on a terminal.

    Returns:
        Milliseconds of every call.
    """
    times = {name: np.empty((rounds, len(calls))) for name, calls in programs.items()}
    for calls in watched_items(list(programs.values()), "compiling", progress=progress, estimate=False):
        for call in calls:
            jax.block_until_ready(call())
    turns = [(i, name) for i in range(rounds) for name in programs]
    for i, name in watched_items(turns, "measuring", progress=progress):
        for g, call in enumerate(programs[name]):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name][i, g] = (time.perf_counter() - start) * 1e3
    return times


def watched_items(items: Sequence[T], what: str, *, progress: bool, estimate: bool = True) -> Iterator[T]:
    """Yield items; between them, and so not during what is timed, log how many are done and draw a bar.

    Args:
        items: What takes turns.
        what: Is done with them, for the log and the bar.
        progress: Whether to draw a bar on a terminal.
        estimate: Whether the items take about equally long, so that the remaining time can be told.
    """
    # Answering does without rich and Orbax, which these load.
    from gati_jax.fitting.loop import ProgressLog, progress_bar  # noqa: PLC0415

    log = ProgressLog(what, len(items), estimate=estimate)
    with progress_bar(progress, steady=True, estimate=estimate) as bar:
        task = bar.add_task(what, total=len(items))
        bar.refresh()
        for now, item in enumerate(items, start=1):
            yield item
            due = now == len(items) or now % _REFRESH == 0 or not estimate
            bar.update(task, completed=now, refresh=due)
            log.update(now)


def spread(times: Float[np.ndarray, " rounds"]) -> float:
    """Return the interquartile range over the median."""
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
    return float((high - low) / median)
