"""The records of reproduction.json and freeze.json: written by ``run`` and ``freeze``, read by ``page``.

A field with a default is one that older files may lack. Keys that no record has are ignored.
"""

import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, computed_field

from gati_jax.options import Positive
from gati_jax.profiling import device_name

from .. import cli, results

Kind = Literal["knn", "kmeans"]
KINDS: dict[Kind, str] = {"knn": "k-NN", "kmeans": "k-means"}
Fraction = Annotated[float, Field(ge=0, le=1)]


class Record(results.Record, allow_inf_nan=False):
    """Part of a result."""


class Run(Record):
    """How a result came about."""

    dataset: str
    network: str
    splits: dict[str, str]
    command: Annotated[tuple[str, ...], Field(min_length=1)]
    date: str
    versions: dict[str, str]
    device: str | None = None


def describe_run(dataset: str, network: str, splits: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of ``Run`` for this process."""
    return {
        "dataset": dataset,
        "network": network,
        "splits": splits,
        "command": tuple(sys.argv),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": cli.versions(),
        "device": device_name(),
    }


class BaseResult(Record):
    """The base network on the test requests."""

    accuracy: Annotated[float, Field(gt=0, le=1)]


# --- reproduction.json ----------------------------------------------------------------------------------------------


class Ranked(Record):
    """A candidate as the only cache of a cascade."""

    name: str
    site: int
    agreement: Fraction
    hits: Fraction  # share of requests that leave at it
    saved: float | None = None  # share of the base's time
    lookup_ms: float | None = None
    bytes: int


class Exploration(Record):
    """The candidates that were fitted, the best first, and those that were not, with the reasons."""

    epochs: float | None = None
    ranking: tuple[Ranked, ...]
    dropped: Mapping[str, str] = {}


class Exits(Record):
    """Where requests leave, and the share of the base's time that this saves; lookups are left out."""

    exits: tuple[int, ...]  # requests by exit: site 0, ..., the last block
    saved_share: float


class OracleResult(Exits):
    """Every request leaves at the earliest site where any explored candidate agrees with the base."""

    half_share: Fraction  # of requests that leave in the first half of the blocks


class Difference(Record):
    """How much longer than the default plan a policy takes, with a 95 % bootstrap interval."""

    mean_ms: float
    low_ms: float
    high_ms: float

    @computed_field
    @property
    def ties(self) -> bool:
        """Whether the interval contains 0."""
        return self.low_ms <= 0 <= self.high_ms


class PolicyResult(Exits):
    """A policy on the test requests."""

    policy: str
    heads: str  # the predictors that it uses
    caches: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = ()
    mean_ms: float
    full_ms: float
    disagreement: Fraction
    accuracy: Fraction
    slower_by: Difference


class AccuracyGap(Record):
    """An upper bound of the accuracy lost, with confidence 1 - delta."""

    upper: float
    delta: float


class PolicyCertificate(Record):
    """The fields of a policy's ``gati_jax.Certificate`` that are reported."""

    epsilon: float | None = None
    delta: float | None = None
    n: int | None = None
    disagreements: int | None = None
    step: int | None = None
    certified: bool | None = None
    looks: int | None = None
    method: str | None = None
    numerics: str | None = None
    base_saw_data: bool | None = None
    accuracy_gap: AccuracyGap | None = None


class OperatingPoint(Record):
    """All policies at one operating point, the default plan first."""

    rows: Annotated[tuple[PolicyResult, ...], Field(min_length=1)]
    disagreements: Mapping[str, tuple[int, int]] = {}  # by policy: on certify, and of how many requests
    certificates: Mapping[str, PolicyCertificate] = {}


class Latency(Record):
    """A cascade and the full network, timed side by side."""

    full_ms: float | None = None
    cascade_ms: float | None = None
    speedup: Positive
    ideal: Positive  # the speed-up if lookups took no time
    spread: float  # interquartile range over median of the speed-up, over rounds
    requests: int | None = None
    cache_bytes: int
    base_bytes: Annotated[int, Field(gt=0)]
    sites: tuple[int, ...] = ()

    @property
    def memory_share(self) -> float:
        """The caches' bytes, as a share of the base's."""
        return self.cache_bytes / self.base_bytes


class Latencies(Record):
    """The default plan's latency at each operating point."""

    certified: Latency
    accurate: Latency
    read_off_test: Latency | None = Field(None, validation_alias=AliasChoices("read_off_test", "read off test"))


class Comparison(Record):
    """The default plan beside the other policies."""

    epsilon: Fraction
    delta: Fraction
    looks: int | None = None
    composition: Mapping[str, Any] = {}
    candidates: int
    oracle: OracleResult
    certified: OperatingPoint
    accurate: OperatingPoint
    measured: Latencies


class Reproduction(Run, Comparison):
    """reproduction.json."""

    base: BaseResult
    explored: Exploration

    @property
    def full_ms(self) -> float:
        """Milliseconds of a request in the base."""
        return self.certified.rows[0].full_ms


# --- freeze.json ----------------------------------------------------------------------------------------------------


class FreezeBase(Record):
    """The base network on the requests."""

    accuracy: Fraction | None  # None where the data has no labels
    bytes: int


class ExitResult(Record):
    """The requests that leave at one exit."""

    exit: int | Literal["base"]
    hits: int
    hit_rate: Fraction
    agreement: Fraction | None  # None without hits
    threshold: float | None


class Half(Record):
    """How early requests leave; as an oracle, what a selector that knows when a cache is right would save."""

    half_share: Fraction  # saved half of the blocks
    blocks_mean: float | None = None


class Served(Half):
    """Caches of one kind on the requests, under thresholds from one split."""

    n_thresholds: int | None = None  # images that set the thresholds
    exits: tuple[ExitResult, ...] = ()
    before_last_block_share: Fraction | None = None
    before_output_share: Fraction
    agreement: Fraction
    accuracy: Fraction | None = None


class Protocol(Record):
    """Each kind of caches under thresholds from one split."""

    knn: Served | None = None
    kmeans: Served | None = None
    base_saw_thresholds: bool  # whether the base was trained on the images that set the thresholds


class Protocols(Record):
    """As published, and with clean splits."""

    seen: Protocol
    clean: Protocol


class Memory(Record):
    """Bytes of one cache."""

    name: str = ""
    site: int | None = None
    key_network: int | None = None
    points: int | None = None
    total: int


class FreezeOutcome(Record):
    """Freeze's protocol under both splits."""

    n: int  # requests
    blocks: int | None = None
    epochs: float | None = None
    base: FreezeBase | None = None
    protocols: Protocols
    agreement: Mapping[Kind, dict[int, Fraction]] = {}  # of the caches with the base, by site
    oracle: dict[Kind, Half]
    memory: dict[Kind, tuple[Memory, ...]]
    predictors: Mapping[str, dict[int, Fraction]] = {}  # agreement, by the paper's name of the predictor and by site
    fit_seconds: float | None = None
    replay_seconds: float | None = None


class Freeze(Run, FreezeOutcome):
    """freeze.json."""

    seconds: float | None = None
    config: Mapping[str, Any] = {}
