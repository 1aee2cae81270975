"""The JSON files of a bundle. They are untrusted: every field is typed and bounded, and unknown ones are refused."""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from jaxtyping import UInt64
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from gati_jax import __version__
from gati_jax.caches import PredictorSpec, SelectorSpec, UnregisteredError
from gati_jax.certification import NO_LOOKS, Certificate, Looks
from gati_jax.errors import BundleError
from gati_jax.files import write_atomically
from gati_jax.models import AnyNetwork, Normalization
from gati_jax.options import Strict
from gati_jax.planning import CostTable, Plan, ReplaySource
from gati_jax.profiling import Tuning

MAX_PLANS = 4
FORMAT_VERSION = 1
MAX_JSON_BYTES = 64 * 2**20
LOOKS = "looks.json"
"""All looks at the bundle's certify rows; older bundles have none, but a list in their provenance."""
FITTED = "fitted_rows"
"""Digests of the rows that caches were fitted on, eight bytes each; older bundles have none."""
_MAX_FITTED_BYTES = 2**30

Site = Annotated[int, Field(ge=0, le=100_000)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
T = TypeVar("T")


class CacheEntry(Strict):
    """A cache without its parameters."""

    name: Name
    site: Site
    predictor: PredictorSpec
    selector: SelectorSpec


class Provenance(Strict):
    """How a bundle was made."""

    created: str = ""
    versions: Mapping[str, str] = {}
    seed: int = 0
    data_fingerprints: Mapping[str, str] = {}
    """By split: a digest of its rows, in order."""
    looks: tuple[dict[str, str | float], ...] = ()
    """In bundles of older versions; newer ones have a looks.json."""
    command: Sequence[str] = ()
    config: Mapping[str, Any] = {}


def installed_versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "gati-jax": __version__,
    } | {package: importlib.metadata.version(package) for package in packages}


class Manifest(Strict):
    """``manifest.json``."""

    format_version: Literal[1]
    network: AnyNetwork | None
    """None for a user's own chain, which must be passed to ``load_bundle``."""
    normalization: Normalization | None
    input_shape: Annotated[tuple[Site, ...], Field(max_length=8)]
    input_dtype: Annotated[str, Field(max_length=20)]
    class_names: Annotated[tuple[str, ...], Field(max_length=100_000)] = ()
    caches: Annotated[tuple[CacheEntry, ...], Field(max_length=1000)]
    provenance: Provenance = Provenance()
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9]{1,18} [0-9a-f]{64}$")]]
    """"<bytes> <sha256>" of every other file but tuning/, by relative path."""


class PlanEntry(Strict):
    """A plan in ``plans.json``; a null threshold is infinity: the cache is off."""

    names: tuple[Name, ...]
    sites: tuple[Site, ...]
    depth: Site
    path: tuple[tuple[float | None, ...], ...]
    disagreement: tuple[float, ...]
    mean_ms: tuple[float, ...]
    rows: Annotated[str, Field(pattern=r"^([0-9a-f]{16})*$")]
    """Digests of the rows that it was composed on."""
    origin: ReplaySource = ReplaySource()

    @classmethod
    def of(cls, plan: Plan) -> "PlanEntry":
        """Return the entry of a plan."""
        path = tuple(tuple(None if math.isinf(t) else t for t in step) for step in plan.path.tolist())
        return cls(
            names=plan.names,
            sites=plan.sites,
            depth=plan.depth,
            path=path,
            disagreement=tuple(plan.disagreement.tolist()),
            mean_ms=tuple(plan.mean_ms.tolist()),
            rows=plan.rows.astype("<u8").tobytes().hex(),
            origin=plan.source,
        )

    @model_validator(mode="after")
    def _is_a_plan(self) -> "PlanEntry":
        caches, steps = len(self.names), len(self.path)
        widths = {len(self.sites), *(len(step) for step in self.path)}
        if widths != {caches} or steps == 0 or {len(self.disagreement), len(self.mean_ms)} != {steps}:
            raise ValueError(f"path: expected {caches} thresholds in each of {len(self.disagreement)} steps")
        return self

    def plan(self) -> Plan:
        """Return the plan."""
        path = np.array([[math.inf if t is None else t for t in step] for step in self.path], np.float32)
        rows = np.frombuffer(bytes.fromhex(self.rows), "<u8")
        return Plan(
            names=self.names,
            sites=self.sites,
            depth=self.depth,
            rows=rows,
            n=len(rows),
            source=self.origin,
            path=path.reshape(len(self.path), len(self.names)),
            disagreement=np.array(self.disagreement),
            mean_ms=np.array(self.mean_ms),
        )


class Plans(Strict):
    """``plans.json``."""

    plans: Annotated[tuple[PlanEntry, ...], Field(min_length=1, max_length=MAX_PLANS)]


class Certificates(Strict):
    """``certificates.json``: one for each plan, in the same order."""

    certificates: Annotated[tuple[Certificate, ...], Field(min_length=1, max_length=MAX_PLANS)]
    bfloat16: Annotated[tuple[Certificate, ...], Field(max_length=MAX_PLANS)] = ()
    """Further ones, of the plans of the same names in bfloat16."""


class DeviceFile(Strict):
    """``tuning/<device>.json``."""

    costs: Annotated[tuple[CostTable, ...], Field(max_length=100)] = ()
    tuning: Tuning | None = None


def read_json(path: Path, record: type[T], *, most_bytes: int = MAX_JSON_BYTES) -> T:
    """Read and check a JSON file of a ``record``; larger ones than ``most_bytes`` are not read.

    Raises:
        BundleError: The file is missing, too large, not JSON, or not a ``record``.
    """
    if not path.is_file():
        raise BundleError(f"bundle: {path.name} is missing from {path.parent}")
    try:
        return TypeAdapter(record).validate_json(_read_bounded(path, most_bytes))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), UnregisteredError):
            raise BundleError(f"bundle: {path.parent} cannot be loaded: {cause}") from error
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BundleError(f"bundle: {path} is damaged: {where}: {first['msg']}") from error


def read_looks(folder: Path) -> Looks:
    """Return the looks that a bundle knows of, and none if there is no bundle or it is damaged: it may be replaced."""
    try:
        return read_json(folder / LOOKS, Looks)
    except BundleError:
        return NO_LOOKS


def read_rows(path: Path) -> UInt64[np.ndarray, " n"]:
    """Read digests of rows.

    Raises:
        BundleError: The file is too large or not of whole digests.
    """
    content = _read_bounded(path, _MAX_FITTED_BYTES)
    if len(content) % 8:
        raise BundleError(f"bundle: {path} is damaged: expected digests of eight bytes, got {len(content)} bytes")
    return np.frombuffer(content, "<u8").astype(np.uint64)


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json``, its version first: a newer one may have any other form.

    Raises:
        BundleError: The folder is no bundle, is damaged, or has a newer format.
    """
    file = folder / "manifest.json"
    if not file.is_file():
        raise BundleError(f"bundle: expected a bundle folder with a manifest.json, got {folder}")
    try:
        version = json.loads(_read_bounded(file)).get("format_version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BundleError(f"bundle: {file} is damaged: {error}") from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleError(
            f"bundle: {folder} has format version {version}, gati_jax reads up to {FORMAT_VERSION}: upgrade it"
        )
    return read_json(file, Manifest)


def _read_bounded(path: Path, most_bytes: int = MAX_JSON_BYTES) -> bytes:
    if path.stat().st_size > most_bytes:
        raise BundleError(f"bundle: {path} is larger than {most_bytes} bytes")
    return path.read_bytes()


def write_json(path: Path, record: Any) -> None:  # noqa: ANN401
    """Write a record as indented JSON; a reader sees the old file or the new one."""
    write_atomically(path, TypeAdapter(type(record)).dump_json(record, indent=2) + b"\n")
