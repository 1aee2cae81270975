"""Recorded workloads: which image was asked for, when, through which camera, in which phase of a drift.

One ``.npz`` file, never unpickled, of these members:

    header   uint8[bytes]              JSON: {"format_version": 1, "phases": ["quiet", "blur 3"], "about": {...}}
    item     int32[n]                  the image of each request
    seconds  float64[n]                when it came, from the start; never falling
    phase    int16[n]                  which of "phases"; may be left out: all are of the first
    source   int16[n]                  the camera or client; may be left out: all came from one
    images   uint8[items, h, w, c]     may be left out: items are then rows of a data set that whoever replays it names

"about" says where the workload comes from; nothing reads it. A file is not trusted: every member's type and shape is
read, bounded and compared with its size before a byte of it is unpacked.
"""

import dataclasses
import json
import math
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Float64, Int16, Int32, Shaped, UInt8
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from gati_jax.errors import InputError

FORMAT_VERSION = 1
MOST_REQUESTS = 10_000_000
LONGEST_SECONDS = 366 * 24 * 3600.0
MOST_BYTES = 4 * 2**30  # of images
_MOST_HEADER_BYTES = 2**20
_CHUNK = 2**20  # bytes read at once
_MAGIC = b"\x93NUMPY\x01\x00"
_ARRAY_HEADER = re.compile(
    rb"\{'descr': '([!-&(-~]{1,20})', 'fortran_order': False, 'shape': \(([\d, ]{0,100})\), \} {0,100}\n"
)
_DAMAGED = (ValueError, EOFError, zlib.error, zipfile.BadZipFile)
_UNREADABLE = (OSError, RuntimeError)  # offsets nowhere; an encrypted member, or one packed in an unknown way
_FORMS = {"header": ("|u1", 1), "item": ("<i4", 1), "seconds": ("<f8", 1), "phase": ("<i2", 1), "source": ("<i2", 1)}
_FORMS["images"] = ("|u1", 4)
_REQUIRED = ("header", "item", "seconds")


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: Literal[1]
    phases: Annotated[list[Annotated[str, Field(max_length=200)]], Field(min_length=1, max_length=10_000)]
    about: dict[str, JsonValue] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Requests in the order in which they come."""

    item: Int32[np.ndarray, " n"]
    """The image of each."""
    seconds: Float64[np.ndarray, " n"]
    """When it comes, from the start; never falling."""
    images: UInt8[np.ndarray, "items h w c"] | None = None
    """None: items are rows of a data set."""
    phase: Int16[np.ndarray, " n"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int16))
    """Which of ``phases``; unless given, all requests are of the first."""
    phases: tuple[str, ...] = ("all",)
    """Their names, in the order in which they set in."""
    source: Int16[np.ndarray, " n"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int16))
    """The camera or client; unless given, 0."""
    about: Mapping[str, JsonValue] = dataclasses.field(default_factory=dict[str, JsonValue])
    """Where it comes from."""

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            InputError: Lengths that differ, or a value out of its bounds.
        """
        n = len(self.item)
        for name in ("phase", "source"):
            if not len(getattr(self, name)):
                object.__setattr__(self, name, np.zeros(n, np.int16))
        columns = (self.item, self.seconds, self.phase, self.source)
        if any(column.shape != (n,) for column in columns):
            shapes = ", ".join(str(list(column.shape)) for column in columns)
            raise InputError(f"trace: expected item, seconds, phase and source of one length, got {shapes}")
        if not 0 < n <= MOST_REQUESTS:
            raise InputError(f"trace: expected 1 .. {MOST_REQUESTS} requests, got {n}")
        _check_seconds(self.seconds)
        if self.images is not None and not self.images.size:
            raise InputError(f"trace: expected images of at least one value, got shape {list(self.images.shape)}")
        items = 2**31 if self.images is None else len(self.images)
        _check_range("item", self.item, items)
        _check_range("phase", self.phase, len(self.phases))
        _check_range("source", self.source, 2**15)

    def __len__(self) -> int:
        """Return n."""
        return len(self.item)


def _check_range(name: str, values: Shaped[np.ndarray, " n"], stop: int) -> None:
    if values.min() < 0 or values.max() >= stop:
        bad = values.min() if values.min() < 0 else values.max()
        raise InputError(f"trace: expected {name} in 0 .. {stop - 1}, got {bad}")


def _check_seconds(seconds: Float64[np.ndarray, " n"]) -> None:
    bounded = (seconds >= 0) & (seconds <= LONGEST_SECONDS)  # false for NaN
    if not bounded.all():
        i = int(np.flatnonzero(~bounded)[0])
        raise InputError(f"trace: expected seconds in 0 .. {LONGEST_SECONDS:g}, got seconds[{i}] = {seconds[i]}")
    if (falls := np.flatnonzero(np.diff(seconds) < 0)).size:
        i = int(falls[0])
        pair = f"seconds[{i}] = {seconds[i]} before seconds[{i + 1}] = {seconds[i + 1]}"
        raise InputError(f"trace: expected seconds that never fall, got {pair}")


def save_trace(path: Path | str, trace: Trace) -> None:
    """Write a trace; a reader sees the old file or the new one, and equal traces make equal files.

    Raises:
        InputError: The name does not end in .npz.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"trace: expected a file named *.npz, got {path}")
    header = {"format_version": FORMAT_VERSION, "phases": list(trace.phases), "about": dict(trace.about)}
    members: dict[str, Any] = {name: getattr(trace, name) for name in ("item", "seconds", "phase", "source")}
    members["header"] = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
    if trace.images is not None:
        members["images"] = trace.images
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            np.savez_compressed(file, **members)
        except BaseException:
            Path(file.name).unlink()
            raise
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def load_trace(path: Path | str, *, most_bytes: int = MOST_BYTES) -> Trace:
    """Read a trace.

    Args:
        path: An .npz file.
        most_bytes: As large may its images be, unpacked.

    Raises:
        InputError: It is no trace, is damaged, or is too large.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"trace: expected a file, got {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: _member(archive, name, most_bytes) for name in _members(archive)}
        header = _Header.model_validate_json(members.pop("header").tobytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the JSON"
        raise InputError(f"trace: the header of {path} is damaged: {where}: {first['msg']}") from error
    except (*_DAMAGED, *_UNREADABLE) as error:
        raise InputError(f"trace: expected what gati_jax/adaptation/trace.py says, got {path}: {error}") from error
    if len({len(values) for name, values in members.items() if name != "images"}) > 1:
        lengths = ", ".join(f"{name}[{len(values)}]" for name, values in members.items() if name != "images")
        raise InputError(f"trace: expected members of one length in {path}, got {lengths}")
    return Trace(**members, phases=tuple(header.phases), about=header.about)


def _members(archive: zipfile.ZipFile) -> list[str]:
    names = [name.removesuffix(".npy") if name.endswith(".npy") else f"{name}?" for name in archive.namelist()]
    missing, unexpected = set(_REQUIRED) - set(names), set(names) - set(_FORMS)
    if missing or unexpected or len(set(names)) < len(names):
        raise ValueError(f"missing {sorted(missing)}, unexpected {sorted(unexpected)[:5]} of {len(names)} members")
    return names


def _member(archive: zipfile.ZipFile, name: str, most_bytes: int) -> Shaped[np.ndarray, "..."]:
    """Unpack one member, once its declared shape has been found to be its size, and within bounds."""
    dtype, ndim = _FORMS[name]
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed in another way than NumPy packs")
    with archive.open(info) as file:
        found, shape = _array_header(file.read)
        if found != dtype or len(shape) != ndim:
            raise ValueError(f"{name} is {found}{list(shape)}, not {dtype} of {ndim} dimensions")
        expected = np.dtype(dtype)
        size = math.prod(shape) * expected.itemsize
        most = {"images": most_bytes, "header": _MOST_HEADER_BYTES}.get(name, MOST_REQUESTS * expected.itemsize)
        if size > most:
            raise ValueError(f"{name} has {size} bytes, over {most}")
        if info.file_size - file.tell() != size:
            raise ValueError(f"{name} has {info.file_size - file.tell()} bytes, not the {size} of {list(shape)}")
        content = bytearray(size)
        into = memoryview(content)
        for start in range(0, size, _CHUNK):
            into[start : start + _CHUNK] = file.read(min(_CHUNK, size - start))  # refuses to be given less
        file.read()  # to the end, where the checksum is compared
    return np.frombuffer(content, expected).reshape(shape)


def _array_header(read: Callable[[int], bytes]) -> tuple[str, tuple[int, ...]]:
    """Return type and shape; NumPy's own reader would evaluate the text."""
    if read(len(_MAGIC)) != _MAGIC:
        raise ValueError("a member is no array of NumPy's format 1.0")
    length = int.from_bytes(read(2), "little")
    match = _ARRAY_HEADER.fullmatch(read(length))
    if match is None:
        raise ValueError("an array's header is not as NumPy writes it, rows before columns")
    return match[1].decode("ascii"), tuple(int(one) for one in match[2].split(b",") if one.strip())
