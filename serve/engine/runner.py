"""The device: slabs of activations, programs compiled ahead of time, dispatch. The scheduler decides what runs."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from gati_jax import InputError
from gati_jax.profiling import Tile, stages_ms, tuned_cache, tuned_chain
from gati_jax.runtime import Cascade, CompilerOptions

from . import programs
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

    Raises:
        InputError: Buckets that the tuning does not know, or too many of them.
    """

    def __init__(
        self, sources: Sequence[CascadeRoute], *, capacity: int = 256, buckets: Sequence[int] | None = None
    ) -> None:
        """Compile, run and measure every program."""
        started = time.perf_counter()
        self.capacity = capacity
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
        options: dict[int, CompilerOptions] = {size: tile.options if tile else () for size, tile in self._tiles.items()}
        cascades = self._cascades(dict(enumerate(sources)))
        wanted = {key: (cascade, options[key[2]]) for key, cascade in cascades.items()}
        self._programs = programs.build(wanted, capacity=capacity)
        self.routes = tuple(self._route(number, source) for number, source in enumerate(sources))
        count = len({id(program.run) for program in self._programs.values()})
        _log.info("warm-up: %d programs in %.1f s", count, time.perf_counter() - started)

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
        cascades, changed = self._cascades(sources), {}
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

    def _cascades(self, sources: Mapping[int, CascadeRoute]) -> dict[Key, Cascade]:
        """Return, for every program, the cascade with its bucket's algorithms; routes share one chain a bucket."""
        found: dict[Key, Cascade] = {}
        for bucket, tile in self._tiles.items():
            chain = next(iter(sources.values())).cascade.chain  # they share a base
            chain = tuned_chain(chain, tile) if tile else chain
            for number, source in sources.items():
                caches = tuple(tuned_cache(cache, tile) if tile else cache for cache in source.cascade.caches)
                cascade = Cascade(chain, caches, source.cascade.thresholds)
                found |= {(number, stage, bucket): cascade for stage in range(len(caches) + 1)}
        return found

    def _route(self, number: int, source: CascadeRoute) -> Route:
        """Run every program, and describe the route with times from its tuning or measured now."""
        stages = range(len(source.cascade.sites) + 1)
        tuned = {bucket: ms for bucket, tile in self._tiles.items() if (ms := _tuned_ms(source, tile)) is not None}
        known = len(tuned) == len(self._tiles)  # times from two days are not comparable
        stage_ms = {
            bucket: tuple(self._time((number, stage, bucket), 0 if known else ROUNDS) for stage in stages)
            for bucket in self._tiles
        }
        stage_ms = tuned if known else stage_ms
        return Route(
            name=source.name,
            sites=source.cascade.sites,
            depth=len(source.cascade.chain),
            epsilon=source.epsilon,
            stage_ms={bucket: tuple(max(LEAST_MS, ms) for ms in each) for bucket, each in stage_ms.items()},
            leave=source.leave,
        )

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
