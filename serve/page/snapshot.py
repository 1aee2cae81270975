"""What the page shows: facts of the server, which stay, and a snapshot of the counters of /metrics."""

import collections
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict

from gati_jax import __version__

from ..engine.records import Answer
from ..metrics import Metrics
from ..protocol.backend import Event
from ..protocol.model import Model
from ..protocol.repository import Entry
from ..protocol.service import Compared, Service, softmax

_TOP = 5  # classes that are shown
_LEVELS = 255
_FEWEST_LEVELS, _MOST_LEVELS = 1.5, 100  # where a scale says how many there are


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="null")


class PlanFacts(_Shown):
    """A plan that may answer."""

    name: str
    epsilon: float | None
    """What it promises: at most this share of its answers is not the base's; None: nothing."""
    delta: float | None
    sites: tuple[int, ...]


class Facts(_Shown):
    """The event "about"."""

    model: str
    version: str
    release: str
    numerics: str
    input_name: str
    input_shape: tuple[int, ...]
    datatypes: tuple[str, ...]
    levels: int
    """The largest value of a pixel: of 8x8 digits it is 16."""
    most_bytes: int
    """Of a request."""
    classes: int
    depth: int
    """Blocks of the base; 0 while the server warms up."""
    plans: tuple[PlanFacts, ...]
    default: str
    """The plan that answers where a request asks for none."""


class Latency(_Shown):
    """Of images, from arrival to answer: a histogram, cumulative."""

    le: tuple[float, ...]
    """Seconds; the last one, infinity, is null."""
    counts: tuple[int, ...]


class Adaptation(_Shown):
    """See ``serve.adaptive.gauges``."""

    state: str
    version: int
    q: float
    estimate: float
    upper: float
    watched: int
    shadows: int
    disagreements: int
    lost: int
    unsaved: bool
    input_cache: dict[str, int]
    events: dict[str, int]
    latest: list[Event]


class Snapshot(_Shown):
    """The event "now"; the names are those of /metrics, without their prefix. Counters count from the start."""

    at: float
    """Seconds since 1970."""
    started: float
    """The same, of the process: a later one's counters begin at 0."""
    model: str
    models: dict[str, str]
    """All that the server has, and the state of each: READY, LOADING or UNAVAILABLE."""
    reason: str
    """Why the model could not be loaded, or not be replaced by what its folder has now; mostly empty."""
    ready: bool
    stopping: bool
    left: dict[str, int]
    """Images by exit, of all plans; those of the page's box are not among them."""
    by_plan: dict[str, int]
    latency: Latency
    refused: dict[str, int]
    """By reason; reasons without any are left out."""
    failed_steps: int
    steps: int
    queue_depth: dict[str, int]
    """Images that wait, by stage, of all plans."""
    queue_age_seconds: float
    used: int
    admitted: int
    adaptation: Adaptation | None


class _Sample(NamedTuple):
    labels: dict[str, str]
    value: float


class Samples:
    """The values of a registry at one moment: those of a model, and those of the server."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        """Read them."""
        self._found: dict[str, list[_Sample]] = collections.defaultdict(list)
        for family in registry.collect():
            for sample in family.samples:
                if sample.labels.get("model", model) == model:
                    self._found[sample.name].append(_Sample(sample.labels, sample.value))

    def __contains__(self, name: str) -> bool:
        """Whether there is such a metric."""
        return name in self._found

    def total(self, name: str, **where: str) -> float:
        """Return the sum over all series that have these labels."""
        return sum((sample.value for sample in self._of(name, where)), 0.0)

    def count(self, name: str, **where: str) -> int:
        """Return the same of what is counted."""
        return round(self.total(name, **where))

    def by(self, name: str, label: str) -> dict[str, int]:
        """Return sums by the values of a label."""
        sums: collections.Counter[str] = collections.Counter()
        for sample in self._of(name, {}):
            sums[sample.labels[label]] += round(sample.value)
        return dict(sums)

    def state(self, name: str, label: str) -> str:
        """Return the label's value of the series that is 1."""
        return next((sample.labels[label] for sample in self._of(name, {}) if sample.value), "")

    def _of(self, name: str, where: dict[str, str]) -> Iterator[_Sample]:
        return (sample for sample in self._found.get(name, ()) if where.items() <= sample.labels.items())


def read(metrics: Metrics, service: Service, entry: Entry) -> Snapshot:
    """Return a snapshot of the metrics of a model."""
    got, backend = Samples(metrics.registry, entry.name), entry.backend
    buckets = sorted((float(le), count) for le, count in got.by("gati_latency_seconds_bucket", "le").items())
    return Snapshot(
        at=time.time(),
        started=metrics.started,
        model=entry.name,
        models={one.name: one.state for one in service.models.entries.values()},
        reason=entry.reason,
        ready=entry.running and not service.draining,
        stopping=service.draining,
        left=got.by("gati_left_total", "exit"),
        by_plan=got.by("gati_left_total", "plan"),
        latency=Latency(
            le=tuple(le for le, _ in buckets),
            counts=tuple(count for _, count in buckets),
        ),
        refused={reason: n for reason, n in got.by("gati_refused_total", "reason").items() if n},
        failed_steps=got.count("gati_failed_steps_total"),
        steps=got.count("gati_step_seconds_count"),
        queue_depth=got.by("gati_queue_depth", "stage"),
        queue_age_seconds=got.total("gati_queue_age_seconds"),
        used=got.count("gati_slots", state="used"),
        admitted=got.count("gati_slots", state="admitted"),
        adaptation=_adaptation(got, () if backend is None else backend.events()),
    )


def _adaptation(got: Samples, events: Sequence[Event]) -> Adaptation | None:
    if "gati_adaptation_version" not in got:
        return None
    return Adaptation(
        state=got.state("gati_adaptation_state", "state"),
        version=got.count("gati_adaptation_version"),
        q=got.total("gati_adaptation_q"),
        estimate=got.total("gati_adaptation_disagreement", bound="estimate"),
        upper=got.total("gati_adaptation_disagreement", bound="upper"),
        watched=got.count("gati_adaptation_watched_total"),
        shadows=got.count("gati_adaptation_shadows"),
        disagreements=got.count("gati_adaptation_shadow_disagreements"),
        lost=got.count("gati_adaptation_shadows_lost"),
        unsaved=bool(got.total("gati_adaptation_unsaved")),
        input_cache=got.by("gati_adaptation_input_cache_total", "layer"),
        events=got.by("gati_adaptation_events_total", "kind"),
        latest=list(events),
    )


def describe(entry: Entry, *, most_bytes: int) -> Facts:
    """Return the facts of a model that is loaded, of a server that takes requests of so many bytes."""
    model, backend = entry.model, entry.backend
    routes = () if backend is None else backend.routes()
    sites = {route.name: route.sites for route in routes}
    bounds = [model.bounds.get(plan) for plan in model.plans]
    return Facts(
        model=model.name,
        version=model.version,
        release=__version__,
        numerics=model.numerics,
        input_name=model.input_name,
        input_shape=model.input_shape,
        datatypes=model.datatypes,
        levels=_levels(model),
        most_bytes=most_bytes,
        classes=model.classes,
        depth=max((route.depth for route in routes), default=0),
        plans=tuple(
            PlanFacts(
                name=plan,
                epsilon=bound.epsilon if bound else None,
                delta=bound.delta if bound else None,
                sites=sites.get(plan, ()),
            )
            for plan, bound in zip(model.plans, bounds, strict=True)
        ),
        default="" if backend is None else model.plans[backend.choose_route(None, None)],
    )


def _levels(model: Model) -> int:
    """Return the value of a white pixel, which no bundle says.

    Networks take pixels times the normalisation's scale, from 0 to 1: a scale of 1/16 is that of 8x8 digits. But with
    1/127.5 and a mean of 1 they take pixels of 255 from -1 to 1, and with 1 the pixels themselves.
    """
    scale = (model.normalization or {}).get("scale")
    white = 1 / scale if isinstance(scale, float) and scale > 0 else 1.0
    return round(white) if _FEWEST_LEVELS < white < _MOST_LEVELS else _LEVELS


class LookupFacts(_Shown):
    """A cache that the input passed."""

    exit: int
    score: float
    threshold: float
    left: bool


class AnswerFacts(_Shown):
    """An answer, and its most probable classes: number, name, probability."""

    exit: int
    score: float
    top: tuple[tuple[int, str, float], ...]


class ComparedFacts(_Shown):
    """What the page shows of an input."""

    plan: str
    epsilon: float | None
    delta: float | None
    notes: dict[str, str]
    lookups: tuple[LookupFacts, ...]
    answer: AnswerFacts
    base: AnswerFacts
    agrees: bool
    milliseconds: float


def compared(found: Compared, model: Model, milliseconds: float) -> ComparedFacts:
    """Describe an input's answer, its way there, and the base's answer."""
    plan, (_, notes, answer, base) = model.plans[found.route], found
    bound = model.bounds.get(plan)
    return ComparedFacts(
        plan=plan,
        epsilon=bound.epsilon if bound else None,
        delta=bound.delta if bound else None,
        notes=dict(notes),
        lookups=tuple(
            LookupFacts(exit=exit_, score=score, threshold=threshold, left=exit_ == answer.exit)
            for exit_, score, threshold in answer.lookups
        ),
        answer=_answer(answer, model),
        base=_answer(base, model),
        agrees=answer.class_index == base.class_index,
        milliseconds=milliseconds,
    )


def _answer(answer: Answer, model: Model) -> AnswerFacts:
    names = model.class_names
    shares = softmax(answer.logits[None])[0]
    others = [index for index in (-shares).argsort(kind="stable").tolist() if index != answer.class_index]
    return AnswerFacts(
        exit=answer.exit,
        score=answer.score,
        top=tuple(
            (index, names[index] if names else str(index), float(shares[index]))
            for index in (answer.class_index, *others[: _TOP - 1])
        ),
    )
