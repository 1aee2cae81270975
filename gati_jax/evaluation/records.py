"""The records of an evaluation, and their text."""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from gati_jax.certification import AccuracyGap
from gati_jax.errors import text_table
from gati_jax.profiling import Backend, device_name
from gati_jax.profiling.speed import FullNetwork

_SLOW = 1.3
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
    plans: int = 1
    base_saw_data: bool = False
    accuracy_gap: AccuracyGap | None = None


class EvaluatedCertificate(CertificateResult):
    """The certificate beside what these images show."""

    holds: bool


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
    lookup_share: float | None = None  # of the cascade's time; None where lookups have not been measured on this device
    predicted_ms: float | None = None  # by the costs of the tuned tiles
    tiles: tuple[int, ...] | None = None
    costs_spread: float | None = None


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
    """Every request leaves at the bundle's first cache that agrees with the base."""

    saved_share: float


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

    def summary(self, title: str = "Exits") -> str:
        """Return it as text, in lines of at most 160 characters or so."""
        rows = [
            (e.exit, e.hits, f"{e.hit_rate:.1%}", "-" if e.agreement is None else f"{e.agreement:.2%}")
            for e in self.exits
        ]
        parts = [text_table(title, ("exit", "requests", "share", "agreement with the base"), rows)]
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

    def _results(self) -> list[tuple[str, str]]:
        certificate, memory = self.certificate, self.memory
        base, cascade = self.base.accuracy, self.cascade.accuracy
        holds = "holds" if certificate.holds else "does NOT hold"
        bound = f"{certificate.promise}, delta {certificate.delta}, {certificate.basis}: {holds} here"
        lost = "no labels, or nothing certified"
        if gap := certificate.accuracy_gap:
            lost = f"{gap.upper:.4f}, delta {gap.delta} ({gap.mean:.4f} of {gap.n} certify requests)"
        lines = [
            ("agreement with the base", f"{self.cascade.agreement:.4f} of {self.n} requests"),
            ("accuracy, base -> cascade", "no labels" if base is None else f"{base:.4f} -> {cascade:.4f}"),
            ("accuracy, lost at most", lost),
            ("certificate", bound if certificate.certified else "NOTHING CERTIFIED: the base answers every request"),
            ("answers by default", self.served.text if self.served else "-"),
        ]
        if self.cost:
            first, *_ = self.cost.measured
            times = f"{first.full_ms:.3f} -> {first.cascade_ms:.3f} ms, spread {first.spread:.0%}"
            over = f"over the fastest full network here ({_FULL[first.full]})"
            lines += [
                ("ideal speed-up", f"{self.cost.ideal_speedup:.3f}"),
                ("measured speed-up, batch 1", f"{first.speedup:.3f} ({times})"),
                ("conversion", f"{first.conversion:.3f}, {over}"),
            ]
        sizes = f"{memory.base_bytes / 1e6:.2f} + {memory.cache_bytes / 1e6:.2f} MB"
        return [*lines, ("memory, base + caches", sizes)]
