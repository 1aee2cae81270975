"""The protocol over HTTP: routes, their OpenAPI description, and what happens when a client leaves."""

import asyncio
import hmac
import logging
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gati_jax import __version__
from serve import logs
from serve.engine.records import ServeError
from serve.metrics import CONTENT_TYPE, Metrics
from serve.protocol import codec, messages

from .messages import SlowBodyError, UnauthorizedError, refusal
from .service import Service

_REFS = "#/components/schemas/{model}"
_GONE = 499  # nginx's "client closed request"; nobody sees it but /metrics
_DESCRIPTION = (
    "Classifies images and leaves at the first exit that is sure enough. Speaks the Open Inference Protocol (KServe "
    "v2); tensors are JSON, or bytes behind the JSON."
)
_BODY = {
    "parameters": [
        {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "description": "Bytes of the JSON, where tensors follow it as bytes.",
            "schema": {"type": "integer", "minimum": 0},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": _REFS.format(model="InferenceRequest")}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}


def create_app(service: Service, metrics: Metrics, *, limit: int, token: str | None = None) -> ASGIApp:
    """Return the HTTP side of a service.

    Args:
        service: What answers.
        metrics: What /metrics shows.
        limit: Bytes of a body.
        token: What clients have to show on everything but health; None to ask for nothing.
    """
    app = FastAPI(title="GATI-JAX", version=__version__, description=_DESCRIPTION)
    app.openapi = lambda: _describe(app)  # as FastAPI's documentation extends it
    handlers = _Handlers(service, metrics, limit)
    app.get("/v2", response_model=messages.ServerMetadata)(handlers.server)
    app.get(HEALTH[0], response_model=messages.Live)(handlers.live)
    app.get(HEALTH[1], response_model=messages.Ready, responses=_errors(503))(handlers.ready)
    app.get("/v2/models/stats", response_model=messages.ModelStatistics)(handlers.all_statistics)
    app.get("/metrics", response_class=Response)(handlers.metrics)
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        path: dict[str, Any] = {"parameters": [_path(name) for name in ("model", "version") if f"{{{name}}}" in model]}

        def get(end: str, reply: type[BaseModel], *codes: int, at: str = model, path: dict[str, Any] = path) -> Any:  # noqa: ANN401
            return app.get(at + end, response_model=reply, openapi_extra=path, responses=_errors(404, *codes))

        get("", messages.ModelMetadata)(handlers.model)
        get("/ready", messages.ModelReady, 503)(handlers.model_ready)
        get("/config", messages.ModelConfig)(handlers.config)
        get("/stats", messages.ModelStatistics)(handlers.statistics)
        app.post(
            f"{model}/infer",
            response_class=Response,
            openapi_extra=_BODY | {"parameters": path["parameters"] + _BODY["parameters"]},
            responses={200: {"model": messages.InferenceResponse}}
            | _errors(400, 404, 408, 413, 415, 429, 500, 503, 504),
        )(handlers.infer)
    for kind in (ServeError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    return Guard(app, metrics, token=token, draining=lambda: service.draining)


class _Handlers:
    """One coroutine a route."""

    def __init__(self, service: Service, metrics: Metrics, limit: int) -> None:
        self._service, self._metrics, self._limit = service, metrics, limit

    async def live(self) -> messages.Live:
        """Say that the process answers."""
        return messages.Live(live=True)

    async def ready(self) -> messages.Ready:
        """Say whether new requests should come here."""
        self._service.check_ready()
        return messages.Ready(ready=True)

    async def server(self) -> messages.ServerMetadata:
        """Describe the server."""
        return self._service.metadata()

    async def all_statistics(self) -> messages.ModelStatistics:
        """Say what the server has done."""
        return self._service.statistics("")

    async def metrics(self) -> Response:
        """Show Prometheus everything."""
        return Response(self._metrics.page(), media_type=CONTENT_TYPE)

    async def model(self, request: Request) -> messages.ModelMetadata:
        """Describe what the model takes and gives."""
        self._service.model.check(*_asked(request))
        return self._service.model.metadata()

    async def model_ready(self, request: Request) -> messages.ModelReady:
        """Say whether new requests to the model should come here."""
        return self._service.model_ready(*_asked(request))

    async def config(self, request: Request) -> messages.ModelConfig:
        """Describe the model as perf_analyzer reads it."""
        self._service.model.check(*_asked(request))
        return self._service.model.config()

    async def statistics(self, request: Request) -> messages.ModelStatistics:
        """Say what the model has done."""
        return self._service.statistics(*_asked(request))

    async def infer(self, request: Request) -> Response:
        """Classify images."""
        headers, receive = request.headers, request.receive
        try:
            body = await self._read(receive, headers.get("content-length"), headers.get("content-encoding"))
            model, version = _asked(request)
            self._service.model.check(model, version)
            most, header = self._service.model.most_numbers, headers.get(codec.HEADER_LENGTH)
            asked = codec.decode(body, header, model=model, version=version, most_numbers=most)
            async with _WhileConnected(receive):
                answer = await self._service.infer(asked, request_id=logs.request_id.get())
        except codec.GoneError:
            return Response(status_code=_GONE)
        head = {"model_name": answer.model, "model_version": answer.version, "parameters": answer.parameters}
        if answer.id:
            head["id"] = answer.id
        body, json_bytes = codec.encode(head, answer.outputs)
        if json_bytes is None:
            return Response(body, media_type="application/json")
        return Response(body, media_type="application/octet-stream", headers={codec.HEADER_LENGTH: str(json_bytes)})

    async def _read(self, receive: Receive, length: str | None, encoding: str | None) -> bytes:
        seconds = self._service.timeout
        try:
            async with asyncio.timeout(seconds):
                return await codec.read(receive, length, encoding, self._limit)
        except TimeoutError:
            raise SlowBodyError(f"body: expected all of it within {seconds:g} s") from None


class _WhileConnected:
    """Cancels its block when the client leaves, and turns this into a ``GoneError``, as ``asyncio.timeout`` does."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._gone = receive, False

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 (every request has one)
        self._task, self._cancelling = task, task.cancelling()
        self._watch = asyncio.ensure_future(self._receive())  # behind the body comes nothing but "http.disconnect"
        self._watch.add_done_callback(self._leave)
        return self

    def _leave(self, _: object) -> None:
        self._gone = True
        self._task.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.remove_done_callback(self._leave)
        self._watch.cancel()
        if self._gone and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise codec.GoneError from error


def _asked(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", "")


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    del request
    if isinstance(error, HTTPException):  # no such route, or not with this method
        return JSONResponse({"error": f"path: {error.detail}"}, error.status_code, headers=error.headers)
    return explain(error)


def _path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": messages.ErrorResponse} for code in codes}


def _describe(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI description; FastAPI does not know the request, which it does not read."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, request = models_json_schema([(messages.InferenceRequest, "validation")], ref_template=_REFS)
        schema["components"]["schemas"].update(request["$defs"])
        app.openapi_schema = schema
    return app.openapi_schema


HEALTH = ("/v2/health/live", "/v2/health/ready")
_log = logging.getLogger("serve.http")


def check_token(token: str | None, authorization: str | None) -> None:
    """Check a client's token, in a time that does not depend on how much of it is right.

    Raises:
        UnauthorizedError: It is not the server's.
    """
    scheme, _, shown = (authorization or "").partition(" ")
    right = hmac.compare_digest(shown.encode(), (token or "").encode())
    if token is not None and not (right and scheme.lower() == "bearer"):
        raise UnauthorizedError("authorization: expected 'Bearer' and this server's token")


class Guard:
    """An ASGI application around another one."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, *, token: str | None = None, draining: Callable[[], bool] = lambda: False
    ) -> None:
        """Ask for ``token`` on everything but health, if there is one.

        While ``draining``, connections are not kept: a client that sends on one as it is closed would get no answer.
        """
        self._app, self._metrics, self._token, self._draining = app, metrics, token, draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = logs.identify(headers.get(b"x-request-id", b"").decode("latin-1"))
        logs.request_id.set(request_id)
        status, started = 500, time.perf_counter()

        async def respond(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                last = ((b"connection", b"close"),) if self._draining() else ()
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode()), *last]
            await send(message)

        try:
            if scope["path"] not in HEALTH:
                check_token(self._token, headers.get(b"authorization", b"").decode("latin-1"))
            await self._app(scope, receive, respond)
        except UnauthorizedError as error:
            await explain(error, {"www-authenticate": "Bearer"})(scope, receive, respond)
        except Exception:  # noqa: BLE001 (logged; the application has sent a 500 before it raised)
            _log.exception("a request failed", extra={"path": scope["path"]})
        finally:
            endpoint = getattr(scope.get("endpoint"), "__name__", "none")
            self._metrics.request("http", endpoint, status)
            if _log.isEnabledFor(logging.DEBUG):
                ms = round((time.perf_counter() - started) * 1e3, 3)
                _log.debug("request", extra={"path": scope["path"], "status": status, "ms": ms})


def explain(error: Exception, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the response to an error."""
    status, message, retry_after = refusal(error)
    retry = {} if retry_after is None else {"retry-after": str(max(1, math.ceil(retry_after)))}  # whole seconds
    return JSONResponse({"error": message}, status, headers=retry | (headers or {}))
