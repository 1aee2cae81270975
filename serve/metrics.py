"""The metrics at /metrics, in Prometheus' format; adaptation adds its own (``serve.adaptive.gauges``).

    gati_requests_total{protocol,method,code}   requests by their HTTP status (gRPC's are translated)
    gati_request_duration_seconds{protocol,method}
                                                histogram: from a request's headers to the last byte of its answer
    gati_requests_in_flight{protocol}           requests that are not answered yet
    gati_latency_seconds{model,plan,exit}             histogram: from an image's arrival to its answer
    gati_step_seconds{model,plan,stage,bucket}        histogram: from a step's dispatch to its result
    gati_batch_occupancy{model,stage,bucket}          histogram: the share of a step's rows that are requests
    gati_left_total{model,plan,exit}                  images by exit: hits of a site, or answers of the base
    gati_page_images_total{model}                     images of the page's box, which these three leave out
    gati_failed_steps_total{model,plan,stage}         steps whose requests got an error
    gati_refused_total{reason}                  requests by ``REASONS``; deadline counts images
    gati_queue_depth{model,plan,stage}                images that wait
    gati_slots{model,state}                           places for images in the engine: used, and admitted at most
    gati_backlog_seconds{model}                 expected work for the images in flight
    gati_largest_batch{model}                   rows of the largest batch that is compiled so far
    gati_queue_age_seconds{model}               age of the image that is due first, of the queue where that is oldest
    gati_promised_disagreement{model,plan}      at most; plans without a promise are left out
    gati_ready                                  1 while the server takes requests
    gati_bundle_info{model,version}             1: a served bundle
    gati_model_ready{model}                     1 for each model of the command line that answers
    gati_log_lines_left_out_total{reason}       lines of the log: stalled (its reader), repeated (warnings)

The process has the metrics that Prometheus' clients share, process_cpu_seconds_total and the like, on Linux.

Observations come from the engine's thread; gauges are read at each scrape.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from . import logs
from .engine.records import Answer, Job, Route, Step
from .protocol import messages
from .protocol.model import Tally
from .protocol.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DOOR = ("memory", "late", "head", "slow", "connections", "descriptors")
"""Why the door refuses, besides: bytes of bodies, a deadline that cannot be met; connections and requests' heads."""
REASONS = ("overloaded", "stopping", "too_large", "deadline", "unknown_path", *messages.REASONS.values(), *DOOR)
"""Why requests are refused: four by the engine (too_large are more images than it ever admits), others before it."""
_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


class Metrics:
    """Counts requests; ``of`` observes the engine of a model."""

    def __init__(self) -> None:
        """Start at zero, in a registry of its own."""
        self.started = time.time()
        """Seconds since 1970."""
        self.registry = CollectorRegistry()
        counter = functools.partial(Counter, registry=self.registry)
        seconds = functools.partial(Histogram, registry=self.registry, buckets=_SECONDS)
        shares = functools.partial(Histogram, registry=self.registry, buckets=_SHARES)
        self._requests = counter("gati_requests", "Requests", ("protocol", "method", "code"))
        self._in_flight = Gauge("gati_requests_in_flight", "Unanswered", ("protocol",), registry=self.registry)
        self._duration = Histogram(
            "gati_request_duration_seconds",
            "From headers to answer",
            ("protocol", "method"),
            registry=self.registry,
            buckets=(*_SECONDS, 8.0, 16.0, 32.0, 64.0),
        )
        self.latency = seconds("gati_latency_seconds", "From arrival to answer", ("model", "plan", "exit"))
        self.steps = seconds("gati_step_seconds", "From dispatch to result", ("model", "plan", "stage", "bucket"))
        self.occupancy = shares("gati_batch_occupancy", "Share of rows in use", ("model", "stage", "bucket"))
        self.left = counter("gati_left", "Images by exit", ("model", "plan", "exit"))
        self.by_page = counter("gati_page_images", "Answers to the box of the page", ("model",))
        self.failed = counter("gati_failed_steps", "Failed steps", ("model", "plan", "stage"))
        self._refused = counter("gati_refused", "Refusals", ("reason",))
        for reason in REASONS:
            self._refused.labels(reason)
        ProcessCollector(registry=self.registry)

    def watch(self, service: Service) -> None:
        """Report the gauges of a service's models."""
        self.registry.register(Gauges(service))

    def of(self, model: str, routes: Sequence[Route], tally: Tally) -> "EngineMetrics":
        """Return what observes an engine of a model."""
        return EngineMetrics(self, model, routes, tally)

    def in_flight(self, protocol: str) -> Gauge:
        """Return the number of a protocol's requests that are not answered yet."""
        return self._in_flight.labels(protocol)

    def request(self, protocol: str, method: str, code: int, seconds: float) -> None:
        """Count a request, and the seconds from its headers to the last byte of its answer."""
        requests, duration = self._of_request(protocol, method, code)
        requests.inc()
        duration.observe(seconds)

    def refused(self, reason: str) -> None:
        """Count a refusal."""
        self._refused.labels(reason).inc()

    def page(self, media_type: str = CONTENT_TYPE) -> bytes:
        """Return all metrics, in one of the formats of ``negotiate``."""
        return (generate_latest if media_type == CONTENT_TYPE else openmetrics.generate_latest)(self.registry)

    # Finding a series by its labels takes longer than counting, and there are few.

    @functools.cache  # noqa: B019 (lives as long as the server)
    def _of_request(self, protocol: str, method: str, code: int) -> tuple[Counter, Histogram]:
        return self._requests.labels(protocol, method, code), self._duration.labels(protocol, method)


class EngineMetrics:
    """Observes the engine of one model; the protocol's statistics learn of its steps from here."""

    def __init__(self, metrics: Metrics, model: str, routes: Sequence[Route], tally: Tally) -> None:
        """Begin; series exist from the start, so that rates are defined."""
        self._metrics, self._model, self._routes, self._tally = metrics, model, tuple(routes), tally
        self._by_page = metrics.by_page.labels(model)
        for route in self._routes:
            for stage, exit_ in enumerate(route.exits):
                self._of_exit(route.name, exit_)
                metrics.failed.labels(model, route.name, stage)

    def step(self, step: Step, seconds: float, *, failed: bool) -> None:
        """Count a step, see ``Observer``."""
        self._tally.step(step, seconds)
        if failed:
            self._metrics.failed.labels(self._model, self._routes[step.route].name, step.stage).inc()
        time, occupancy = self._of_step(step.route, step.stage, step.bucket)
        time.observe(seconds)
        occupancy.observe(len(step.jobs) / step.bucket)

    def answered(self, job: Job, answer: Answer, seconds: float) -> None:
        """Count an answer, see ``Observer``."""
        if not job.is_traffic:
            self._by_page.inc()
            return
        latency, left = self._of_exit(self._routes[job.route].name, answer.exit)
        latency.observe(seconds)
        left.inc()

    def shadowed(self, job: Job, answer: Answer | None) -> None:
        """Count nothing: no client waits for a shadow job."""

    def refused(self, reason: str) -> None:
        """Count a refusal, see ``Observer``."""
        self._metrics.refused(reason)

    # As above: series are found once.

    @functools.cache  # noqa: B019 (lives as long as its engine)
    def _of_step(self, route: int, stage: int, bucket: int) -> tuple[Histogram, Histogram]:
        metrics, model = self._metrics, self._model
        steps = metrics.steps.labels(model, self._routes[route].name, stage, bucket)
        return steps, metrics.occupancy.labels(model, stage, bucket)

    @functools.cache  # noqa: B019
    def _of_exit(self, plan: str, exit_: int) -> tuple[Histogram, Counter]:
        metrics, model = self._metrics, self._model
        return metrics.latency.labels(model, plan, exit_), metrics.left.labels(model, plan, exit_)


def negotiate(accept: str) -> str:
    """Return the media type of the metrics for a client's Accept header: OpenMetrics for those who ask for it.

    The client library's own negotiation raises on versions that are no numbers, and echoes those that are.
    """
    offers = {offer.partition(";")[0].strip().lower() for offer in accept.split(",")}
    return openmetrics.CONTENT_TYPE_LATEST if "application/openmetrics-text" in offers else CONTENT_TYPE


@dataclasses.dataclass(frozen=True, eq=False)
class Gauges(Collector):
    """The state of a service's engines, read at each scrape."""

    service: Service

    def collect(self) -> Iterator[Metric]:
        """Return the gauges."""
        depth = GaugeMetricFamily("gati_queue_depth", "Images that wait", labels=("model", "plan", "stage"))
        slots = GaugeMetricFamily("gati_slots", "Places for images", labels=("model", "state"))
        backlog = GaugeMetricFamily("gati_backlog_seconds", "Work for the images in flight", labels=("model",))
        largest = GaugeMetricFamily("gati_largest_batch", "Rows of the largest batch so far", labels=("model",))
        age = GaugeMetricFamily("gati_queue_age_seconds", "Age of what is due first", labels=("model",))
        promised = GaugeMetricFamily("gati_promised_disagreement", "At most", labels=("model", "plan"))
        bundles = InfoMetricFamily("gati_bundle", "A served bundle", labels=("model",))
        ready = GaugeMetricFamily("gati_model_ready", "1 if the model answers", labels=("model",))
        for entry in self.service.models.entries.values():
            loaded, backend = entry.loaded, entry.backend  # another thread may unload it
            ready.add_metric((entry.name,), float(entry.running))
            if loaded is not None:
                bundles.add_metric((entry.name,), {"version": loaded.model.version})
            if loaded is None or backend is None:
                continue
            now = backend.engine.statistics()
            for number, plan in enumerate(loaded.model.plans):
                for stage in range(len(now.leave[number])):
                    depth.add_metric((entry.name, plan, str(stage)), now.waiting.get((number, stage), 0))
            slots.add_metric((entry.name, "used"), now.slots_in_use)
            slots.add_metric((entry.name, "admitted"), now.admitted)
            backlog.add_metric((entry.name,), now.backlog_ms / 1e3)
            age.add_metric((entry.name,), now.oldest)
            largest.add_metric((entry.name,), max(now.batches, default=0))
            for plan, bound in loaded.model.bounds.items():
                promised.add_metric((entry.name, plan), bound.epsilon)
        yield from (depth, slots, backlog, age, largest, promised, bundles, ready)
        yield GaugeMetricFamily("gati_ready", "1 while the server takes requests", value=float(self.service.ready))
        lines = CounterMetricFamily("gati_log_lines_left_out", "Lines that were not written", labels=("reason",))
        for reason, count in logs.left_out().items():
            lines.add_metric((reason,), count)
        yield lines
