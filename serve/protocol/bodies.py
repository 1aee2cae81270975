"""HTTP bodies: JSON, and behind it tensors as bytes (Triton's binary extension)."""

import json
import re
from collections.abc import Mapping, Sequence

from starlette.types import Receive

from .errors import EncodingError, RequestError, TooLargeError
from .messages import RequestInput, parse_request
from .requests import Request
from .tensors import Incoming, Outgoing, to_bytes, to_json

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
        msg = f"Content-Encoding: expected none, got {encoding!r}"
        raise EncodingError(msg)
    if length is not None and length.isdecimal() and int(length[:20]) > limit:
        msg = f"Content-Length: expected at most {limit} bytes, got {length[:20]}"
        raise TooLargeError(msg)
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise GoneError
        chunk, more = message.get("body", b""), message.get("more_body", False)
        if (size := size + len(chunk)) > limit:
            msg = f"body: expected at most {limit} bytes, got more"
            raise TooLargeError(msg)
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
            msg = f"Inference-Header-Content-Length: expected the bytes of the JSON, got {got}"
            raise RequestError(msg)
        text, rest = body[: int(header_length)], memoryview(body)[int(header_length) :]
    if text.count(b",") > most_numbers + _COMMAS:
        msg = f"inputs[0].data: expected at most {most_numbers} numbers, got more; images travel better as bytes"
        raise RequestError(msg)
    message = parse_request(text)
    inputs = []
    for i, tensor in enumerate(message.inputs):
        incoming, rest = _incoming(f"inputs[{i}]", tensor, rest)
        inputs.append(incoming)
    if len(rest):
        msg = f"inputs: expected binary_data_size of all bytes behind the JSON, got {len(rest)} bytes more"
        raise RequestError(msg)
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
        msg = f"{field}.parameters: expected {_SIZE} alone, got {min(unknown)[:100]!r}"
        raise RequestError(msg)
    size = tensor.parameters.get(_SIZE)
    shape = tuple(tensor.shape)
    if size is None:
        return Incoming(field, tensor.name, tensor.datatype, shape, numbers=tensor.data), rest
    if type(size) is not int or not 0 <= size <= len(rest) or tensor.data is not None:
        got = "data beside it" if tensor.data is not None else f"{str(size)[:20]}, and {len(rest)} bytes"
        msg = f"{field}.parameters.{_SIZE}: expected the tensor's bytes behind the JSON, got {got}"
        raise RequestError(msg)
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
