"""What Prometheus reads of adaptation at /metrics.

    gati_adaptation_state{model,state}               1 for the present one: open, part, safe or failed
    gati_adaptation_unsaved{model}                   1 while the state cannot be written, and trials pause
    gati_adaptation_version{model}                   of what is served; counts from 1
    gati_adaptation_q{model}                         share of hits that are shadowed
    gati_adaptation_disagreement{model,bound}        "estimate" and "upper", of the present version
    gati_adaptation_watched_total{model}             requests that the monitor has observed
    gati_adaptation_shadows{model,exit}              shadowed hits of the present version
    gati_adaptation_shadow_disagreements{model}      those that disagreed, lost ones included
    gati_adaptation_shadows_lost{model}              those whose base answer never came
    gati_adaptation_input_cache_total{model,layer}   answers of the input cache: "exact" and "nearest"
    gati_adaptation_nearest_entries{model}           entries of the nearest cache
    gati_adaptation_events_total{model,kind}         see ``EVENT_KINDS``; each is a line of the log, too
    gati_adaptation_recovery_seconds_total{model}    that trials and refits have taken
    gati_adaptation_recovery_failures_total{model}   pieces of them that failed

Values are read when Prometheus asks.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import TypeVar

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from gati_jax.adaptation import EVENT_KINDS

from .engine import LAYERS, STATES, AdaptiveEngine
from .worker import Worker

Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptiveGauges(Collector):
    """Adaptation's metrics, read when Prometheus asks."""

    models: dict[str, tuple[AdaptiveEngine, Worker]] = dataclasses.field(default_factory=dict)
    """Those that adapt."""

    def collect(self) -> Iterator[Metric]:
        """Read them: the series of each metric together, as the format wants it."""
        families: dict[str, Metric] = {}
        for model, (adapting, worker) in list(self.models.items()):
            for family in _read(adapting, worker):
                for sample in family.samples:
                    sample.labels["model"] = model
                if (known := families.setdefault(family.name, family)) is not family:
                    known.samples += family.samples
        yield from families.values()


def _read(adapting: AdaptiveEngine, worker: Worker) -> Iterator[Metric]:
    """Yield the metrics of one model."""
    state = adapting.state
    now, watched, counts = adapting.read(lambda c: (c.monitor.report, c.monitor.watched, c.event_counts.copy()))
    nearest = adapting.controller.input_cache.nearest
    yield _gauge("state", "1 for the present state", {one: float(one == state) for one in STATES}, "state")
    yield _gauge("unsaved", "1 while the state cannot be saved", float(adapting.saver.failing))
    yield _gauge("version", "Of what is served", now.version)
    yield _gauge("q", "Share of hits that are shadowed", now.q)
    bounds = {"estimate": now.estimate, "upper": now.upper}
    yield _gauge("disagreement", "Of the present version", bounds, "bound")
    yield _counter("watched", "Requests that the monitor has observed", watched)
    shadows = {str(exit_): float(count) for exit_, count in now.shadows.items()}
    yield _gauge("shadows", "Shadowed hits of the present version", shadows, "exit")
    yield _gauge("shadow_disagreements", "Shadowed hits that disagreed", now.disagreements)
    yield _gauge("shadows_lost", "Shadowed hits whose base answer never came", now.lost)
    layers = {layer: float(adapting.cache_answers[layer]) for layer in LAYERS.values()}
    yield _counter("input_cache", "Answers of the input cache", layers, "layer")
    yield _gauge("nearest_entries", "Entries of the nearest cache", 0 if nearest is None else len(nearest))
    yield _counter("events", "Events of adaptation", {kind: float(counts[kind]) for kind in EVENT_KINDS}, "kind")
    yield _counter("recovery_seconds", "That trials and refits have taken", worker.throttle.worked)
    yield _counter("recovery_failures", "Pieces of recovery that failed", worker.failures)


def _family(kind: type[Family], name: str, text: str, values: float | dict[str, float], label: str = "") -> Family:
    family = kind(f"gati_adaptation_{name}", text, labels=[label] if label else [])
    for labels, value in [((), values)] if not isinstance(values, dict) else [((k,), v) for k, v in values.items()]:
        family.add_metric(labels, value)
    return family


_gauge = functools.partial(_family, GaugeMetricFamily)
_counter = functools.partial(_family, CounterMetricFamily)
