"""Targets of a load: an engine in this process, or a server by HTTP or gRPC (Open Inference Protocol).

The clients are thin because they share the cores with the server: requests carry binary tensors and ask for the counted
outputs only, and data are not copied.
"""

import asyncio
import functools
import importlib
import json
import urllib.parse
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import numpy as np
from jaxtyping import Shaped

from gati_jax import InputError
from serve.engine.records import Answer, OverloadedError

from .driving import Ask, Reply

Images = Shaped[np.ndarray, "n *input"]
Parameters = Mapping[str, str | int | float | bool]
DATATYPES = {"uint8": "UINT8", "float32": "FP32"}
INPUT, OUTPUTS = "images", ("class_index", "exit")
RETRY_SECONDS = 0.1  # after a refusal without a hint
REFUSALS = (429, 503, 504)


class Submits(Protocol):
    """The method of ``serve.engine.engine.Engine`` that a load uses."""

    def submit(
        self, images: np.ndarray, *, route: int, deadline: float | None = None, request_id: str = ""
    ) -> list[Future[Answer]]:
        """Admit images."""
        ...


def in_process(
    engine: Submits,
    images: Images,
    *,
    route: int,
    deadline_ms: float | None = None,
    clock: Callable[[], float] | None = None,
) -> Ask:
    """Ask an engine in this process.

    Args:
        engine: Started.
        images: Images, by row.
        route: The route of all requests.
        deadline_ms: The time that an answer may take.
        clock: The engine's, for a deadline.
    """

    async def ask(row: int) -> Reply:
        deadline = clock() + deadline_ms / 1e3 if clock and deadline_ms is not None else None
        (future,) = engine.submit(images[row : row + 1], route=route, deadline=deadline)
        answer = await asyncio.wrap_future(future)
        return Reply(int(answer.class_index), int(answer.exit))

    return ask


def server(url: str, model: str, images: Images, parameters: Parameters) -> AbstractAsyncContextManager[Ask]:
    """Connect to ``http://host:port`` or ``grpc://host:port``.

    Args:
        url: Where the server is.
        model: The name it serves.
        images: Images, by row.
        parameters: Of every request: epsilon, deadline_ms, ...

    Raises:
        InputError: Another kind of address, or images of a type that the protocol lacks.
    """
    address = urllib.parse.urlsplit(url)
    if address.scheme not in ("http", "grpc") or not address.hostname or not address.port:
        raise InputError(f"url: expected http://HOST:PORT or grpc://HOST:PORT, got {url!r}")
    if images.dtype.name not in DATATYPES:
        raise InputError(f"images: expected {' or '.join(DATATYPES)}, got {images.dtype}")
    connect = _http if address.scheme == "http" else _grpc
    return connect(address.hostname, address.port, model, images, parameters)


class _Connection(asyncio.Protocol):
    """A persistent HTTP/1.1 connection with one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self._buffer, self._needed, self._status = bytearray(), -1, 0
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 (narrows the type)
        self.transport = transport

    def ask(self, *parts: bytes | memoryview) -> asyncio.Future[tuple[int, bytes]]:
        """Return a future of the status and the body."""
        self._buffer.clear()
        self._needed = -1
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.writelines(parts)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._needed < 0 and (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end]).lower()
            self._status = int(head[9:12])
            self._needed = int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
            del self._buffer[: end + 4]
        if 0 <= self._needed <= len(self._buffer) and self._answer and not self._answer.done():
            self._answer.set_result((self._status, bytes(self._buffer)))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the server closed the connection"))


@asynccontextmanager
async def _http(host: str, port: int, model: str, images: Images, parameters: Parameters) -> AsyncGenerator[Ask]:
    loop, idle, made = asyncio.get_running_loop(), list[_Connection](), list[_Connection]()
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": INPUT,
                    "shape": [1, *images.shape[1:]],
                    "datatype": DATATYPES[images.dtype.name],
                    "parameters": {"binary_data_size": images[0].nbytes},
                }
            ],
            "outputs": [{"name": name} for name in OUTPUTS],
            "parameters": dict(parameters),
        }
    ).encode()
    head = (
        f"POST /v2/models/{urllib.parse.quote(model)}/infer HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {len(header)}\r\n"
        f"Content-Length: {len(header) + images[0].nbytes}\r\n\r\n"
    ).encode() + header

    async def ask(row: int) -> Reply:
        if not idle:
            _, connection = await loop.create_connection(_Connection, host, port)
            made.append(connection)
        else:
            connection = idle.pop()  # the one used last, so that extra connections of a burst stay idle
        status, body = await connection.ask(head, images[row].tobytes())
        if not connection.transport.is_closing():
            idle.append(connection)
        if status in REFUSALS:
            raise OverloadedError(body.decode(errors="replace"), RETRY_SECONDS)
        if status != 200:  # noqa: PLR2004
            raise RuntimeError(f"HTTP {status}: {body[:200].decode(errors='replace')}")
        values: dict[str, Any] = {output["name"]: output["data"][0] for output in json.loads(body)["outputs"]}
        return Reply(*(int(values[name]) for name in OUTPUTS))

    try:
        yield ask
    finally:
        for connection in made:
            connection.transport.close()


@asynccontextmanager
async def _grpc(host: str, port: int, model: str, images: Images, parameters: Parameters) -> AsyncGenerator[Ask]:
    # Optional packages without types.
    grpc, pb = (importlib.import_module(name) for name in ("grpc", "serve.protocol.inference_pb2"))

    start = pb.ModelInferRequest(model_name=model)
    start.inputs.add(name=INPUT, datatype=DATATYPES[images.dtype.name], shape=[1, *images.shape[1:]])
    for name in OUTPUTS:
        start.outputs.add(name=name)
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(start.parameters[name], kind, value)
    head = start.SerializeToString()
    async with grpc.aio.insecure_channel(f"{host}:{port}") as channel:
        # Concatenated messages merge, so only the image is encoded for each request.
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda row: (
                head + pb.ModelInferRequest(raw_input_contents=[images[row].tobytes()]).SerializeToString()
            ),
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        yield functools.partial(_ask_grpc, grpc, call)


async def _ask_grpc(grpc: Any, call: Any, row: int) -> Reply:  # noqa: ANN401 (untyped)
    codes = grpc.StatusCode
    refusals = (codes.RESOURCE_EXHAUSTED, codes.UNAVAILABLE, codes.DEADLINE_EXCEEDED)
    try:
        response = await call(row)
    except grpc.aio.AioRpcError as error:
        if error.code() in refusals:
            raise OverloadedError(error.details() or "", RETRY_SECONDS) from error
        raise
    values = {
        output.name: int.from_bytes(raw, "little")
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    return Reply(*(values[name] for name in OUTPUTS))
