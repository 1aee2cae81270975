"""The same requests over HTTP and over gRPC, without a client that checks anything."""

import asyncio
from typing import Any, NamedTuple

import grpc
import httpx
import numpy as np
import tritonclient.grpc
import tritonclient.http

from serve.protocol import inference_pb2 as pb

INFER = "/v2/models/gati/infer"
CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_PARAMETERS = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
_CONTENTS = {"UINT8": "uint_contents", "FP32": "fp32_contents"}


def images(*values, dtype=np.uint8):
    return np.stack([np.full((2, 3, 1), value, dtype) for value in values])


def tensor(values=(0,), **changes) -> dict[str, Any]:
    array = images(*values)
    return {"name": "images", "datatype": "UINT8", "shape": list(array.shape), "data": array.ravel().tolist()} | changes


def ask(front, method="POST", path=INFER, **request) -> httpx.Response:
    """Send an HTTP request to the application, without sockets."""

    async def send():
        transport = httpx.ASGITransport(front.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def call(port, method, message, *, metadata=None, timeout: float = 30):
    """Call a gRPC method; ``message`` may be any bytes."""
    body = message if isinstance(message, bytes) else message.SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer, _ = channel.unary_unary(f"/inference.GRPCInferenceService/{method}").with_call(
            body, metadata=metadata, timeout=timeout
        )
    return getattr(pb, f"{method}Response").FromString(answer)


class Reply(NamedTuple):
    """HTTP's status or gRPC's code, the error's message, and headers or trailing metadata."""

    status: int | str
    message: str
    headers: dict[str, str]


class Http:
    """Requests to a front by HTTP."""

    client, retry_after = tritonclient.http, "retry-after"

    def __init__(self, front):
        self.front = front

    def status(self, http: int):
        return http

    def infer(self, message, headers=None, model="gati", version="") -> Reply:
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
        return self._reply(ask(self.front, path=path, json=message, headers=headers))

    def get(self, method, model=None, headers=None) -> Reply:
        ends = {"ServerLive": "/health/live", "ServerReady": "/health/ready", "ModelReady": "/ready"}
        ends |= {"ModelConfig": "/config", "ModelStatistics": "/stats"}
        path = "/v2" + (f"/models/{model}" if model else "") + ends.get(method, "")
        return self._reply(ask(self.front, "GET", path, headers=headers))

    def _reply(self, response):
        error = "" if response.status_code == 200 else response.json()["error"]
        return Reply(response.status_code, error, dict(response.headers))


class Grpc:
    """Requests to a front by gRPC; ``message`` is that of HTTP's JSON."""

    client, retry_after = tritonclient.grpc, "grpc-retry-pushback-ms"

    def __init__(self, port):
        self.port = port

    def status(self, http: int):
        return "OK" if http == 200 else CODES[http]

    def infer(self, message, headers=None, model="gati", version="") -> Reply:
        request = pb.ModelInferRequest(
            model_name=model,
            model_version=version,
            inputs=[_to_input(one) for one in message["inputs"]],
            outputs=[{**one, "parameters": _to_parameters(one)} for one in message.get("outputs", ())],
            parameters=_to_parameters(message),
        )
        return self._reply("ModelInfer", request, headers)

    def get(self, method, model=None, headers=None) -> Reply:
        return self._reply(method, getattr(pb, f"{method}Request")(**{"name": model} if model else {}), headers)

    def _reply(self, method, message, headers):
        try:
            reply = call(self.port, method, message, metadata=tuple((headers or {}).items()))
        except grpc.RpcError as failure:
            error: Any = failure  # also a grpc.Call
            trailing = {str(key): str(value) for key, value in error.trailing_metadata() or ()}
            return Reply(error.code().name, str(error.details()), trailing)
        unready = "ready" in type(reply).DESCRIPTOR.fields_by_name and not reply.ready  # gRPC says so in the message
        return Reply("UNAVAILABLE" if unready else "OK", "", {})


def _to_parameters(message) -> Any:
    return {name: {_PARAMETERS[type(value)]: value} for name, value in message.get("parameters", {}).items()}


def _to_input(given):
    contents = {_CONTENTS.get(given["datatype"], "int_contents"): given["data"]} if given["data"] else {}
    rest = {key: given[key] for key in ("name", "datatype", "shape")}
    return {**rest, "parameters": _to_parameters(given), "contents": contents}
