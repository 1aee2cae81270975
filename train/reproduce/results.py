"""What reproduction.json and freeze.json say, as far as the page reads it; whatever else they say is left alone."""

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gati_jax import InputError

Kind = Literal["knn", "kmeans"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
ERRORS_SHOWN = 3


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Run(_Part):
    """How a result came about."""

    dataset: str
    network: str
    splits: dict[str, str]
    command: Annotated[tuple[str, ...], Field(min_length=1)]
    date: str
    versions: dict[str, str]
    device: str | None = None
    """None in a freeze.json of old."""


class Speed(_Part):
    """A cascade and the full network, timed side by side."""

    speedup: Positive
    ideal: Positive
    spread: float
    cache_bytes: int
    base_bytes: Annotated[int, Field(gt=0)]


class Measured(_Part):
    """The default plan's gains."""

    certified: Speed
    accurate: Speed
    read_off_test: Speed | None = Field(None, alias="read off test")


class Difference(_Part):
    """How much longer than the default plan a policy takes, with the ends of an interval."""

    mean_ms: float
    low_ms: float
    high_ms: float


class Row(_Part):
    """What a policy does on test."""

    policy: str
    heads: str
    mean_ms: float
    full_ms: float
    saved_share: float
    disagreement: Fraction
    accuracy: Fraction
    slower_by: Difference


class AccuracyGap(_Part):
    """How much accuracy may be lost."""

    upper: float
    delta: float


class Certificate(_Part):
    """What is known of a policy beside its disagreements."""

    accuracy_gap: AccuracyGap | None = None


class Group(_Part):
    """All policies at one operating point, the default plan first."""

    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    disagreements: dict[str, tuple[int, int]] = {}
    """Of each policy among the certify requests, and how many these are."""
    certificates: dict[str, Certificate] = {}


class BaseAccuracy(_Part):
    """The base on test."""

    accuracy: Annotated[float, Field(gt=0, le=1)]


class Oracle(_Part):
    """Any explored candidate, at the earliest site where one is right."""

    saved_share: float
    half_share: Fraction


class Reproduction(Run):
    """reproduction.json."""

    base: BaseAccuracy
    epsilon: Fraction
    delta: Fraction
    looks: int | None = None
    candidates: int
    oracle: Oracle
    certified: Group
    accurate: Group
    measured: Measured

    @property
    def full_ms(self) -> float:
        """What a request takes in the base."""
        return self.certified.rows[0].full_ms


class Served(_Part):
    """What one kind of caches does with the requests."""

    half_share: Fraction
    before_output_share: Fraction
    agreement: Fraction


class Protocol(_Part):
    """Every kind under thresholds from one split."""

    knn: Served | None = None
    kmeans: Served | None = None
    base_saw_thresholds: bool


class Protocols(_Part):
    """As published, and with clean splits."""

    seen: Protocol
    clean: Protocol


class Half(_Part):
    """What a selector that knows when a cache is right saves."""

    half_share: Fraction


class Memory(_Part):
    """Of a cache, its key network included."""

    total: int


class Freeze(Run):
    """freeze.json."""

    n: int
    epochs: float | None = None
    protocols: Protocols
    oracle: dict[Kind, Half]
    memory: dict[Kind, tuple[Memory, ...]]
    predictors: dict[str, dict[int, Fraction]] = {}
    """Agreement, by the paper's name of the predictor and by site."""


R = TypeVar("R", bound=Run)


def read(model: type[R], path: Path, name: str) -> R:
    """Read a result.

    Args:
        model: What is to be in it.
        path: The file.
        name: Of the argument, for the message.

    Raises:
        InputError: Something else is in it.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        said = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".removeprefix(": ") for e in errors[:ERRORS_SHOWN]]
        more = f"; and {len(errors) - ERRORS_SHOWN} more" if len(errors) > ERRORS_SHOWN else ""
        raise InputError(f"{name}: expected a whole {name}.json, got {path}: {'; '.join(said)}{more}") from error
