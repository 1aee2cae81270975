"""The protocol over gRPC: methods, messages, tokens, and errors as status codes."""

import contextvars
import functools
import logging
import math
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf import json_format
from google.protobuf.message import Message

from .. import logs
from ..engine.records import ServeError
from ..metrics import Metrics
from . import grpc_streams as streams
from . import health_pb2
from . import inference_pb2 as pb
from .admission import Admission, Limits
from .grpc_messages import decode, encode, parse
from .messages import REASONS, Refusal, RequestError, UnauthorizedError, refusal
from .model import Model
from .repository import check_operator
from .service import Service, check_token

HEALTH = ("ServerLive", "ServerReady")
OPERATED = ("RepositoryModelLoad", "RepositoryModelUnload")
_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_log, _access = logging.getLogger("serve.grpc"), logging.getLogger(logs.ACCESS)
_arrived: contextvars.ContextVar[float] = contextvars.ContextVar("arrived")

Context = grpc.aio.ServicerContext[bytes, Message]
T = TypeVar("T")
Method = Callable[[Any, Context, Admission], Awaitable[Message]]
Check = Callable[[str | None], None]
"""Raises if a client's authorization does not allow a call."""


def create_server(
    service: Service, metrics: Metrics, *, token: str | None = None, operator: str | None = None
) -> grpc.aio.Server:
    """Return the gRPC side of a service, without a port.

    See ``serve.protocol.http.create_app`` for the arguments; the token comes as the metadata ``authorization``.
    """
    server = grpc.aio.server(interceptors=(_Clock(),), options=_options(service.door.limits))

    def check_of(name: str) -> Check:
        if name in HEALTH:
            return _allow
        return (
            functools.partial(check_operator, operator) if name in OPERATED else functools.partial(check_token, token)
        )

    methods = _methods(service)
    # Clients see unary methods. As a stream's, a message is read by the method, once the token was checked and the
    # request admitted. It is parsed there, too: here, a message that cannot be parsed would be an internal error.
    unary, stream = grpc.stream_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
    handlers = {
        name: unary(
            _guard(name, getattr(pb, f"{name}Request"), method, service, metrics, check_of(name)),
            response_serializer=_serialize,
        )
        for name, method in methods.items()
    }

    async def begin(context: Context) -> None:
        await _begin_stream(context, metrics, token)

    async def answer(body: bytes, context: Context) -> Message:
        _arrived.set(time.monotonic())

        async def work() -> Message:
            with service.admit(patience=_remaining(context)) as admission:
                admission.received(len(body))
                return await methods["ModelInfer"](parse(pb.ModelInferRequest, body), context, admission)

        return streams.to_part(await _attempt(work(), "ModelStreamInfer", context, metrics), body)

    async def check(request: health_pb2.HealthCheckRequest, _: Context, __: Admission) -> Message:
        return streams.check(service, request)

    reflect = stream(streams.reflect(service, begin), response_serializer=_serialize)
    services = {
        _SERVICE.full_name: handlers
        | {"ModelStreamInfer": stream(streams.infer(service, begin, answer), response_serializer=_serialize)},
        streams.HEALTH: {
            "Check": unary(
                _guard("HealthCheck", health_pb2.HealthCheckRequest, check, service, metrics, _allow),
                response_serializer=_serialize,
            ),
            "Watch": stream(streams.watch(service), response_serializer=_serialize),
        },
        **{name: {"ServerReflectionInfo": reflect} for name in streams.REFLECTION},
    }
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(name, methods) for name, methods in services.items()]
    )
    return server


def _options(limits: Limits) -> tuple[tuple[str, int], ...]:
    keep_alive = round(limits.keep_alive * 1e3)
    return (
        ("grpc.so_reuseport", 0),  # otherwise a second server on the same port silently takes half of the requests
        ("grpc.max_receive_message_length", limits.max_body),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", limits.grpc_streams),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_connection_idle_ms", keep_alive),  # without a call
        ("grpc.keepalive_time_ms", keep_alive),  # finds dead clients
        ("grpc.max_metadata_size", limits.header_bytes),
        ("grpc.absolute_max_metadata_size", limits.header_bytes),
    )


def _allow(_: str | None) -> None:
    """Allow every client."""


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


class _Clock(grpc.aio.ServerInterceptor):
    """Notes when a call's headers were there: its message comes later, and a method is called after that."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Pass on a call."""
        _arrived.set(time.monotonic())
        return await continuation(handler_call_details)


def _methods(service: Service) -> dict[str, Method]:
    """Return what answers each method of the protocol; JSON's replies have the fields of gRPC's messages."""

    async def infer(request: pb.ModelInferRequest, _: Context, admission: Admission) -> Message:
        # If the client leaves, grpc cancels this coroutine, and the service abandons the images.
        model = service.models.find(request.model_name, request.model_version).model
        decoded = decode(request, model.most_numbers)
        return encode(await service.infer(decoded, admission=admission, request_id=logs.request_id.get()))

    def model_of(request: pb.ModelMetadataRequest | pb.ModelConfigRequest) -> Model:
        return service.models.find(request.name, request.version).model

    def index(request: pb.RepositoryIndexRequest) -> dict[str, Any]:
        _check_repository(request)
        return {"models": [entry.model_dump() for entry in service.models.index(ready=request.ready)]}

    async def load(request: pb.RepositoryModelLoadRequest, _: Context, __: Admission) -> Message:
        _check_repository(request)
        if request.parameters:
            raise RequestError("parameters: expected none, got some")
        await service.models.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def unload(request: pb.RepositoryModelUnloadRequest, _: Context, __: Admission) -> Message:
        _check_repository(request)
        await service.models.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    replies: dict[str, Callable[[Any], dict[str, Any]]] = {
        "ServerLive": lambda _: {"live": service.alive},
        "ServerReady": lambda _: {"ready": service.ready},
        "ServerMetadata": lambda _: service.metadata().model_dump(),
        "ModelReady": lambda request: {"ready": service.is_ready(request.name, request.version)},
        "ModelMetadata": lambda request: model_of(request).metadata().model_dump(),
        "ModelConfig": lambda request: {"config": model_of(request).config().model_dump()},
        "ModelStatistics": lambda request: service.statistics(request.name, request.version).model_dump(),
        "RepositoryIndex": index,
    }
    long = {"ModelInfer": infer, "RepositoryModelLoad": load, "RepositoryModelUnload": unload}
    return {**long, **{name: _replying(reply, name) for name, reply in replies.items()}}


def _replying(reply: Callable[[Any], dict[str, Any]], name: str) -> Method:
    async def method(request: Message, _: Context, __: Admission) -> Message:
        message = getattr(pb, f"{name}Response")()
        return json_format.ParseDict(reply(request), message, ignore_unknown_fields=True)

    return method


def _check_repository(
    request: pb.RepositoryIndexRequest | pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest,
) -> None:
    if request.repository_name:
        raise RequestError(f"repository_name: expected none, got {request.repository_name[:100]!r}")


def _guard(
    name: str, kind: type[Message], method: Method, service: Service, metrics: Metrics, check: Check
) -> Callable[[object, Context], Awaitable[Message]]:
    """Wrap a method: token, admission, request id, counts, and errors as status codes."""
    door = service.door

    async def work(context: Context) -> Message:
        check(_metadata(context).get("authorization"))
        if kind is pb.ModelInferRequest:
            arrived = _arrived.get()
            patience = time.monotonic() - arrived + _remaining(context)
            with service.admit(arrived=arrived, patience=patience) as admission:
                body = await streams.read(context, admission, door.messages)
                return await method(parse(kind, body), context, admission)
        with door.enter(images=0) as admission:
            # Probes say nothing that matters: they are answered even if their message does not come.
            body = b"" if name in HEALTH else await streams.read(context, admission, door.questions)
            return await method(parse(kind, body), context, admission)

    async def call(_: object, context: Context) -> Message:
        request_id = _begin(context)
        reply = await _attempt(work(context), name, context, metrics)
        if isinstance(reply, Refusal):
            await _abort(context, reply, request_id)
        context.set_trailing_metadata((("x-request-id", request_id),))
        return reply

    return call


async def _begin_stream(context: Context, metrics: Metrics, token: str | None) -> None:
    """Check the token of a stream; its messages are counted one by one."""
    request_id = _begin(context)
    context.set_trailing_metadata((("x-request-id", request_id),))
    try:
        check_token(token, _metadata(context).get("authorization"))
    except UnauthorizedError as error:
        refused = refusal(error)
        metrics.request("grpc", "stream", refused.status, time.monotonic() - _arrived.get())
        metrics.refused(REASONS[UnauthorizedError])
        await _abort(context, refused, request_id)


async def _attempt(work: Awaitable[T], name: str, context: Context, metrics: Metrics) -> T | Refusal:
    """Return what a method returns, or why it does not; count it, and log it if that is asked for."""
    status, reason = 499, None  # if it is cancelled: the client has left
    with metrics.in_flight("grpc").track_inprogress():
        try:
            reply = await work
        except Exception as error:  # noqa: BLE001 (logged; the client gets INTERNAL)
            reply, reason = refusal(error), REASONS.get(type(error))
            status = reply.status
            if not isinstance(error, ServeError):
                _log.exception("a request failed", extra={"method": name})
        else:
            status = 200
        finally:
            seconds = time.monotonic() - _arrived.get()
            metrics.request("grpc", name, status, seconds)
            if reason:
                metrics.refused(reason)
            if _access.isEnabledFor(logging.INFO):
                line = {"protocol": "grpc", "client": _address(context), "method": "POST", "path": name}
                _access.info("request", extra=line | {"status": status, "ms": round(seconds * 1e3, 3)})
    return reply


async def _abort(context: Context, refused: Refusal, request_id: str) -> NoReturn:
    trailing = (("x-request-id", request_id),)
    if refused.retry_after is not None:  # gRPC's name for it, which clients' retry policies heed
        trailing = (*trailing, ("grpc-retry-pushback-ms", str(round(refused.retry_after * 1e3))))
    await context.abort(_CODES.get(refused.status, grpc.StatusCode.INVALID_ARGUMENT), refused.message, trailing)
    raise AssertionError  # abort has raised


def _remaining(context: Context) -> float:
    remaining = cast("float | None", context.time_remaining())  # none without a deadline, whatever its type says
    return math.inf if remaining is None else remaining


def _begin(context: Context) -> str:
    given = _metadata(context)
    return logs.begin(given.get("x-request-id"), given.get("traceparent"))


def _metadata(context: Context) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _address(context: Context) -> str:
    """Return the client's address as HTTP's lines have it: gRPC writes "ipv4:127.0.0.1:5" and "ipv6:%5B::1%5D:5"."""
    return urllib.parse.unquote(context.peer().partition(":")[2])
