"""The protocol over gRPC: methods, messages, tokens, and errors as status codes."""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

from serve import logs
from serve.engine.records import ServeError
from serve.metrics import Metrics

from . import inference_pb2 as pb
from .codec import MOST_NUMBERS, Incoming, Request, to_bytes
from .messages import Parameter, Parameters, RequestError, refusal
from .service import Response, Service, check_token

HEALTH = ("ServerLive", "ServerReady")
_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_CONTENTS = {"UINT8": "uint_contents", "INT32": "int_contents", "FP32": "fp32_contents"}
_log = logging.getLogger("serve.grpc")

Context = grpc.aio.ServicerContext[bytes, Message]
M = TypeVar("M", bound=Message)
Method = Callable[[Any, Context], Awaitable[Message]]


def create_server(service: Service, metrics: Metrics, *, limit: int, token: str | None = None) -> grpc.aio.Server:
    """Return the gRPC side of a service, without a port.

    See ``serve.protocol.http.create_app`` for the arguments; the token comes as the metadata ``authorization``.
    """
    server = grpc.aio.server(
        options=(
            ("grpc.so_reuseport", 0),  # otherwise a second server on the same port silently takes half of the requests
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", -1),
        )
    )
    handlers = {
        # Messages are parsed by the method: here, a message that cannot be parsed would be an internal error.
        name: grpc.unary_unary_rpc_method_handler(
            _guard(name, method, metrics, None if name in HEALTH else token),
            request_deserializer=None,
            response_serializer=getattr(pb, f"{name}Response").SerializeToString,
        )
        for name, method in _methods(service).items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers),))
    return server


def _methods(service: Service) -> dict[str, Method]:
    """Return what answers each method of the protocol; JSON's replies have the fields of gRPC's messages."""
    model = service.model

    async def infer(request: pb.ModelInferRequest, context: Context) -> Message:
        # If the client leaves, grpc cancels this coroutine, and the service abandons the images.
        model.check(request.model_name, request.model_version)
        remaining, request_id = context.time_remaining(), logs.request_id.get()
        decoded = decode(request, model.most_numbers)
        return encode(await service.infer(decoded, remaining=remaining, request_id=request_id))

    def model_ready(request: pb.ModelReadyRequest) -> dict[str, Any]:
        model.check(request.name, request.version)
        return {"ready": service.ready}

    replies: dict[str, Callable[[Any], dict[str, Any]]] = {
        "ServerLive": lambda _: {"live": True},
        "ServerReady": lambda _: {"ready": service.ready},
        "ServerMetadata": lambda _: service.metadata().model_dump(),
        "ModelReady": model_ready,
        "ModelMetadata": lambda request: model.check(request.name, request.version).metadata().model_dump(),
        "ModelConfig": lambda request: {"config": model.check(request.name, request.version).config().model_dump()},
        "ModelStatistics": lambda request: service.statistics(request.name, request.version).model_dump(),
    }
    return {"ModelInfer": infer, **{name: _replying(reply, name) for name, reply in replies.items()}}


def _replying(reply: Callable[[Any], dict[str, Any]], name: str) -> Method:
    async def method(request: Message, _: Context) -> Message:
        message = getattr(pb, f"{name}Response")()
        return json_format.ParseDict(reply(request), message, ignore_unknown_fields=True)

    return method


def decode(message: pb.ModelInferRequest, most_numbers: int = MOST_NUMBERS) -> Request:
    """Decode a message, with at most ``most_numbers`` numbers in the contents of a tensor.

    Raises:
        RequestError: Its parts do not fit together.
    """
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise RequestError(
            f"raw_input_contents: expected one for each of the {len(message.inputs)} inputs, got {len(raw)}"
        )
    inputs = []
    for i, tensor in enumerate(message.inputs):
        field, shape = f"inputs[{i}]", tuple(tensor.shape)
        if raw and tensor.HasField("contents"):
            raise RequestError(f"{field}.contents: expected nothing beside raw_input_contents")
        if tensor.parameters:
            raise RequestError(f"{field}.parameters: expected none, got {min(tensor.parameters)[:100]!r}")
        contents = () if raw else getattr(tensor.contents, _CONTENTS.get(tensor.datatype, "bytes_contents"))
        if len(contents) > most_numbers:
            raise RequestError(f"{field}.contents: expected at most {most_numbers} numbers, got {len(contents)}")
        numbers = None if raw else list(contents)
        inputs.append(
            Incoming(field, tensor.name, tensor.datatype, shape, raw=raw[i] if raw else None, numbers=numbers)
        )
    return Request(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        parameters=_parameters("parameters", message.parameters),
        inputs=inputs,
        outputs=[
            (output.name, _parameters(f"outputs[{i}].parameters", output.parameters))
            for i, output in enumerate(message.outputs)
        ],
        binary=True,
    )


def encode(response: Response) -> pb.ModelInferResponse:
    """Encode an answer; tensors are raw, as Triton's clients expect in any case."""
    message = pb.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    for name, value in response.parameters.items():
        if isinstance(value, str):
            message.parameters[name].string_param = value
        else:
            message.parameters[name].double_param = value
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_output_contents.append(to_bytes(tensor))
    return message


def _parameters(field: str, given: Mapping[str, pb.InferParameter]) -> Parameters:
    parameters: dict[str, Parameter] = {}
    for name, value in given.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is None:
            raise RequestError(f"{field}.{name[:100]}: expected a value, got none")
        parameters[name] = getattr(value, kind)
    return parameters


def _guard(
    name: str, method: Method, metrics: Metrics, token: str | None
) -> Callable[[bytes, Context], Awaitable[Message]]:
    """Wrap a method: token, request id, counts, and errors as status codes."""
    kind = getattr(pb, f"{name}Request")

    async def call(body: bytes, context: Context) -> Message:
        given = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        request_id = logs.identify(given.get("x-request-id"))
        logs.request_id.set(request_id)
        trailing = (("x-request-id", request_id),)
        status, started = 499, time.perf_counter()  # if it is cancelled: the client has left
        try:
            check_token(token, given.get("authorization"))
            reply = await method(_parse(kind, body), context)
        except Exception as error:  # noqa: BLE001 (logged; the client gets INTERNAL)
            status, message, retry_after = refusal(error)
            if not isinstance(error, ServeError):
                _log.exception("a request failed", extra={"method": name})
            if retry_after is not None:  # gRPC's name for it, which clients' retry policies heed
                trailing = (*trailing, ("grpc-retry-pushback-ms", str(round(retry_after * 1e3))))
        else:
            status = 200
            context.set_trailing_metadata(trailing)
            return reply
        finally:
            metrics.request("grpc", name, status)
            if _log.isEnabledFor(logging.DEBUG):
                ms = round((time.perf_counter() - started) * 1e3, 3)
                _log.debug("request", extra={"path": name, "status": status, "ms": ms})
        await context.abort(_CODES.get(status, grpc.StatusCode.INVALID_ARGUMENT), message, trailing)
        raise AssertionError  # abort has raised

    return call


def _parse(kind: type[M], body: bytes) -> M:
    try:
        return kind.FromString(body)
    except DecodeError:
        raise RequestError(f"message: expected a {kind.__name__}, got something else") from None
