"""The records of evaluation.json, caches.json and adaptation.json: written by their scripts, read back by any other.

A field with a default is one that older files lack. Keys that no record has are ignored.
"""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from gati_jax import InputError
from gati_jax.certification import AccuracyGap
from gati_jax.options import describe_error
from gati_jax.profiling import Backend, device_name
from gati_jax.profiling.speed import FullNetwork
from train import cli

ERRORS_SHOWN = 3


class Record(BaseModel):
    """Part of a result; made from an object with the same attributes, or from keywords."""

    model_config = ConfigDict(frozen=True, extra="ignore", from_attributes=True)

    @classmethod
    def of(cls, source: object, **more: Any) -> Self:  # noqa: ANN401 (fields of the record)
        """Return a record of what an object has under the same names, and of further fields."""
        own = {name: getattr(source, name) for name in cls.model_fields if hasattr(source, name)}
        return cls.model_validate(own | more)

    def as_json(self) -> dict[str, object]:
        """Return what is written."""
        return self.model_dump(mode="json")

    def write(self, path: Path, *, print_json: bool) -> None:
        """Write the file; with ``print_json``, print the same on standard output."""
        cli.write_result(path, self.as_json())
        if print_json:
            print(json.dumps(self.as_json()))

    @classmethod
    def read(cls, path: Path, name: str = "") -> Self:
        """Read a file that ``write`` has written, of this name if it may since have been given another.

        Raises:
            InputError: It is damaged, or another file.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            problems = [describe_error(one) for one in error.errors(include_url=False)]
            if more := problems[ERRORS_SHOWN:]:
                problems[ERRORS_SHOWN:] = [f"and {len(more)} more"]
            name = name or path.stem
            raise InputError(f"{name}: expected a whole {name}.json, got {path}: {'; '.join(problems)}") from error


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


# --- caches.json ----------------------------------------------------------------------------------------------------


class PlannedCache(Record):
    """A cache of a plan."""

    name: str
    site: int
    threshold: float | None  # None: it is off at the certified step
    agreement: float  # with the base, on select


class Predicted(Record):
    """Latency by the cost table."""

    full_ms: float
    cascade_ms: float
    batch: int
    device: str


class PlanResult(Record):
    """A plan with its certificate."""

    candidates: dict[str, float]  # all that were fitted, with their agreement with the base on select
    plan: tuple[PlannedCache, ...]
    sites: tuple[int, ...]  # of the caches that are on
    certificate: CertificateResult
    predicted: Predicted


class BaseOnSelect(Record):
    """The base on the select split."""

    accuracy_select: float | None  # None without labels
    n: int
    commonest_answer: float  # its share of the answers


class Caches(PlanResult):
    """caches.json: the default plan, and the others that were certified with it."""

    base: BaseOnSelect | None = None
    also: tuple[PlanResult, ...] = ()
    bundle: str
    fit_seconds: float
    epochs: float | None = None
    dropped: dict[str, str] = {}  # candidates that were not fitted, and why
    ranking: tuple[dict[str, str | int | float], ...] = ()
    composition: dict[str, dict[str, Any]] = {}
    """By plan: how good it is known to be, and why it left the other candidates out."""


# --- evaluation.json ------------------------------------------------------------------------------------------------


class EvaluatedCertificate(CertificateResult):
    """The certificate beside what this split shows."""

    holds: bool


class ServedResult(Record):
    """What holds of the answers that a bundle gives by default on this device, see ``Bundle.bound_of``."""

    numerics: str
    epsilon: float | None
    delta: float
    text: str


class BaseQuality(Record):
    """The base on this split; None without labels."""

    accuracy: float | None


class CascadeQuality(BaseQuality):
    """The cascade on this split."""

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
    """evaluation.json."""

    dataset: str
    split: str
    network: str
    n: int
    base: BaseQuality
    cascade: CascadeQuality
    certificate: EvaluatedCertificate
    served: ServedResult | None = None
    exits: tuple[Exit, ...]
    cost: Cost
    memory: Memory
    oracle: Oracle
    versions: dict[str, str]
    seed: int
    date: str


# --- adaptation.json ------------------------------------------------------------------------------------------------


class TraceResult(Record):
    """The trace that was replayed."""

    file: str
    n: int
    items: int
    about: dict[str, object]


class MechanismsResult(Record):
    """A simulation with one set of mechanisms."""

    name: str
    computation: float  # of the full network, over what a request took by the cost table, the controller included
    disagreement: float
    worst_window: float  # The largest disagreement in any 1,000 requests in a row
    shadow_share: float
    controller_ms: float = Field(validation_alias=AliasChoices("controller_ms", "front_ms"))
    full_ms: float
    with_recovery: float = Field(validation_alias=AliasChoices("with_recovery", "with_background"))
    """As ``computation``, trials and refits included."""
    recovery_seconds: float = Field(validation_alias=AliasChoices("recovery_seconds", "background_seconds"))
    alarms: int
    swaps: int


class WindowResult(Record):
    """Some requests in a row."""

    start: int
    phase: str
    saved_share: float
    disagreement: float
    bound: float | None  # the monitor's last one; None where it gave none
    shadow_share: float
    exits: dict[str, int]


class PhaseResult(Record):
    """A phase of the trace."""

    phase: str
    n: int
    computation: float
    disagreement: float


class EventResult(Record):
    """A decision of the controller."""

    number: int
    kind: str
    text: str


class Adaptation(Record):
    """adaptation.json: ``windows``, ``phases`` and ``events`` are those of the last set of mechanisms."""

    trace: TraceResult
    epsilon: float
    delta: float
    mechanisms: tuple[MechanismsResult, ...]
    windows: tuple[WindowResult, ...]
    phases: tuple[PhaseResult, ...]
    events: tuple[EventResult, ...]
    versions: dict[str, str]
    seed: int
    date: str
