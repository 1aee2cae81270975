"""Tensors of the protocol <-> NumPy arrays: JSON numbers, or little-endian bytes, which come in without a copy."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from serve.protocol.messages import RequestError

DTYPES = {"UINT8": np.dtype("u1"), "INT32": np.dtype("<i4"), "FP32": np.dtype("<f4")}


BYTES = "BYTES"


_LARGEST = float(np.finfo(np.float32).max)


class Incoming(NamedTuple):
    """A tensor as a client sent it: as bytes, or as numbers."""

    field: str  # its place in the request, for messages
    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes | memoryview | None = None
    numbers: Any = None


class Outgoing(NamedTuple):
    """A tensor for a client."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Shaped[np.ndarray, "..."] | Sequence[bytes]
    binary: bool = True


def to_array(tensor: Incoming) -> Shaped[np.ndarray, "..."]:
    """Return what a tensor holds; a read-only view of its bytes, if it came as bytes.

    Raises:
        RequestError: The datatype is none of ``DTYPES``, or the data is not of this shape or type, or not finite.
    """
    if tensor.datatype not in DTYPES:
        raise RequestError(f"{tensor.field}.datatype: expected one of {', '.join(DTYPES)}, got {tensor.datatype!r}")
    if any(size < 0 for size in tensor.shape):
        raise RequestError(f"{tensor.field}.shape: expected no negative sizes, got {list(tensor.shape)}")
    array = _from_numbers(tensor) if tensor.raw is None else _from_bytes(tensor, tensor.raw)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise RequestError(f"{tensor.field}.data: expected finite numbers, got NaN or infinity")
    return array.reshape(tensor.shape)


def _from_bytes(tensor: Incoming, raw: bytes | memoryview) -> Shaped[np.ndarray, " count"]:
    dtype = DTYPES[tensor.datatype]
    expected = math.prod(tensor.shape) * dtype.itemsize
    if len(raw) != expected:
        of = f"{tensor.datatype}{list(tensor.shape)}"
        raise RequestError(f"{tensor.field}.data: expected {expected} bytes for {of}, got {len(raw)}")
    return np.frombuffer(raw, dtype)


def _from_numbers(tensor: Incoming) -> Shaped[np.ndarray, "..."]:
    dtype, field = DTYPES[tensor.datatype], f"{tensor.field}.data"
    if isinstance(tensor.numbers, list) and not _are_numbers(tensor.numbers, max(1, len(tensor.shape))):
        what = "numbers" if dtype.kind == "f" else "whole numbers"
        raise RequestError(
            f"{field}: expected {what} for {tensor.datatype}, flat or nested as the shape {list(tensor.shape)} says"
        )
    try:
        array = np.asarray(tensor.numbers)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise RequestError(
            f"{field}: expected numbers, flat or nested as the shape {list(tensor.shape)} says, got a ragged list"
        ) from None
    if array.shape not in {tensor.shape, (math.prod(tensor.shape),)}:
        got = "nothing" if tensor.numbers is None else f"shape {list(array.shape)}"
        raise RequestError(
            f"{field}: expected {math.prod(tensor.shape)} numbers of shape {list(tensor.shape)}, got {got}"
        )
    if not array.size:
        return array.astype(dtype)
    if array.dtype.kind not in ("iuf" if dtype.kind == "f" else "iu"):
        raise RequestError(
            f"{field}: expected {'numbers' if dtype.kind == 'f' else 'whole numbers'} for {tensor.datatype}"
        )
    if dtype.kind != "f" and not np.iinfo(dtype).min <= array.min() <= array.max() <= np.iinfo(dtype).max:
        raise RequestError(
            f"{field}: expected {np.iinfo(dtype).min} to {np.iinfo(dtype).max} for {tensor.datatype}, got others"
        )
    with np.errstate(over="ignore"):  # becomes an infinity, which is refused
        return array.astype(dtype)


def _are_numbers(values: list[Any], levels: int) -> bool:
    """Return whether nothing but numbers is in a list of so many levels.

    NumPy would give every element the width of the longest text among them: a body of 4 MB becomes an array of 4 GB.
    """
    kinds = set(map(type, values))
    if kinds <= {int, float}:
        return True
    return kinds == {list} and levels > 1 and all(_are_numbers(row, levels - 1) for row in values)


def to_bytes(tensor: Outgoing) -> bytes:
    """Return a tensor's binary form; strings follow their lengths."""
    if isinstance(tensor.values, np.ndarray):
        return tensor.values.astype(DTYPES[tensor.datatype], copy=False).tobytes()
    return b"".join(len(text).to_bytes(4, "little") + text for text in tensor.values)


def to_json(tensor: Outgoing) -> list[Any]:
    """Return a tensor's numbers or strings, flat.

    JSON has no infinity, which is the base's score: it becomes the largest float32. What is not a number is null.
    """
    if not isinstance(tensor.values, np.ndarray):
        return [text.decode() for text in tensor.values]
    flat = tensor.values.ravel()
    if flat.dtype.kind != "f" or np.isfinite(flat).all():
        return flat.tolist()
    return [None if math.isnan(x) else min(max(x, -_LARGEST), _LARGEST) for x in flat.tolist()]
