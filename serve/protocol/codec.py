"""A request out of its HTTP body: JSON, and behind it tensors as bytes (Triton's binary extension)."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Shaped
from starlette.types import Receive

from serve.protocol.tensors import Incoming, Outgoing, to_array, to_bytes, to_json

from .messages import EncodingError, Parameter, RequestError, RequestInput, TooLargeError, parse_request
from .model import INPUT, Model

_KNOWN = ("epsilon", "deadline_ms", "timeout", "binary_data_output")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A request, out of its envelope."""

    model: str
    version: str = ""
    id: str = ""
    parameters: Mapping[str, Parameter] = dataclasses.field(default_factory=dict)
    inputs: Sequence[Incoming]
    outputs: Sequence[tuple[str, Mapping[str, Parameter]]] = ()
    binary: bool = False
    """Whether outputs are sent as bytes where nothing is said of them."""


def images_of(request: Request, model: Model) -> Shaped[np.ndarray, "n *input"]:
    """Return the images of a request.

    Raises:
        RequestError: They are not what the model takes.
    """
    if len(request.inputs) != 1:
        raise RequestError(f"inputs: expected one tensor, {INPUT}, got {len(request.inputs)}")
    tensor = request.inputs[0]
    if tensor.name != INPUT:
        raise RequestError(f"{tensor.field}.name: expected {INPUT}, got {tensor.name[:100]!r}")
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


def wanted_of(request: Request, model: Model) -> dict[str, bool]:
    """Return the names of the outputs, in their order, and whether each is sent as bytes.

    Raises:
        RequestError: There is no such output, or a parameter is none.
    """
    default = request.parameters.get("binary_data_output", request.binary)
    if not isinstance(default, bool):
        raise RequestError(f"parameters.binary_data_output: expected true or false, got {default!r}")
    wanted: dict[str, bool] = {}
    for i, (name, parameters) in enumerate(request.outputs):
        if name not in model.outputs or name in wanted:
            raise RequestError(
                f"outputs[{i}].name: expected each at most once of {', '.join(model.outputs)}, got {name[:100]!r}"
            )
        if unknown := parameters.keys() - {"binary_data"}:
            raise RequestError(f"outputs[{i}].parameters: expected binary_data alone, got {min(unknown)[:100]!r}")
        binary = parameters.get("binary_data", default)
        if not isinstance(binary, bool):
            raise RequestError(f"outputs[{i}].parameters.binary_data: expected true or false, got {binary!r}")
        wanted[name] = binary
    return wanted or dict.fromkeys(model.outputs, default)


def wishes_of(parameters: Mapping[str, Parameter]) -> tuple[float | None, float | None, float]:
    """Return epsilon, deadline_ms, and the seconds that the client waits.

    ``deadline_ms`` also chooses the plan; Triton's ``timeout``, in microseconds, does not.

    Raises:
        RequestError: One is not a number in its bounds, or there are other parameters.
    """
    if unknown := parameters.keys() - set(_KNOWN):
        raise RequestError(f"parameters: expected {', '.join(_KNOWN)} at most, got {min(unknown)[:100]!r}")
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


HEADER_LENGTH = "inference-header-content-length"
MOST_NUMBERS = 2**20
_SIZE = "binary_data_size"
_COMMAS = 10_000  # beside those between numbers


class GoneError(Exception):
    """The client left while it was sending."""


async def read(receive: Receive, length: str | None, encoding: str | None, limit: int) -> bytes:
    """Read a body, but never more than ``limit`` bytes of it.

    Args:
        receive: ASGI's.
        length: The Content-Length header: who announces too much is refused before anything is read.
        encoding: The Content-Encoding header.
        limit: Bytes.

    Raises:
        TooLargeError: There is more.
        EncodingError: It is compressed, which a small body of zeros would use to fill the memory.
        GoneError: The client left.
    """
    if encoding not in {None, "", "identity"}:
        raise EncodingError(f"Content-Encoding: expected none, got {encoding!r}")
    if length is not None and length.isdecimal() and int(length[:20]) > limit:
        raise TooLargeError(f"Content-Length: expected at most {limit} bytes, got {length[:20]}")
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise GoneError
        chunk, more = message.get("body", b""), message.get("more_body", False)
        if (size := size + len(chunk)) > limit:
            raise TooLargeError(f"body: expected at most {limit} bytes, got more")
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def decode(
    body: bytes, header_length: str | None, *, model: str, version: str = "", most_numbers: int = MOST_NUMBERS
) -> Request:
    """Take a request out of a body.

    Args:
        body: JSON, then the bytes of the tensors that have a ``binary_data_size``, in their order.
        header_length: The Inference-Header-Content-Length header: the bytes of the JSON, if it is not all.
        model: Who is asked.
        version: In which version; any, if empty.
        most_numbers: In the JSON, roughly; more are refused before they are read, which would take seconds.

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
    message = parse_request(text)
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
        id=message.id,
        parameters=message.parameters,
        inputs=inputs,
        outputs=[(output.name, output.parameters) for output in message.outputs],
    )


def _incoming(field: str, tensor: RequestInput, rest: memoryview) -> tuple[Incoming, memoryview]:
    """Return a tensor with its part of the bytes, and those that are left."""
    if unknown := tensor.parameters.keys() - {_SIZE}:
        raise RequestError(f"{field}.parameters: expected {_SIZE} alone, got {min(unknown)[:100]!r}")
    size = tensor.parameters.get(_SIZE)
    shape = tuple(tensor.shape)
    if size is None:
        return Incoming(field, tensor.name, tensor.datatype, shape, numbers=tensor.data), rest
    if type(size) is not int or not 0 <= size <= len(rest) or tensor.data is not None:
        got = "data beside it" if tensor.data is not None else f"{str(size)[:20]}, and {len(rest)} bytes"
        raise RequestError(f"{field}.parameters.{_SIZE}: expected the tensor's bytes behind the JSON, got {got}")
    return Incoming(field, tensor.name, tensor.datatype, shape, raw=rest[:size]), rest[size:]


def encode(head: Mapping[str, object], outputs: Sequence[Outgoing]) -> tuple[bytes, int | None]:
    """Put an answer into a body.

    Args:
        head: The response without its outputs.
        outputs: These.

    Returns:
        The body, and how much of it is JSON, if not all.
    """
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
