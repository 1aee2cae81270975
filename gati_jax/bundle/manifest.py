"""What stands in a bundle's JSON files. They are untrusted: fields are typed and bounded, and no unknown one passes."""

import contextlib
import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from gati_jax.caches import PredictorSpec, SelectorSpec
from gati_jax.certification import Certificate
from gati_jax.errors import BundleError
from gati_jax.models import Architecture, Normalization
from gati_jax.planning import CostTable, Plan, ReplaySource
from gati_jax.profiling import Tuning

MAX_PLANS = 4
FORMAT_VERSION = 1
MAX_JSON_BYTES = 64 * 2**20

Site = Annotated[int, Field(ge=0, le=100_000)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
T = TypeVar("T")


class Strict(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CacheEntry(Strict):
    """A cache without its parameters."""

    name: Name
    site: Site
    predictor: PredictorSpec
    selector: SelectorSpec


class Provenance(Strict):
    """Where a bundle comes from."""

    created: str = ""
    versions: dict[str, str] = {}
    seed: int = 0
    data_fingerprints: dict[str, str] = {}
    """By split: a digest of its rows, in order."""
    looks: tuple[dict[str, str | float], ...] = ()
    """Every plan that rows of the certify split were opened for, this bundle's included."""
    command: list[str] = []
    config: dict[str, Any] = {}


class Manifest(Strict):
    """``manifest.json``."""

    format_version: Literal[1]
    network: Architecture | None
    """None for a user's own chain, which the loader must be given."""
    normalization: Normalization | None
    input_shape: Annotated[tuple[Site, ...], Field(max_length=8)]
    input_dtype: Annotated[str, Field(max_length=20)]
    class_names: Annotated[tuple[str, ...], Field(max_length=100_000)] = ()
    caches: Annotated[tuple[CacheEntry, ...], Field(max_length=1000)]
    provenance: Provenance = Provenance()
    files: dict[str, Annotated[str, Field(pattern=r"^[0-9]{1,18} [0-9a-f]{64}$")]]
    """"<bytes> <sha256>" of every other file but tuning/, by relative path."""


class PlanEntry(Strict):
    """A plan; null stands for infinity, a cache that is off."""

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
        """Describe a plan."""
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
        """Rebuild the plan."""
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


class DeviceFile(Strict):
    """``tuning/<device>.json``."""

    costs: Annotated[tuple[CostTable, ...], Field(max_length=100)] = ()
    tuning: Tuning | None = None


def read_json(path: Path, kind: type[T]) -> T:
    """Read and check a JSON file.

    Raises:
        BundleError: The file is missing, too large, not JSON, or not what it should be.
    """
    if not path.is_file():
        raise BundleError(f"bundle: {path.name} is missing from {path.parent}")
    try:
        return TypeAdapter(kind).validate_json(_read_bounded(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BundleError(f"bundle: {path} is damaged: {where}: {first['msg']}") from error


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest; the version comes first, since a newer one may have any other form."""
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


def _read_bounded(path: Path) -> bytes:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise BundleError(f"bundle: {path} is larger than {MAX_JSON_BYTES} bytes")
    return path.read_bytes()


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401
    """Write a record as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(TypeAdapter(type(value)).dump_json(value, indent=2) + b"\n")


_LONGEST_NAME = 200


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield a new empty folder that takes the place of ``path`` once the block ends well.

    A folder cannot be renamed over another one. The old one is first moved aside, to ``previous(path)``; whoever is
    killed between the two renames leaves it there, and ``present`` finds it.
    """
    path = path.resolve()  # a link stays, and what it points to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.saving-*"):
        shutil.rmtree(stale, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.saving-", dir=path.parent))
    try:
        yield fresh
        fresh.chmod(0o755)  # mkdtemp's folders are private
        if path.exists():
            shutil.rmtree(previous(path), ignore_errors=True)
            path.rename(previous(path))
        fresh.rename(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(previous(path), ignore_errors=True)


def previous(path: Path) -> Path:
    """Return where the old folder waits while the new one takes its place."""
    return path.with_name(f".{path.name}.previous")


def present(path: Path) -> Path:
    """Return ``path``, or the old folder where a killed save left only that."""
    path = path.resolve()
    return previous(path) if not path.exists() and previous(path).exists() else path


def digests(folder: Path) -> dict[str, str]:
    """Return "<bytes> <sha256>" of every file below ``folder``, by its relative path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): _digest(file) for file in files}


def check_files(folder: Path, expected: Mapping[str, str]) -> None:
    """Compare the files below ``folder`` with their digests; manifest.json and tuning/ are not among them.

    Raises:
        BundleError: Names the first file that is missing, truncated, changed or not listed.
    """
    for name, digest in expected.items():
        file = folder / name
        if "\0" in name or len(name) > _LONGEST_NAME or not file.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"bundle: manifest.json lists {name[:_LONGEST_NAME]!r}, which is no file of the bundle")
        if not file.is_file():
            raise BundleError(f"bundle: {name} is missing from {folder}")
        size = digest.partition(" ")[0]
        if size != (got := str(file.stat().st_size)):
            raise BundleError(f"bundle: {file} is truncated or changed: expected {size} bytes, got {got}")
        if _digest(file) != digest:
            raise BundleError(f"bundle: {file} is damaged: its SHA-256 is not the one in manifest.json")
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if not file.is_dir() and name not in expected and name != "manifest.json" and not name.startswith("tuning/"):
            raise BundleError(f"bundle: {folder} holds {name}, which manifest.json does not list")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return f"{os.fstat(stream.fileno()).st_size} {hashlib.file_digest(stream, 'sha256').hexdigest()}"
