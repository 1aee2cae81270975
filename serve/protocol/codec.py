"""Requests and answers <-> HTTP bodies and NumPy arrays: JSON, then tensors as bytes (Triton's binary extension).

gRPC shares all but the body. Bytes become arrays without a copy; numbers in JSON are checked before NumPy sees them.
"""

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from gati_jax.errors import printable

from .messages import (
    EncodingError,
    Given,
    InferenceRequest,
    Parameter,
    Parameters,
    RequestError,
    RequestInput,
    TooLargeError,
    parse,
)
from .model import Model

_TIMEOUTS = (b"x-request-timeout-ms", b"x-envoy-expected-rq-timeout-ms")
DTYPES = {"UINT8": np.dtype("u1"), "INT32": np.dtype("<i4"), "FP32": np.dtype("<f4")}
HEADER_LENGTH = "inference-header-content-length"
MOST_NUMBERS = 2**20
_COMMAS = 10_000  # in a JSON body beside those between numbers
_LARGEST = float(np.finfo(np.float32).max)
_PARAMETERS = ("epsilon", "deadline_ms", "timeout", "binary_data_output")
_SIZE = "binary_data_size"
_HINTS = {"content_type", "triton_enable_empty_final_response"}
"""Parameters that clients send to any server and that change nothing here: MLServer's codecs name the Python type that
an array was; perf_analyzer asks for an end of each answer, and there is one part."""
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's


class Incoming(NamedTuple):
    """A tensor from a client, as bytes or as numbers."""

    field: str  # its path in the request, for error messages
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """An inference request, independent of the transport."""

    model: str
    version: str = ""
    id: str = ""
    parameters: Mapping[str, Parameter] = dataclasses.field(default_factory=dict)
    inputs: Sequence[Incoming]
    outputs: Sequence[tuple[str, Mapping[str, Parameter]]] = ()
    binary: bool = False
    """Whether outputs are sent as bytes by default."""


# A request's fields


def images_of(request: Request, model: Model) -> Shaped[np.ndarray, "n *input"]:
    """Return the images of a request.

    Raises:
        RequestError: They do not fit the model.
    """
    if len(request.inputs) != 1:
        raise RequestError(f"inputs: expected one tensor, {model.input_name}, got {len(request.inputs)}")
    tensor = request.inputs[0]
    if tensor.name != model.input_name:
        raise RequestError(f"{tensor.field}.name: expected {model.input_name}, got {tensor.name[:100]!r}")
    if tensor.datatype not in model.datatypes:
        raise RequestError(
            f"{tensor.field}.datatype: expected {' or '.join(model.datatypes)}, got {tensor.datatype[:100]!r}"
        )
    rows, one = tensor.shape[:1], tensor.shape[1:]
    if tensor.shape == model.input_shape:
        rows, one = (1,), tensor.shape
    if one != model.input_shape or not rows or not 1 <= rows[0] <= model.max_rows:
        expected = f"[n, {', '.join(map(str, model.input_shape))}] with n = 1 to {model.max_rows}"
        raise RequestError(f"{tensor.field}.shape: expected {expected}, got {list(tensor.shape)}")
    return to_array(tensor).reshape(*rows, *one)


def outputs_of(request: Request, model: Model) -> dict[str, bool]:
    """Return the names of the requested outputs, in their order, and whether each is sent as bytes.

    Raises:
        RequestError: There is no such output, or no such parameter.
    """
    default = request.parameters.get("binary_data_output", request.binary)
    if not isinstance(default, bool):
        raise RequestError(f"parameters.binary_data_output: expected true or false, got {printable(repr(default))}")
    requested: dict[str, bool] = {}
    for i, (name, parameters) in enumerate(request.outputs):
        if name not in model.outputs or name in requested:
            raise RequestError(
                f"outputs[{i}].name: expected each at most once of {', '.join(model.outputs)}, got {name[:100]!r}"
            )
        if unknown := parameters.keys() - {"binary_data", *_HINTS}:
            raise RequestError(f"outputs[{i}].parameters: expected binary_data alone, got {min(unknown)[:100]!r}")
        binary = parameters.get("binary_data", default)
        if not isinstance(binary, bool):
            got = printable(repr(binary))
            raise RequestError(f"outputs[{i}].parameters.binary_data: expected true or false, got {got}")
        requested[name] = binary
    return requested or dict.fromkeys(model.outputs, default)


def limits_of(parameters: Mapping[str, Parameter]) -> tuple[float | None, float | None, float]:
    """Return epsilon, deadline_ms, and the seconds that the client waits.

    ``deadline_ms`` also influences the plan; Triton's ``timeout``, in microseconds, does not.

    Raises:
        RequestError: A parameter is out of its bounds, or unknown.
    """
    if unknown := parameters.keys() - {*_PARAMETERS, *_HINTS}:
        raise RequestError(f"parameters: expected {', '.join(_PARAMETERS)} at most, got {min(unknown)[:100]!r}")
    epsilon = _number(parameters, "epsilon", 0.0, 1.0)
    deadline_ms = _number(parameters, "deadline_ms", 1e-3, 1e9)
    timeout = _number(parameters, "timeout", 1.0, 1e12)
    seconds = (math.inf if x is None else x for x in (deadline_ms and deadline_ms * 1e-3, timeout and timeout * 1e-6))
    return epsilon, deadline_ms, min(seconds)


def _number(parameters: Mapping[str, Parameter], name: str, low: float, high: float) -> float | None:
    value = parameters.get(name)
    if value is None:
        return None
    if isinstance(value, bool | str) or not low <= value <= high:
        raise RequestError(f"parameters.{name}: expected a number from {low:g} to {high:g}, got {str(value)[:100]!r}")
    return float(value)


# HTTP bodies


def patience_of(headers: Mapping[bytes, bytes]) -> float:
    """Return the seconds that a client waits, as far as the headers say.

    Raises:
        RequestError: They are no milliseconds.
    """
    given = {name: headers[name] for name in _TIMEOUTS if name in headers}
    for name, value in given.items():
        if not re.fullmatch(rb"\d{1,9}(\.\d{1,9})?", value) or not float(value):
            got = printable(repr(value.decode("latin-1")))
            raise RequestError(f"{name.decode()}: expected milliseconds above 0, got {got}")
    return min((float(value) / 1e3 for value in given.values()), default=math.inf)


def check_encoding(encoding: str) -> None:
    """Check a Content-Encoding header.

    Raises:
        EncodingError: It is not known.
    """
    if encoding.strip().lower() not in {"", "identity", *_WINDOW_BITS}:
        raise EncodingError(f"Content-Encoding: expected gzip, deflate or none, got {encoding[:100]!r}")


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """Undo a Content-Encoding.

    Inflation ends at the limit, however small the body was: 32 kB of gzip may be 32 MB of zeros. One stream is read,
    because each of many empty ones would have the rest of the body copied.

    Args:
        body: What was sent.
        encoding: The header's value, which ``check_encoding`` let pass.
        limit: The most bytes that may result.

    Raises:
        RequestError: The body is not encoded so.
        TooLargeError: More bytes would result.
    """
    bits = _WINDOW_BITS.get(encoding.strip().lower())
    if bits is None:
        return body
    if bits == _WINDOW_BITS["deflate"] and (int.from_bytes(body[:2], "big") % 31 or body[:1] == b"\0"):
        bits = -bits  # some clients leave out zlib's header, whose two bytes are a multiple of 31
    stream = zlib.decompressobj(bits)
    try:
        inflated = stream.decompress(body, limit + 1)
    except zlib.error:
        raise RequestError(f"body: expected {encoding[:20]} data, as Content-Encoding says, got other bytes") from None
    if len(inflated) > limit:
        raise TooLargeError(f"body: expected at most {limit} bytes once it is inflated, got more")
    if not stream.eof or stream.unused_data:
        got = "bytes behind it" if stream.eof else "a part of it"
        raise RequestError(f"body: expected one whole stream of {encoding[:20]}, got {got}")
    return inflated


def decode(
    body: bytes, header_length: str | None, *, model: str, version: str = "", most_numbers: int = MOST_NUMBERS
) -> Request:
    """Decode a body.

    Args:
        body: JSON, then the bytes of the tensors that have a ``binary_data_size``, in their order.
        header_length: The Inference-Header-Content-Length header: the bytes of the JSON, if tensors follow it.
        model: The model's name, from the path.
        version: Its version; empty for any.
        most_numbers: The most numbers in the JSON, roughly; more are refused before parsing, which would take seconds.

    Raises:
        RequestError: It is malformed.
    """
    text, rest = body, memoryview(b"")
    if header_length is not None:
        if not re.fullmatch(r"[0-9]{1,12}", header_length) or int(header_length) > len(body):
            got = f"{header_length[:20]!r} with a body of {len(body)}"
            raise RequestError(f"Inference-Header-Content-Length: expected the bytes of the JSON, got {got}")
        text, rest = body[: int(header_length)], memoryview(body)[int(header_length) :]
    if text.count(b",") > most_numbers + _COMMAS:
        raise RequestError(
            f"inputs[0].data: expected at most {most_numbers} numbers, got more; images travel better as bytes"
        )
    message = parse(InferenceRequest, text)
    inputs = []
    for i, tensor in enumerate(message.inputs):
        incoming, rest = _incoming(f"inputs[{i}]", tensor, rest)
        inputs.append(incoming)
    if len(rest):
        raise RequestError(
            f"inputs: expected binary_data_size of all bytes behind the JSON, got {len(rest)} bytes more"
        )
    return Request(
        model=model,
        version=version,
        id=message.id or "",
        parameters=_present(message.parameters),
        inputs=inputs,
        outputs=[(output.name, _present(output.parameters)) for output in message.outputs or ()],
    )


def _present(parameters: Given) -> Parameters:
    return {name: value for name, value in (parameters or {}).items() if value is not None}


def size_of(field: str, parameters: Mapping[str, Parameter]) -> Parameter | None:
    """Return the ``binary_data_size`` of an input's parameters, if it is there.

    Raises:
        RequestError: There are others that matter: a region of shared memory, for example.
    """
    if unknown := parameters.keys() - {_SIZE, *_HINTS}:
        raise RequestError(f"{field}.parameters: expected {_SIZE} alone, got {min(unknown)[:100]!r}")
    return parameters.get(_SIZE)


def _incoming(field: str, tensor: RequestInput, rest: memoryview) -> tuple[Incoming, memoryview]:
    """Return a tensor with its part of the bytes, and the remaining bytes."""
    size = size_of(field, _present(tensor.parameters))
    shape = tuple(tensor.shape)
    if size is None:
        return Incoming(field, tensor.name, tensor.datatype, shape, numbers=tensor.data), rest
    if type(size) is not int or not 0 <= size <= len(rest) or tensor.data is not None:
        got = "data beside it" if tensor.data is not None else f"{str(size)[:20]}, and {len(rest)} bytes"
        raise RequestError(f"{field}.parameters.{_SIZE}: expected the tensor's bytes behind the JSON, got {got}")
    return Incoming(field, tensor.name, tensor.datatype, shape, raw=rest[:size]), rest[size:]


def encode(head: Mapping[str, object], outputs: Sequence[Outgoing]) -> tuple[bytes, int | None]:
    """Encode an answer, whose ``head`` is all but its outputs; return the bytes of its JSON, too, if tensors follow."""
    described, parts = [], []
    for tensor in outputs:
        one = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if tensor.binary:
            parts.append(to_bytes(tensor))
            one["parameters"] = {_SIZE: len(parts[-1])}
        else:
            one["data"] = to_json(tensor)
        described.append(one)
    text = json.dumps({**head, "outputs": described}, allow_nan=False).encode()
    return b"".join((text, *parts)), (len(text) if parts else None)


# Tensors


def to_array(tensor: Incoming) -> Shaped[np.ndarray, "..."]:
    """Return a tensor as an array; if it came as bytes, as a read-only view of them.

    Raises:
        RequestError: The datatype is none of ``DTYPES``, or the data is not of this shape or type, or not finite.
    """
    if tensor.datatype not in DTYPES:
        raise RequestError(
            f"{tensor.field}.datatype: expected one of {', '.join(DTYPES)}, got {tensor.datatype[:100]!r}"
        )
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
    dtype, field, shape = DTYPES[tensor.datatype], f"{tensor.field}.data", list(tensor.shape)
    what = "numbers" if dtype.kind == "f" else "whole numbers"
    expected = f"{field}: expected {what} for {tensor.datatype}, flat or nested as the shape {shape} says"
    if isinstance(tensor.numbers, list) and not _are_numbers(tensor.numbers, max(1, len(shape))):
        raise RequestError(expected)
    try:
        array = np.asarray(tensor.numbers)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise RequestError(f"{expected}, got a ragged list") from None
    if array.shape not in {tensor.shape, (math.prod(shape),)}:
        got = "nothing" if tensor.numbers is None else f"shape {list(array.shape)}"
        raise RequestError(f"{field}: expected {math.prod(shape)} numbers of shape {shape}, got {got}")
    if not array.size:
        return array.astype(dtype)
    if array.dtype.kind not in ("iuf" if dtype.kind == "f" else "iu"):
        raise RequestError(expected)
    if dtype.kind != "f" and not np.iinfo(dtype).min <= array.min() <= array.max() <= np.iinfo(dtype).max:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        raise RequestError(f"{field}: expected {low} to {high} for {tensor.datatype}, got others")
    with np.errstate(over="ignore"):  # an infinity results, and is refused
        return array.astype(dtype)


def _are_numbers(values: list[Any], levels: int) -> bool:
    """Return whether a list, nested at most so many levels deep, holds numbers only.

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

    JSON has no infinity, which is the base's score: it becomes the largest float32. NaN becomes null.
    """
    if not isinstance(tensor.values, np.ndarray):
        return [text.decode() for text in tensor.values]
    flat = tensor.values.ravel()
    if flat.dtype.kind != "f" or np.isfinite(flat).all():
        return flat.tolist()
    return [None if math.isnan(x) else min(max(x, -_LARGEST), _LARGEST) for x in flat.tolist()]
