"""Traces, recorded workloads: which image was asked for, when, by which client, in which phase of a drift.

A ``.safetensors`` file of these tensors:

    item     I32[n]               the image of each request
    seconds  F64[n]               its arrival, from the start; never falling
    phase    I16[n]               which of the header's phases; optional: all are of the first
    source   I16[n]               the camera or client; optional: all came from one
    images   U8[items, h, w, c]   optional: items are then rows of a data set that the user names

The metadata entry "trace" holds a header in JSON: {"format_version": 2, "phases": ["quiet", "blur 3"], "about": {...}}.
"about" says where the workload comes from; nothing reads it. Files are not trusted: every tensor's type and shape is
checked and bounded before it is read.

Files of version 1, ``.npz`` archives with the same arrays and the header as uint8[bytes], are still read; never
unpickled, and no member is unpacked before its declared size has been found to be its size, and within bounds.
"""

import dataclasses
import json
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Float64, Int16, Int32, Shaped, UInt8
from pydantic import Field, JsonValue, ValidationError

from gati_jax.errors import InputError
from gati_jax.files import write_atomically
from gati_jax.options import Strict

FORMAT_VERSION = 2
SUFFIX = ".safetensors"
MOST_REQUESTS = 10_000_000
LONGEST_SECONDS = 366 * 24 * 3600.0
MOST_BYTES = 4 * 2**30  # of images
_MOST_HEADER_BYTES = 2**20
_MOST_ARRAY_HEADER = 1000  # characters, of a version 1 member
_CHUNK = 2**20  # bytes read at once
_DAMAGED = (ValueError, EOFError, zlib.error, zipfile.BadZipFile, safetensors.SafetensorError)
_DAMAGED += (SyntaxError, tokenize.TokenError)  # from NumPy's reader of an array's header
_Arrays = dict[str, Shaped[np.ndarray, "..."]]
_FORMS = {"item": ("I32", "<i4", 1), "seconds": ("F64", "<f8", 1), "phase": ("I16", "<i2", 1)}
_FORMS |= {"source": ("I16", "<i2", 1), "images": ("U8", "|u1", 4), "header": ("U8", "|u1", 1)}
_REQUIRED = {"item", "seconds"}


class _Header(Strict, strict=True):
    format_version: Literal[1, 2]
    phases: Annotated[list[Annotated[str, Field(max_length=200)]], Field(min_length=1, max_length=10_000)]
    about: Mapping[str, JsonValue] = {}


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
        self._check_seconds()
        if self.images is not None and not self.images.size:
            raise InputError(f"trace: expected images of at least one value, got shape {list(self.images.shape)}")
        stops = {"item": 2**31 if self.images is None else len(self.images), "phase": len(self.phases), "source": 2**15}
        for name, stop in stops.items():
            values = getattr(self, name)
            for bad in values[(values < 0) | (values >= stop)][:1]:
                raise InputError(f"trace: expected {name} in 0 .. {stop - 1}, got {bad}")

    def _check_seconds(self) -> None:
        seconds = self.seconds
        bounded = (seconds >= 0) & (seconds <= LONGEST_SECONDS)  # false for NaN
        for i in np.flatnonzero(~bounded)[:1]:
            raise InputError(f"trace: expected seconds in 0 .. {LONGEST_SECONDS:g}, got seconds[{i}] = {seconds[i]}")
        for i in np.flatnonzero(np.diff(seconds) < 0)[:1]:
            pair = f"seconds[{i}] = {seconds[i]} before seconds[{i + 1}] = {seconds[i + 1]}"
            raise InputError(f"trace: expected seconds that never fall, got {pair}")

    def __len__(self) -> int:
        """Return n."""
        return len(self.item)


def save_trace(path: Path | str, trace: Trace) -> None:
    """Write a trace; a reader sees the old file or the new one, and equal traces make equal files.

    Raises:
        InputError: The name does not end in .safetensors.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise InputError(f"trace: expected a file named *{SUFFIX}, got {path}")
    header = {"format_version": FORMAT_VERSION, "phases": list(trace.phases), "about": dict(trace.about)}
    arrays = {name: getattr(trace, name) for name in ("item", "seconds", "phase", "source", "images")}
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items() if array is not None}
    write_atomically(path, safetensors.numpy.save(tensors, {"trace": json.dumps(header, sort_keys=True)}))


def load_trace(path: Path | str, *, most_bytes: int = MOST_BYTES) -> Trace:
    """Read a trace.

    Args:
        path: A .safetensors file, or an .npz one of version 1.
        most_bytes: Largest size of its images.

    Raises:
        InputError: It is no trace, is damaged, or is too large.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"trace: expected a file, got {path}")
    try:
        with path.open("rb") as file:
            read = _read_npz if file.read(2) == b"PK" else _read_safetensors
        text, arrays = read(path, most_bytes)
        header = _Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the JSON"
        raise InputError(f"trace: the header of {path} is damaged: {where}: {first['msg']}") from error
    except (OSError, RuntimeError, *_DAMAGED) as error:  # RuntimeError: an encrypted member of an archive
        raise InputError(f"trace: expected what gati_jax/adaptation/trace.py says, got {path}: {error}") from error
    if len({len(values) for name, values in arrays.items() if name != "images"}) > 1:
        lengths = ", ".join(f"{name}[{len(values)}]" for name, values in arrays.items() if name != "images")
        raise InputError(f"trace: expected arrays of one length in {path}, got {lengths}")
    return Trace(**arrays, phases=tuple(header.phases), about=header.about)


def _read_safetensors(path: Path, most_bytes: int) -> tuple[str | bytes, _Arrays]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
    if size > _MOST_HEADER_BYTES:  # the library itself allows 100 MB
        raise ValueError(f"the file's header has {size} bytes, over {_MOST_HEADER_BYTES}")
    with safetensors.safe_open(path, "numpy") as file:
        names = _checked_names(list(file.keys()), _REQUIRED, set(_FORMS) - {"header"})
        for name in names:
            tensor = file.get_slice(name)
            _check_form(name, tensor.get_dtype(), tuple(tensor.get_shape()), most_bytes, expected=_FORMS[name][0])
        text = (file.metadata() or {}).get("trace", "")
        return text, {name: file.get_tensor(name) for name in names}


def _checked_names(names: list[str], required: set[str], known: set[str]) -> list[str]:
    missing, unexpected = required - set(names), set(names) - known
    if missing or unexpected or len(set(names)) < len(names):
        raise ValueError(f"missing {sorted(missing)}, unexpected {sorted(unexpected)[:5]} of {len(names)} arrays")
    return names


def _check_form(name: str, dtype: str, shape: tuple[int, ...], most_bytes: int, *, expected: str) -> int:
    """Check an array's declared type, dimensions and size; return its bytes."""
    ndim, itemsize = _FORMS[name][2], np.dtype(_FORMS[name][1]).itemsize
    if dtype != expected or len(shape) != ndim:
        raise ValueError(f"{name} is {dtype}{list(shape)}, not {expected} of {ndim} dimensions")
    size = math.prod(shape) * itemsize
    most = {"images": most_bytes, "header": _MOST_HEADER_BYTES}.get(name, MOST_REQUESTS * itemsize)
    if size > most:
        raise ValueError(f"{name} has {size} bytes, over {most}")
    return size


# --- Version 1 --------------------------------------------------------------------------------------------------------


def _read_npz(path: Path, most_bytes: int) -> tuple[str | bytes, _Arrays]:
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") if name.endswith(".npy") else f"{name}?" for name in archive.namelist()]
        _checked_names(names, _REQUIRED | {"header"}, set(_FORMS))
        arrays = {name: _member(archive, name, most_bytes) for name in names}
    return arrays.pop("header").tobytes(), arrays


def _member(archive: zipfile.ZipFile, name: str, most_bytes: int) -> Shaped[np.ndarray, "..."]:
    """Unpack one member, once its declared shape has been found to be its size, and within bounds."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed in another way than NumPy packs")
    with archive.open(info) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is not in NumPy's format 1.0")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=_MOST_ARRAY_HEADER)
        if by_columns:
            raise ValueError(f"{name} is stored columns first, not rows first")
        size = _check_form(name, dtype.str, shape, most_bytes, expected=_FORMS[name][1])
        if info.file_size - file.tell() != size:
            raise ValueError(f"{name} has {info.file_size - file.tell()} bytes, not the {size} of {list(shape)}")
        content = b"".join(iter(lambda: file.read(_CHUNK), b""))  # to the end, where the checksum is compared
    return np.frombuffer(content, dtype).reshape(shape)
