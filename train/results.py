"""The records of evaluation.json, caches.json and adaptation.json: written by their scripts, read back by any other.

A field with a default is one that older files lack. Keys that no record has are ignored.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import AliasChoices, Field, ValidationError

from gati_jax import InputError
from gati_jax.evaluation import records as evaluation
from gati_jax.evaluation.records import CertificateResult
from gati_jax.options import describe_error

from . import cli

ERRORS_SHOWN = 3


class Record(evaluation.Record):
    """Part of a result that is written to a file, and read back by its class."""

    @classmethod
    def of(cls, source: object, **more: Any) -> Self:  # noqa: ANN401 (fields of the record)
        """Return a record of what an object has under the same names, and of further fields."""
        return evaluation.record_of(cls, source, **more)

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
    bfloat16: CertificateResult | None = None  # in these numerics, where the plan was certified in them as well
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
    dropped: Mapping[str, str] = {}  # candidates that were not fitted, and why
    ranking: tuple[dict[str, str | int | float], ...] = ()
    composition: Mapping[str, Mapping[str, Any]] = {}
    """By plan: how good it is known to be, and why it left the other candidates out."""


# --- evaluation.json ------------------------------------------------------------------------------------------------


class Evaluation(evaluation.Evaluation, Record):
    """evaluation.json: what was found, on what, and with what."""

    dataset: str
    split: str
    network: str
    versions: dict[str, str]
    seed: int
    date: str
    commands: tuple[str, ...] = ()
    """That made the bundle and this evaluation."""


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
