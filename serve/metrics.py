"""What Prometheus reads at /metrics.

    gati_requests_total{protocol,method,code}   requests by their HTTP status (gRPC's are translated)
    gati_latency_seconds{plan,exit}             histogram: from an image's arrival to its answer, by the exit it left at
    gati_step_seconds{plan,stage,bucket}        histogram: from a step's dispatch to its result
    gati_batch_occupancy{stage,bucket}          histogram: the share of a step's rows that are requests
    gati_left_total{plan,exit}                  images by exit: hits of a site, or answers of the base
    gati_failed_steps_total{plan,stage}         steps whose requests got an error
    gati_refused_total{reason}                  overloaded or stopping (requests), deadline (images)
    gati_queue_depth{plan,stage}                images that wait, now
    gati_slots{state}                           places for images in the engine: used, and admitted at most
    gati_backlog_seconds                        the work that waits
    gati_ready                                  1 while requests should come here
    gati_bundle_info{model,version}             1: the bundle that is served

Observations come from the engine's thread, and gauges are read when Prometheus asks.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from gati_jax.adaptation import EVENT_KINDS
from serve.adaptive.engine import LAYERS, STATES, AdaptiveEngine
from serve.adaptive.worker import Worker
from serve.engine.records import Answer, Job, Route, Statistics, Step
from serve.protocol.model import Tally

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


class Metrics:
    """The engine's observer."""

    def __init__(self, tally: Tally) -> None:
        """Start from nothing, in a registry of its own."""
        self.registry = CollectorRegistry()
        self._tally = tally
        self._routes: tuple[Route, ...] = ()
        counter = functools.partial(Counter, registry=self.registry)
        seconds = functools.partial(Histogram, registry=self.registry, buckets=_SECONDS)
        shares = functools.partial(Histogram, registry=self.registry, buckets=_SHARES)
        self._requests = counter("gati_requests", "Requests", ("protocol", "method", "code"))
        self._latency = seconds("gati_latency_seconds", "From arrival to answer", ("plan", "exit"))
        self._steps = seconds("gati_step_seconds", "From dispatch to result", ("plan", "stage", "bucket"))
        self._occupancy = shares("gati_batch_occupancy", "Share of rows in use", ("stage", "bucket"))
        self._left = counter("gati_left", "Images by exit", ("plan", "exit"))
        self._failed = counter("gati_failed_steps", "Failed steps", ("plan", "stage"))
        self._refused = counter("gati_refused", "What was not answered", ("reason",))
        for reason in ("overloaded", "stopping", "deadline"):
            self._refused.labels(reason)

    def watch(self, gauges: "Gauges") -> None:
        """Report an engine with these routes, before it starts."""
        self._routes = tuple(gauges.routes)
        for route in self._routes:  # series that are there before anything happens, so that rates have a start
            for stage, exit_ in enumerate(route.exits):
                self._of_exit(route.name, exit_)
                self._failed.labels(route.name, stage)
        self.registry.register(gauges)

    def request(self, protocol: str, method: str, code: int) -> None:
        """Count a request."""
        self._of_request(protocol, method, code).inc()

    def step(self, step: Step, seconds: float, *, failed: bool) -> None:
        """Hear of a step."""
        self._tally.step(step, seconds)
        if failed:
            self._failed.labels(self._routes[step.route].name, step.stage).inc()
        time, occupancy = self._of_step(step.route, step.stage, step.bucket)
        time.observe(seconds)
        occupancy.observe(len(step.jobs) / step.bucket)

    def answered(self, job: Job, answer: Answer, seconds: float) -> None:
        """Hear of an answer."""
        latency, left = self._of_exit(self._routes[job.route].name, answer.exit)
        latency.observe(seconds)
        left.inc()

    def shadowed(self, job: Job, answer: Answer | None) -> None:
        """Hear of a ghost: no client has waited for it, so nothing is counted."""

    def refused(self, reason: str) -> None:
        """Hear of a refusal."""
        self._refused.labels(reason).inc()

    def page(self) -> bytes:
        """Return everything as Prometheus reads it."""
        return generate_latest(self.registry)

    # Finding a series by its labels takes longer than counting; there are few.

    @functools.cache  # noqa: B019 (lives as long as the server)
    def _of_request(self, protocol: str, method: str, code: int) -> Counter:
        return self._requests.labels(protocol, method, code)

    @functools.cache  # noqa: B019
    def _of_step(self, route: int, stage: int, bucket: int) -> tuple[Histogram, Histogram]:
        return self._steps.labels(self._routes[route].name, stage, bucket), self._occupancy.labels(stage, bucket)

    @functools.cache  # noqa: B019
    def _of_exit(self, plan: str, exit_: int) -> tuple[Histogram, Counter]:
        return self._latency.labels(plan, exit_), self._left.labels(plan, exit_)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Gauges(Collector):
    """What is asked of an engine when Prometheus asks."""

    routes: Sequence[Route]
    statistics: Callable[[], Statistics]
    ready: Callable[[], bool]
    model: str
    version: str

    def collect(self) -> Iterator[GaugeMetricFamily | InfoMetricFamily]:
        """Read them."""
        now = self.statistics()
        depth = GaugeMetricFamily("gati_queue_depth", "Images that wait", labels=("plan", "stage"))
        for number, route in enumerate(self.routes):
            for stage in range(len(route.exits)):
                depth.add_metric((route.name, str(stage)), now.waiting.get((number, stage), 0))
        slots = GaugeMetricFamily("gati_slots", "Places for images", labels=("state",))
        slots.add_metric(("used",), now.slots_in_use)
        slots.add_metric(("admitted",), now.admitted)
        yield depth
        yield slots
        yield GaugeMetricFamily("gati_backlog_seconds", "Work that waits", value=now.backlog_ms / 1e3)
        yield GaugeMetricFamily("gati_ready", "1 while requests should come here", value=float(self.ready()))
        yield InfoMetricFamily(
            "gati_bundle", "The bundle that is served", value={"model": self.model, "version": self.version}
        )


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptiveGauges(Collector):
    """What is asked of adaptation when Prometheus asks.

    gati_adaptation_state{state}                1 for the present one: open, part, safe or failed
    gati_adaptation_version                     of what is served; counts from 1
    gati_adaptation_q                           share of hits that are shadowed
    gati_adaptation_disagreement{bound}         "estimate" and "upper", of the present version
    gati_adaptation_watched_total               requests that the monitor has observed
    gati_adaptation_shadows{exit}               shadowed hits of the present version
    gati_adaptation_shadow_disagreements        those that disagreed
    gati_adaptation_input_cache_total{layer}    answers of the input cache: "exact" and "nearest"
    gati_adaptation_nearest_entries             entries of the nearest cache
    gati_adaptation_events_total{kind}          see ``EVENT_KINDS``; each is a line of the log, too
    gati_adaptation_recovery_seconds_total      that trials and refits have taken
    gati_adaptation_recovery_failures_total     pieces of them that failed
    """

    adapting: AdaptiveEngine
    worker: Worker

    def collect(self) -> Iterator[Metric]:
        """Read it."""
        adapting, state = self.adapting, self.adapting.state
        now, watched, counts = adapting.read(lambda c: (c.monitor.report, c.monitor.watched, c.event_counts.copy()))
        nearest = adapting.controller.input_cache.nearest
        yield _gauge("state", "1 for the present state", "state", {one: float(one == state) for one in STATES})
        yield _gauge("version", "Of what is served", value=now.version)
        yield _gauge("q", "Share of hits that are shadowed", value=now.q)
        bounds = {"estimate": now.estimate, "upper": now.upper}
        yield _gauge("disagreement", "Of the present version", "bound", bounds)
        yield _counter("watched", "Requests that the monitor has observed", value=watched)
        shadows = {str(exit_): float(count) for exit_, count in now.shadows.items()}
        yield _gauge("shadows", "Shadowed hits of the present version", "exit", shadows)
        yield _gauge("shadow_disagreements", "Shadowed hits that disagreed", value=now.disagreements)
        layers = {layer: float(adapting.cache_answers[layer]) for layer in LAYERS.values()}
        yield _counter("input_cache", "Answers of the input cache", "layer", layers)
        yield _gauge("nearest_entries", "Entries of the nearest cache", value=0 if nearest is None else len(nearest))
        yield _counter("events", "Events of adaptation", "kind", {kind: float(counts[kind]) for kind in EVENT_KINDS})
        yield _counter("recovery_seconds", "That trials and refits have taken", value=self.worker.seconds)
        yield _counter("recovery_failures", "Pieces of recovery that failed", value=self.worker.failures)


def _gauge(
    name: str, text: str, label: str = "", values: dict[str, float] | None = None, *, value: float | None = None
) -> Metric:
    return _filled(GaugeMetricFamily(f"gati_adaptation_{name}", text, labels=[label] if label else []), values, value)


def _counter(
    name: str, text: str, label: str = "", values: dict[str, float] | None = None, *, value: float | None = None
) -> Metric:
    return _filled(CounterMetricFamily(f"gati_adaptation_{name}", text, labels=[label] if label else []), values, value)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, values: dict[str, float] | None, value: float | None
) -> Metric:
    if value is not None:
        family.add_metric([], value)
    for label, number in (values or {}).items():
        family.add_metric([label], number)
    return family
