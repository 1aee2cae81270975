"""gRPC's streams, inference message by message, and the standard services: health and reflection.

A stream ends with the service, with UNAVAILABLE: an idle one would delay the end of the process otherwise.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from ..engine.records import ServeError
from . import health_pb2, reflection_pb2
from . import inference_pb2 as pb
from .admission import Admission
from .messages import Refusal, RequestError, UnknownModelError
from .service import Service

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION = (reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name,)
REFLECTION = (*REFLECTION, REFLECTION[0].replace(".v1.", ".v1alpha."))  # which older clients ask, in the same messages
_FILES = (pb.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
_SERVICES = [service.full_name for file in _FILES for service in file.services_by_name.values()]
_LIVENESS, _READINESS = ("liveness",), ("", "readiness", _SERVICES[0])
_AHEAD = 8  # requests of one stream that are answered at a time
_LONGEST = 1024  # bytes of a question about the protocol, which its answer repeats
_POLL = 0.25  # seconds

Context = grpc.aio.ServicerContext[bytes, Message]
Stream = Callable[[AsyncIterator[bytes], Context], AsyncIterator[Message]]
Begin = Callable[[Context], Awaitable[None]]


def infer(service: Service, begin: Begin, answer: Callable[[bytes, Context], Awaitable[Message]]) -> Stream:
    """Return ModelStreamInfer, whose answers are in the order of its requests.

    Args:
        service: Ends the stream.
        begin: Called first; aborts if the client has no token.
        answer: Answers one message.
    """

    async def call(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Message]:
        await begin(context)
        pending: asyncio.Queue[asyncio.Future[Message] | None] = asyncio.Queue()
        free = asyncio.Semaphore(_AHEAD)  # a client that reads no answers cannot ask more

        async def read() -> None:
            async for body in _until_closed(service, messages):
                await free.acquire()
                pending.put_nowait(asyncio.ensure_future(answer(body, context)))

        reading = asyncio.create_task(read())
        reading.add_done_callback(lambda _: pending.put_nowait(None))
        task = None
        try:
            while (task := await pending.get()) is not None:
                yield await task
                free.release()
            await reading  # raises why it ended
            _end(service, context)
        finally:  # if the client has left, what it asked is abandoned
            reading.cancel()
            for one in (task, *(pending.get_nowait() for _ in range(pending.qsize()))):
                if one is not None:
                    one.cancel()

    return call


def to_part(reply: Message | Refusal, body: bytes) -> pb.ModelStreamInferResponse:
    """Return the part of a stream that answers a request; errors name the request, too."""
    part = pb.ModelStreamInferResponse()
    if isinstance(reply, Refusal):
        part.error_message = reply.message
        with contextlib.suppress(DecodeError):
            part.infer_response.id = pb.ModelInferRequest.FromString(body).id
    elif isinstance(reply, pb.ModelInferResponse):
        part.infer_response.MergeFrom(reply)
        part.infer_response.parameters["triton_final_response"].bool_param = True  # of a request with one answer
    return part


def check(service: Service, request: health_pb2.HealthCheckRequest) -> Message:
    """Return whether a service is healthy: "liveness", or readiness by any of its names.

    Raises:
        UnknownModelError: There is no such service.
    """
    status = _status(service, request)
    if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
        expected = ", ".join(map(repr, (*_READINESS, *_LIVENESS)))
        raise UnknownModelError(f"service: expected one of {expected}, got {request.service[:100]!r}")
    return health_pb2.HealthCheckResponse(status=status)


def watch(service: Service) -> Stream:
    """Return Watch, which says when a service's health changes."""

    async def call(_: object, context: Context) -> AsyncIterator[Message]:
        body = b"?" * (_LONGEST + 1)
        with contextlib.suppress(ServeError), service.door.enter(images=0) as admission:
            body = await read(context, admission, service.door.messages)
        request, last = await _parse(health_pb2.HealthCheckRequest, body, context), None
        while not service.closed:
            if (status := _status(service, request)) != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            await asyncio.sleep(_POLL)
        _end(service, context)

    return call


def reflect(service: Service, begin: Begin) -> Stream:
    """Return ServerReflectionInfo, which describes the methods and messages to clients like grpcurl."""

    async def call(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Message]:
        await begin(context)
        async for body in _until_closed(service, messages):
            yield _describe(await _parse(reflection_pb2.ServerReflectionRequest, body, context))
        _end(service, context)

    return call


def _status(service: Service, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse.ServingStatus:
    if request.service not in {*_LIVENESS, *_READINESS}:
        return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    well = request.service in _LIVENESS or service.ready
    return health_pb2.HealthCheckResponse.SERVING if well else health_pb2.HealthCheckResponse.NOT_SERVING


def _describe(request: reflection_pb2.ServerReflectionRequest) -> reflection_pb2.ServerReflectionResponse:
    response = reflection_pb2.ServerReflectionResponse(valid_host=request.host, original_request=request)
    kind = request.WhichOneof("message_request")
    if kind == "list_services":
        for name in _SERVICES:
            response.list_services_response.service.add(name=name)
        return response
    named = request.file_by_filename if kind == "file_by_filename" else request.file_containing_symbol
    for file in _FILES:  # none of them imports another one
        with contextlib.suppress(KeyError):
            if named == file.name if kind == "file_by_filename" else _declares(file, named):
                response.file_descriptor_response.file_descriptor_proto.append(file.serialized_pb)
                return response
    code = grpc.StatusCode.NOT_FOUND if named else grpc.StatusCode.UNIMPLEMENTED  # there are no extensions
    response.error_response.error_code, response.error_response.error_message = code.value
    return response


def _declares(file: Any, symbol: str) -> bool:  # noqa: ANN401 (a FileDescriptor, of which there are three kinds)
    service, _, method = symbol.rpartition(".")
    if service in _SERVICES:
        return any(method in one.methods_by_name for one in file.services_by_name.values() if one.full_name == service)
    return file.pool.FindFileContainingSymbol(symbol) is not None


async def read(context: Context, admission: Admission, turn: asyncio.Semaphore) -> bytes:
    """Read the one message of a call.

    Its length is not announced, so it counts once it is here; until then, ``turn`` bounds how many there are.

    Raises:
        ServeError: It came too slowly, there is none, or its bytes are too many.
    """
    async with admission.reading():
        async with turn:
            body = cast("bytes | object", await context.read())  # its end has another type
        if not isinstance(body, bytes):
            raise RequestError("message: expected one, got none")
        admission.received(len(body))
        return body


async def _parse(kind: type[Any], body: bytes, context: Context) -> Any:  # noqa: ANN401
    with contextlib.suppress(DecodeError):
        if len(body) <= _LONGEST:
            return kind.FromString(body)
    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"message: expected a {kind.__name__} of 1 kB at most")
    raise AssertionError  # abort has raised


async def _until_closed(service: Service, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the messages of a stream until the service admits nothing more."""
    reading = None
    try:
        while not service.closed:
            reading = reading or asyncio.ensure_future(_next(messages))
            await asyncio.wait((reading,), timeout=_POLL)
            if reading.done():
                body, reading = reading.result(), None
                if body is None:
                    return
                yield body
    finally:
        if reading is not None:
            reading.cancel()


async def _next(messages: AsyncIterator[bytes]) -> bytes | None:
    return await anext(messages, None)


def _end(service: Service, context: Context) -> None:
    if service.closed:
        context.set_code(grpc.StatusCode.UNAVAILABLE)
        context.set_details("the server is stopping")
