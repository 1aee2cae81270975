"""The metrics of adaptation, read at each scrape."""

import dataclasses
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from .engine import STATES, AdaptiveEngine
from .worker import Worker

KINDS = ("alarm", "closed", "opened", "trial", "empirical", "refit", "swap")


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptiveGauges(Collector):
    """What is asked of adaptation when Prometheus asks."""

    adapting: AdaptiveEngine
    worker: Worker

    def collect(self) -> Iterator[Metric]:
        """Read it."""
        adapting, front = self.adapting, self.adapting.keeper.front
        now, watched = adapting.look(lambda keeper: (keeper.monitor.report, keeper.monitor.watched))
        state = adapting.state
        yield _gauge("state", "1 for the present state", "state", {one: float(one == state) for one in STATES})
        yield _gauge("version", "Of what is served", value=now.version)
        yield _gauge("q", "Share of hits that the base is asked about", value=now.q)
        bounds = {"estimate": now.estimate, "upper": now.upper}
        yield _gauge("disagreement", "Of the present version", "bound", bounds)
        yield _counter("watched", "Requests that the monitor has seen", value=watched)
        shadows = {str(exit_): float(count) for exit_, count in now.shadows.items()}
        yield _gauge("shadows", "Hits that were looked at", "exit", shadows)
        yield _gauge("seen", "Those that disagreed", value=now.disagreements)
        layers = {layer: float(adapting.answered_in_front[layer]) for layer in ("points", "repeats")}
        yield _counter("front", "Answered in front of the network", "layer", layers)
        yield _gauge("points", "Points that are stored", value=0 if front.points is None else len(front.points))
        events = {kind: float(adapting.events[kind]) for kind in KINDS}
        yield _counter("events", "What has happened", "kind", events)
        yield _counter("background_seconds", "That trials and refits have taken", value=self.worker.seconds)
        yield _counter("background_failures", "Pieces that failed", value=self.worker.failures)


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
