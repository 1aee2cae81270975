"""The device: slabs of activations, programs compiled ahead of time, dispatch. The scheduler decides what runs."""

import dataclasses
import functools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from gati_jax import InputError
from gati_jax.profiling import Tile, stages_ms, tuned_cache, tuned_chain
from gati_jax.pytrees import tree_digest
from gati_jax.runtime import Cascade, CompilerOptions

from . import programs
from .program_cache import Outputs, ProgramCache
from .programs import LOGITS, SCORE, Key, Program
from .records import Route, StageResult, Step
from .routes import CascadeRoute

BUCKETS = (1, 2, 4, 8)  # without a tuning
LARGEST = 16  # of a tuning's tiles: larger ones are hardly faster a row, and each row waits for all
MOST_PROGRAMS = 42  # of a route
ROUNDS = 5  # of a measurement
LEAST_MS = 0.01  # differences of measured times may be 0 or less

_log = logging.getLogger("serve.engine.runner")


class Prepared(NamedTuple):
    """New parameters of some routes, on the device."""

    programs: Mapping[Key, Program]
    thresholds: Mapping[int, Shaped[np.ndarray, " stages"]]


class JaxRunner:
    """Runs routes on the default device.

    A slab holds one site's activations, a row for each slot. Routes with a cache at the same site share it, because a
    slot belongs to one job. A stage writes its jobs' rows and the next stage reads them, so survivors of any steps can
    be merged without moving data.

    Args:
        sources: The routes, see ``routes.load``; they share a base.
        capacity: Slots. Memory: capacity x the sizes of all activations at sites of caches.
        buckets: Rows that a program takes; by default, the tuning's tiles up to ``LARGEST``, or ``BUCKETS``.
        first: Whether to begin with the smallest bucket alone; ``compile_next`` and ``take_next`` add the others.
        kept: Programs of former processes; None compiles all.

    Raises:
        InputError: Buckets that the tuning does not know, or too many of them.
    """

    def __init__(
        self,
        sources: Sequence[CascadeRoute],
        *,
        capacity: int = 256,
        buckets: Sequence[int] | None = None,
        first: bool = False,
        kept: ProgramCache | None = None,
    ) -> None:
        """Compile, run and measure every program, or those of the first bucket."""
        self.capacity = capacity
        self._sources, self._kept = tuple(sources), kept
        self._tiles = _tiles(sources, buckets)
        self._chain = sources[0].cascade.chain
        specs = {site: self._chain.site_specs[site] for source in sources for site in source.cascade.sites}
        self._slabs = {site: jnp.zeros((capacity, *spec.shape), spec.dtype) for site, spec in specs.items()}
        self._lost: dict[int, set[int]] = {site: set() for site in self._slabs}
        """By site: slots whose rows were lost with the slab that was donated to a failed step."""
        self._sites = [source.cascade.sites for source in sources]
        self._thresholds = {
            number: stage_thresholds(source.cascade.thresholds) for number, source in enumerate(sources)
        }
        """By route and stage: the least score of a row that leaves there."""
        tuned = [{size: _tuned_ms(source, tile) for size, tile in self._tiles.items()} for source in sources]
        # Times from two days are not comparable, so a tuning that does not know all is measured anew.
        self._tuned = [ms if all(ms.values()) else {} for ms in tuned]
        self._stage_ms: list[dict[int, tuple[float, ...]]] = [{} for _ in sources]
        self._programs: dict[Key, Program] = {}
        self.routes: tuple[Route, ...] = ()
        self._next = [*self._tiles]
        self._take(self._compile(self._next[:1] if first else self._next, programs.THREADS))
        self._next = self._next[len(self._stage_ms[0]) :]

    def dispatch(self, step: Step) -> "_Running":
        """Start a step.

        Raises:
            RuntimeError: A row was lost when another step failed.
            Exception: Any failure on the device.
        """
        slots = np.full(step.bucket, self.capacity, np.int32)
        slots[: len(step.jobs)] = [job.slot for job in step.jobs]
        images = [job.image for job in step.jobs] if step.stage == 0 else ()
        sites = self._sites[step.route]
        if step.stage and self._lost[sites[step.stage - 1]].intersection(slots.tolist()):
            raise RuntimeError(f"runner: activations at site {sites[step.stage - 1]} were lost in a failed step")
        output = self._execute((step.route, step.stage, step.bucket), images, slots)
        writes = sites[step.stage] if step.stage < len(sites) else None
        return _Running(self, output, len(step.jobs), self._thresholds[step.route][step.stage], writes)

    def prepare(self, sources: Mapping[int, CascadeRoute]) -> Prepared:
        """Put new parameters of some routes on the device, for ``take``; nothing is compiled. From any thread.

        Raises:
            InputError: They are not of the same structure and shapes as the present ones.
        """
        cascades, changed = self._cascades(sources, self._tiles), {}
        for key, cascade in cascades.items():
            leaves, structure = programs.leaves_of(cascade, key[1])
            old = self._programs.get(key)
            shapes = [(leaf.shape, leaf.dtype) for leaf in leaves]
            if old and old.structure == structure and [(leaf.shape, leaf.dtype) for leaf in old.leaves] == shapes:
                changed[key] = dataclasses.replace(old, leaves=leaves)
        if set(changed) != {key for key in self._programs if key[0] in sources}:
            raise InputError("sources: expected the same routes, networks, caches and shapes as before, got others")
        jax.block_until_ready([program.leaves for program in changed.values()])
        thresholds = {number: stage_thresholds(source.cascade.thresholds) for number, source in sources.items()}
        return Prepared(changed, thresholds)

    def take(self, prepared: Prepared) -> None:
        """Use prepared parameters from the next step on. From the engine's thread.

        Jobs in flight continue from the slabs: none may be in flight if the base changes.
        """
        self._programs = {**self._programs, **prepared.programs}
        self._thresholds = {**self._thresholds, **prepared.thresholds}

    def close(self, route: int, thresholds: Float[np.ndarray, " caches"]) -> None:
        """Use other thresholds from the next step on. From the engine's thread."""
        self._thresholds = {**self._thresholds, route: stage_thresholds(thresholds)}

    def lose(self, site: int) -> None:
        """Replace a slab that was donated to a failed step; the rows in it are lost to their jobs."""
        self._slabs[site] = jnp.zeros(self._slabs[site].shape, self._slabs[site].dtype)
        self._lost[site] = set(range(self.capacity))

    def _execute(
        self, key: Key, images: Sequence[np.ndarray], slots: Int[np.ndarray, " bucket"]
    ) -> Float[Array, "bucket columns"]:
        route, stage, bucket = key
        sites = self._sites[route]
        source = self._slabs[sites[stage - 1]] if stage else programs.to_source(self._chain, images, bucket)
        program = self._programs[key]
        if stage == len(sites):
            return program.run(program.leaves, source, slots, None)[0]
        site = sites[stage]
        after = self._slabs[site]
        try:
            output, self._slabs[site] = program.run(program.leaves, source, slots, after)
        except Exception:
            if after.is_deleted():
                self.lose(site)
            raise
        self._lost[site].difference_update(slots.tolist())
        return output

    # Warm-up

    def compile_next(self) -> Mapping[Key, Program] | None:
        """Compile the next larger bucket, for ``take_next``, beside the engine; None if there is none. From any thread.

        Parameters that were taken meanwhile would be missing in it, so ``prepare`` is not for a runner that grows.
        """
        return self._compile(self._next[:1], max(1, programs.THREADS // 2)) if self._next else None

    def take_next(self, compiled: Mapping[Key, Program]) -> tuple[Route, ...]:
        """Use the bucket that ``compile_next`` has compiled; returns the routes with it. From the engine's thread."""
        self._take(compiled)
        self._next = self._next[1:]
        return self.routes

    def _compile(self, buckets: Sequence[int], threads: int) -> dict[Key, Program]:
        """Compile all programs of some buckets, or load them."""
        started = time.perf_counter()
        cascades = self._cascades(dict(enumerate(self._sources)), buckets)
        options: dict[int, CompilerOptions] = {size: tile.options if tile else () for size, tile in self._tiles.items()}
        wanted = {key: (cascade, options[key[2]]) for key, cascade in cascades.items()}

        def make() -> dict[Key, Program]:
            return programs.build(wanted, capacity=self.capacity, threads=threads)

        def run(built: Mapping[Key, Program]) -> Outputs:
            return programs.try_all(built, cascades, capacity=self.capacity)

        compiled = make() if self._kept is None else self._kept.build(self._key, make, run)
        count, seconds = len({id(program.run) for program in compiled.values()}), time.perf_counter() - started
        _log.info("warm-up: %d programs in %.1f s", count, seconds, extra={"batches": [*buckets]})
        return compiled

    @functools.cached_property
    def _key(self) -> str:
        """What the answers of the programs depend on, besides the code."""
        arrays = tree_digest([source.cascade for source in self._sources])
        return f"{arrays} {self.capacity} {self._tiles}"

    def _take(self, compiled: Mapping[Key, Program]) -> None:
        """Run programs, and describe the routes with times from their tuning or measured now."""
        self._programs = {**self._programs, **compiled}
        for bucket in sorted({bucket for _, _, bucket in compiled}):
            for number, source in enumerate(self._sources):
                tuned = self._tuned[number].get(bucket)
                rounds, stages = (0 if tuned else ROUNDS), range(len(source.cascade.sites) + 1)
                measured = tuple(self._time((number, stage, bucket), rounds) for stage in stages)
                self._stage_ms[number][bucket] = tuple(max(LEAST_MS, ms) for ms in tuned or measured)
        self.routes = tuple(
            Route(
                name=source.name,
                sites=source.cascade.sites,
                depth=len(source.cascade.chain),
                epsilon=source.epsilon,
                stage_ms=dict(self._stage_ms[number]),
                leave=source.leave,
            )
            for number, source in enumerate(self._sources)
        )

    def _cascades(self, sources: Mapping[int, CascadeRoute], buckets: Iterable[int]) -> dict[Key, Cascade]:
        """Return, for every program, the cascade with its bucket's algorithms; routes share one chain a bucket."""
        found: dict[Key, Cascade] = {}
        for bucket in buckets:
            tile = self._tiles[bucket]
            chain = next(iter(sources.values())).cascade.chain  # they share a base
            chain = tuned_chain(chain, tile) if tile else chain
            for number, source in sources.items():
                caches = tuple(tuned_cache(cache, tile) if tile else cache for cache in source.cascade.caches)
                cascade = Cascade(chain, caches, source.cascade.thresholds)
                found |= {(number, stage, bucket): cascade for stage in range(len(caches) + 1)}
        return found

    def _time(self, key: Key, rounds: int) -> float:
        """Run a program on padding, once to warm up; return the median milliseconds of further rounds."""
        padding, times = np.full(key[2], self.capacity, np.int32), []
        for _ in range(1 + rounds):
            start = time.perf_counter()
            np.asarray(self._execute(key, (), padding))
            times.append((time.perf_counter() - start) * 1e3)
        return float(np.median(times[1:] or times))


@dataclasses.dataclass(frozen=True, eq=False)
class _Running:
    """A dispatched step, whose result is one small array."""

    runner: JaxRunner
    output: Float[Array, "bucket columns"]
    count: int
    threshold: Shaped[np.ndarray, ""]
    """As it was when the step was dispatched."""
    writes: int | None
    """The site of the slab that it writes."""

    def result(self) -> StageResult:
        try:
            output = np.asarray(self.output)[: self.count]
        except Exception:
            if self.writes is not None:
                self.runner.lose(self.writes)
            raise
        logits, score = output[:, LOGITS:], output[:, SCORE]
        return StageResult(score >= self.threshold, logits.argmax(-1), score, logits, float(self.threshold))


def stage_thresholds(caches: Shaped[np.ndarray | Array, " caches"]) -> Shaped[np.ndarray, " stages"]:
    """Return the thresholds of all stages; every row leaves at the last one."""
    return np.append(np.asarray(caches, np.float32), np.float32(-np.inf))


def _tiles(sources: Sequence[CascadeRoute], buckets: Sequence[int] | None) -> dict[int, Tile | None]:
    """Return the buckets, each with its tile of the tuning."""
    tuning, stages = sources[0].tuning, max(len(source.cascade.sites) + 1 for source in sources)
    tiles: dict[int, Tile | None] = dict.fromkeys(BUCKETS) if tuning is None else {t.size: t for t in tuning.tiles}
    if buckets is None:
        buckets = [size for size in sorted(tiles) if size <= LARGEST][: MOST_PROGRAMS // stages]
    if tuning is None:
        tiles = dict.fromkeys(buckets)
    if not buckets or set(buckets) - set(tiles):
        raise InputError(f"buckets: expected some of {sorted(tiles)}, which have been tuned, got {list(buckets)}")
    if stages * len(set(buckets)) > MOST_PROGRAMS or min(buckets) < 1:
        raise InputError(f"buckets: expected at most {MOST_PROGRAMS} programs, got {stages} stages of {list(buckets)}")
    return {bucket: tiles[bucket] for bucket in sorted(set(buckets))}


def _tuned_ms(source: CascadeRoute, tile: Tile | None) -> tuple[float, ...] | None:
    """Return every stage's milliseconds from the tile; None if it was not measured with these caches."""
    if tile is None or tile.costs is None or {c.name for c in source.cascade.caches} - set(tile.costs.lookup_ms):
        return None
    return stages_ms(source.cascade, tile.costs)
