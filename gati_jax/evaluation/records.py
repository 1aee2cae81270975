"""The records of an evaluation, and their text."""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from gati_jax.certification import AccuracyGap
from gati_jax.certification.certificate import BAD_GROUPS, GROUP_MEAN, SEQUENTIAL
from gati_jax.display import html_table, percent
from gati_jax.errors import text_table
from gati_jax.profiling import Backend, device_name
from gati_jax.profiling.speed import FullNetwork

_SLOW = 1.3
NOT_BY_REQUEST = {GROUP_MEAN, BAD_GROUPS, SEQUENTIAL}
"""Methods whose bound is not of single requests, drawn at random; they have none for the accuracy."""
_FULL = {
    "reference": "XLA's reference programs",
    "tuned": "tuned like the cascade",
    "xla": "the best of XLA's programs",
    "onnxruntime": "ONNX Runtime",
}


class Record(BaseModel):
    """Part of a result; made from an object with the same attributes, or from keywords. A file may have more keys."""

    model_config = ConfigDict(frozen=True, extra="ignore", from_attributes=True)

    def as_json(self) -> dict[str, object]:
        """Return it as JSON has it."""
        return self.model_dump(mode="json")


R = TypeVar("R", bound=Record)


def record_of(kind: type[R], source: object, **more: Any) -> R:  # noqa: ANN401 (fields of the record)
    """Return a record of what an object has under the same names, and of further fields."""
    own = {name: getattr(source, name) for name in kind.model_fields if hasattr(source, name)}
    return kind.model_validate(own | more)


class CertificateResult(Record):
    """What was certified, see ``gati_jax.certification.Certificate``."""

    name: str = "default"
    epsilon: float
    delta: float
    n: int
    certified: bool
    disagreements: int
    method: str = ""
    numerics: str = "reference"
    looks: int
    promise: str = ""
    """What is certified, in a sentence without its confidence."""
    basis: str = ""
    """What the confidence rests on: which look it is, or the user's word that there is no other."""
    p_value: float | None = None
    """How likely so few disagreements would be if a larger share of requests than epsilon disagreed, at most."""
    level: float | None = None
    """What that was compared with: delta, shared among plans and looks."""
    plans: int = 1
    base_saw_data: bool = False
    accuracy_gap: AccuracyGap | None = None


class EvaluatedCertificate(CertificateResult):
    """The certificate beside what these images show."""

    holds: bool
    """Whether these answers disagree no more often than is promised of the arithmetic that gave them, see
    ``Evaluation.served``; False, too, where nothing is."""


class ServedResult(Record):
    """What holds of the answers that a bundle gives by default on this device, see ``Bundle.bound_of``."""

    numerics: str
    epsilon: float | None
    delta: float
    text: str


class BaseQuality(Record):
    """The base on these images; None without labels."""

    accuracy: float | None


class CascadeQuality(BaseQuality):
    """The cascade on these images."""

    agreement: float  # with the base


class Exit(Record):
    """The requests that leave at one site, or at the base."""

    exit: int
    hits: int
    hit_rate: float
    agreement: float | None  # None where no request leaves
    interval: tuple[float, float] | None = None
    """Clopper and Pearson's for the agreement, with confidence 95 %."""


class Measured(Record):
    """One way of answering, timed beside the full network. Milliseconds are of a batch."""

    device: str = Field(default_factory=device_name)
    driver: Literal["while_loop", "tiles", "spans"]
    backend: Backend = "xla"
    numerics: Literal["reference", "fast"]
    dtype: str
    batch: int
    requests: int
    full: FullNetwork  # the fastest here, and so the one that is compared with
    reference_ms: float | None = None  # of the full network by the reference programs
    full_ms: float
    cascade_ms: float
    speedup: float
    ideal: float
    conversion: float
    spread: float
    interval: tuple[float, float] | None = None
    """Of the speed-up, with confidence 95 %: the bootstrap's over requests and rounds."""
    typical: float | None = None
    """The speed-up by the medians of runs of a kind, see ``gati_jax.profiling.speed.Speed``."""
    lookup_share: float | None = None  # of the cascade's time; None where lookups have not been measured on this device
    predicted_ms: float | None = None  # by the costs of the tuned tiles
    tiles: tuple[int, ...] | None = None
    costs_spread: float | None = None
    full_each_ms: tuple[float, ...] = ()
    """Every run of the full network: all rounds of the first request (of the first batch), of the second, and so on."""
    cascade_each_ms: tuple[float, ...] = ()
    """The cascade's, in the same order."""


class Cost(Record):
    """What the exits save: ideally, by the measured time up to each exit, and really, on the timed requests."""

    blocks_mean: float
    saved_share: float
    ideal_speedup: float
    measured: tuple[Measured, ...]
    """What answers by default: one request at a time, and in batches of several sizes where it has been tuned."""


class Memory(Record):
    """Parameters, in bytes."""

    base_bytes: int
    cache_bytes: int


class Oracle(Record):
    """Every request leaves at the bundle's first cache that agrees with the base.

    It never disagrees, so a plan that may can save more.
    """

    saved_share: float
    ms: float | None = None
    """By the same costs as ``Evaluation.path``."""


class PlacedCache(Record):
    """A cache that is on."""

    name: str
    site: int
    threshold: float
    bytes: int
    lookup_ms: float | None = None


class Layout(Record):
    """The network and its caches, with the costs that the bundle holds for the device nearest to this one."""

    blocks: int
    blocks_ms: tuple[float, ...] = ()
    """By block; empty where the bundle holds no costs."""
    device: str = ""
    unsteady: str = ""
    """Why these times cannot be relied on; empty if they can."""
    batch: int = 1
    caches: tuple[PlacedCache, ...]


class PathPoint(Record):
    """A step of the plan's path of thresholds, replayed on these images."""

    step: int
    ms: float
    """Of a request in the mean, by the bundle's costs."""
    agreement: float
    accuracy: float | None = None
    certified: bool = False
    """Whether it is the step that answers; step 0 is the base alone."""


class ClassResult(Record):
    """The requests that the base answers with one class."""

    index: int
    name: str
    n: int
    exits: tuple[int, ...]
    """Requests by exit, in the order of ``Evaluation.exits``."""
    disagreements: int


class Confusion(Record):
    """Requests that the base answers with one class and the cascade with another."""

    base: str
    cascade: str
    n: int


class Sample(Record):
    """A request, to show as an example."""

    row: int
    """Its number among the images, from 0 on."""
    exit: int
    score: float | None = None
    """Of the cache that answered: log-odds of agreeing with the base."""
    base: str
    cascade: str
    label: str | None = None
    agrees: bool


class Evaluation(Record):
    """What ``evaluate`` finds."""

    n: int
    base: BaseQuality
    cascade: CascadeQuality
    certificate: EvaluatedCertificate
    served: ServedResult | None = None
    exits: tuple[Exit, ...]
    cost: Cost | None
    """None where nothing was timed."""
    memory: Memory
    oracle: Oracle | None
    layout: Layout | None = None
    path: tuple[PathPoint, ...] = ()
    """Some steps in the order of the path; empty where the bundle holds no costs."""
    classes: tuple[ClassResult, ...] = ()
    """Those that the base gives to any request, by falling number."""
    confusions: tuple[Confusion, ...] = ()
    """By falling number, the first few."""
    samples: tuple[Sample, ...] = ()
    """Some of every exit, and some that disagree."""

    def summary(self, title: str = "Exits") -> str:
        """Return it as text, in lines of at most 160 characters or so."""
        parts = [text_table(title, *self._exit_table())]
        first = self.cost.measured[0] if self.cost else None
        if first and (slow := first.reference_ms) and slow > _SLOW * first.full_ms:
            parts.append(
                f"XLA's reference programs take {slow / first.full_ms:.1f} times as long as the fastest full network"
                f" here ({_FULL[first.full]}): speed-ups are over the latter"
            )
        parts.append(text_table("Result", ("", "value"), self._results()))
        if self.cost and first and first.numerics == "fast":
            keys = ("full_ms", "cascade_ms", "predicted_ms", "speedup", "ideal", "conversion", "spread")
            rows = [(row.batch, row.full, *(f"{getattr(row, key):.3f}" for key in keys)) for row in self.cost.measured]
            titles = ("batch", "full", "full ms", "cascade ms", "predicted ms", "speed-up", "ideal", "conversion")
            parts.append(text_table(f"Tuned for this device: {first.backend}", (*titles, "spread"), rows))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        """Return it as a notebook shows it."""
        return html_table("Exits", *self._exit_table()) + html_table("Result", (), self._results())

    def _exit_table(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        rows: list[tuple[object, ...]] = [
            (e.exit, e.hits, f"{e.hit_rate:.1%}", "-" if e.agreement is None else f"{e.agreement:.2%}")
            for e in self.exits
        ]
        return ("exit", "requests", "share", "agreement with the base"), rows

    def _results(self) -> list[tuple[str, str]]:
        certificate, memory = self.certificate, self.memory
        base, cascade = self.base.accuracy, self.cascade.accuracy
        bound = f"{certificate.promise}, delta {certificate.delta}, {certificate.basis}"
        served = self.served.text if self.served else "-"
        if certificate.certified and (self.served is None or self.served.epsilon is not None):
            served += f": {'holds' if certificate.holds else 'does NOT hold'} here"
        lost = "nothing is certified" if not certificate.certified else "not certified: certify had no labels"
        if certificate.certified and certificate.method in NOT_BY_REQUEST:
            lost = "not certified by this method"
        if gap := certificate.accuracy_gap:
            upper, mean = percent(gap.upper, up=True), percent(gap.mean)
            lost = f"{upper}, delta {gap.delta} ({mean} of {gap.n} certify requests)"
        lines = [
            ("agreement with the base", f"{self.cascade.agreement:.4f} of {self.n} requests"),
            ("accuracy, base -> cascade", "no labels" if base is None else f"{base:.4f} -> {cascade:.4f}"),
            ("accuracy, lost at most", lost),
            ("certificate", bound if certificate.certified else "NOTHING CERTIFIED: the base answers every request"),
            ("answers by default", served),
        ]
        if self.cost:
            first, *_ = self.cost.measured
            between = f"{first.interval[0]:.3f} to {first.interval[1]:.3f}, " if first.interval else ""
            times = f"{between}{first.full_ms:.3f} -> {first.cascade_ms:.3f} ms on {first.requests} requests"
            over = f"over the fastest full network here ({_FULL[first.full]})"
            lines += [
                (f"measured speed-up, batch {first.batch}", f"{first.speedup:.3f} ({times})"),
                ("ideal speed-up, no lookups", f"{self.cost.ideal_speedup:.3f}"),
                ("conversion", f"{first.conversion:.3f}, {over}"),
            ]
        sizes = f"{memory.base_bytes / 1e6:.2f} + {memory.cache_bytes / 1e6:.2f} MB"
        return [*lines, ("memory, base + caches", sizes)]
