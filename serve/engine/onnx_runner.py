"""The device, as ONNX Runtime runs it: slabs in host memory, a session for each span, batches of exactly the jobs."""

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from gati_jax.profiling import AnyBatch, stages_ms

from .records import Job, Route, StageResult, Step
from .routes import CascadeRoute
from .runner import BUCKETS, LEAST_MS, ROUNDS, stage_thresholds

_log = logging.getLogger("serve.engine.onnx_runner")


class OnnxRunner:
    """Runs routes on ONNX Runtime, on the CPU; see ``JaxRunner``, whose place it takes.

    All routes share the base's sessions, which are cut at the sites of all caches. A step is done when ``dispatch``
    returns.

    Args:
        sources: The routes, see ``routes.load``; they share a base, which has an ONNX form as their caches have.
        capacity: Slots. Memory: capacity x the sizes of all activations at sites of caches.
    """

    def __init__(self, sources: Sequence[CascadeRoute], *, capacity: int = 256) -> None:
        """Open the sessions, and run every stage once."""
        from gati_jax.export.sessions import Lookup, Spans, to_array, to_value  # noqa: PLC0415 (of the extra onnx)

        started, chain = time.perf_counter(), sources[0].cascade.chain
        self.capacity, self._depth, self._to_value, self._to_array = capacity, len(chain), to_value, to_array
        self._sites = [source.cascade.sites for source in sources]
        self._spans = Spans(chain, {site for source in sources for site in (*source.cuts, *source.cascade.sites)})
        self._slabs: dict[int, Shaped[np.ndarray, "slots channels *positions"]] = {}
        for site in {site for sites in self._sites for site in sites}:
            *positions, channels = (spec := chain.site_specs[site]).shape
            self._slabs[site] = np.zeros((capacity, channels, *positions), spec.dtype)
        opened: dict[int, Lookup] = {}  # plans may share caches
        for source in sources:
            opened |= {id(c): Lookup(chain, c) for c in source.cascade.caches if id(c) not in opened}
        self._lookups = [[opened[id(cache)] for cache in source.cascade.caches] for source in sources]
        self._thresholds = [stage_thresholds(source.cascade.thresholds) for source in sources]
        image = np.zeros(chain.input_spec.shape, chain.input_spec.dtype if chain.normalization is None else np.uint8)
        self.routes = self._describe(sources, image)
        _log.info("warm-up: %d lookups on ONNX Runtime in %.1f s", len(opened), time.perf_counter() - started)

    def dispatch(self, step: Step) -> "_Done":
        """Run a step.

        Raises:
            Exception: Any failure of ONNX Runtime.
        """
        sites = self._sites[step.route]
        slots = np.array([job.slot for job in step.jobs])
        start = sites[step.stage - 1] if step.stage else 0
        stop = sites[step.stage] if step.stage < len(sites) else self._depth
        if step.stage:
            x = self._spans.run(self._to_value(self._slabs[start]), slots, start, stop)
        else:
            x = self._first(step.jobs, stop)
        if step.stage == len(sites):
            logits, score = self._to_array(x), np.full(len(slots), np.inf, np.float32)
        else:
            logits, score = self._lookups[step.route][step.stage](x)
            self._slabs[stop][slots] = self._to_array(x)
        threshold = self._thresholds[step.route][step.stage]
        return _Done(StageResult(score >= threshold, logits.argmax(-1), score, logits, float(threshold)))

    def _first(self, jobs: Sequence[Job], stop: int) -> Any:  # noqa: ANN401 (an OrtValue)
        """Run the images of some jobs; pixels and prepared inputs are different programs."""
        kinds = {job.image.dtype for job in jobs}
        if len(kinds) == 1:
            return self._spans.first(np.stack([job.image for job in jobs]), stop)
        parts, places = [], []
        for kind in kinds:
            places.append(np.array([i for i, job in enumerate(jobs) if job.image.dtype == kind]))
            images = np.stack([jobs[i].image for i in places[-1]])
            parts.append(self._to_array(self._spans.first(images, stop)))
        order = np.argsort(np.concatenate(places))
        return self._to_value(np.concatenate(parts)[order])

    def _describe(self, sources: Sequence[CascadeRoute], image: Shaped[np.ndarray, "*input"]) -> tuple[Route, ...]:
        """Run every stage, and describe the routes with times from their tuning, or all measured now."""
        known = [_tuned_ms(source) for source in sources]
        rounds = 0 if all(known) else ROUNDS  # times from two days are not comparable
        found = []
        for number, (source, tuned) in enumerate(zip(sources, known, strict=True)):
            stages = range(len(source.cascade.sites) + 1)
            measured = {n: tuple(self._time(number, stage, image, n, rounds) for stage in stages) for n in BUCKETS}
            ms = measured if rounds else tuned
            route = Route(
                name=source.name,
                sites=source.cascade.sites,
                depth=self._depth,
                epsilon=source.epsilon,
                stage_ms={rows: tuple(max(LEAST_MS, one) for one in each) for rows, each in ms.items()},
                leave=source.leave,
            )
            found.append(route)
        return tuple(found)

    def _time(self, route: int, stage: int, image: Shaped[np.ndarray, "*input"], rows: int, rounds: int) -> float:
        """Run a stage, once to warm up; return the median milliseconds of further rounds."""
        jobs = tuple(Job(image=image, route=route, arrived=0.0, slot=slot % self.capacity) for slot in range(rows))
        times = []
        for _ in range(1 + rounds):
            start = time.perf_counter()
            self.dispatch(Step(route=route, stage=stage, bucket=rows, jobs=jobs))
            times.append((time.perf_counter() - start) * 1e3)
        return float(np.median(times[1:] or times))


@dataclasses.dataclass(frozen=True, eq=False)
class _Done:
    """A step that has run."""

    found: StageResult

    def result(self) -> StageResult:
        return self.found


def _tuned_ms(source: CascadeRoute) -> dict[int, tuple[float, ...]]:
    """Return every stage's milliseconds by bucket, from the tuning; empty if it was not measured with these caches."""
    tables = {t.size: t.costs for t in (source.tuning.tiles if source.tuning else ()) if t.costs is not None}
    names = {cache.name for cache in source.cascade.caches}
    if not tables or any(names - set(costs.lookup_ms) for costs in tables.values()):
        return {}
    by_size, between = {size: stages_ms(source.cascade, costs) for size, costs in tables.items()}, AnyBatch(())
    stages = range(len(source.cascade.sites) + 1)
    return {
        rows: tuple(between.milliseconds(rows, {size: ms[i] for size, ms in by_size.items()}) for i in stages)
        for rows in BUCKETS
    }
