"""The protocol over HTTP: routes, their OpenAPI description, tokens, errors, and clients that leave."""

import asyncio
import contextvars
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gati_jax import __version__

from .. import logs
from ..engine.records import ServeError
from ..metrics import Metrics, negotiate
from ..page import add_page
from . import codec, http_repository, messages, openapi, page
from .admission import Admission
from .messages import EncodingError, NotReadyError, StoppingError, UnauthorizedError, refusal
from .repository import check_operator
from .service import Service, check_token

HEALTH: tuple[str, ...] = ("/v2/health/live", "/v2/health/ready")
_GONE = 499  # nginx's "client closed request", for /metrics only
_REASON = "gati.refused"  # key of a scope
_PATH = 200  # characters of a path in a log line
_INFER = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")
_HEADERS: dict[type[Exception], dict[str, str]] = {
    UnauthorizedError: {"www-authenticate": "Bearer"},
    EncodingError: {"accept-encoding": "gzip, deflate"},
}
_log, _access = logging.getLogger("serve.http"), logging.getLogger(logs.ACCESS)
T = TypeVar("T")


def create_app(
    service: Service,
    metrics: Metrics,
    *,
    token: str | None = None,
    operator: str | None = None,
    admin: bool = False,
    with_page: bool = True,
) -> "Guard":
    """Return the HTTP side of a service.

    Args:
        service: Answers the requests.
        metrics: Counts them, and is shown at /metrics.
        token: The bearer token that clients must send on all paths but health; None for no check.
        operator: The token for loading and unloading models, which takes the other one's place; None: no client may.
        admin: Whether to leave out all but health and metrics, for a listener of their own.
        with_page: Whether to show the page at /.
    """
    app = FastAPI(
        title="GATI-JAX",
        version=__version__,
        description=openapi.DESCRIPTION,
        openapi_url=None if admin else "/openapi.json",
        docs_url=None,  # FastAPI's pages load scripts from another host
        redoc_url=None,
        redirect_slashes=False,  # a redirect would be to the host that the client's Host header names
    )
    app.openapi = lambda: openapi.describe(app)  # as FastAPI's documentation extends it
    handlers = _Handlers(service, metrics)
    app.get(HEALTH[0], responses=_errors(503))(handlers.live)
    app.get(HEALTH[1], responses=_errors(503))(handlers.ready)
    app.get("/metrics", response_class=Response)(handlers.metrics)
    for kind in (ServeError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    if not admin:
        _add_models(app, handlers)
    public = HEALTH
    if with_page and not admin:
        public += add_page(app, service, metrics, handlers.read, _while_connected)
    infer = None if admin else handlers.infer
    return Guard(app, infer, service, metrics, token=token, operator=operator, public=public)


def _add_models(app: FastAPI, handlers: "_Handlers") -> None:
    """Add the routes of the server's and the models' descriptions, and of inference."""

    async def docs() -> HTMLResponse:
        return HTMLResponse(page.render(app.openapi()), headers=page.HEADERS)

    app.get("/docs", include_in_schema=False)(docs)
    app.get("/v2")(handlers.server)
    app.get("/v2/models/stats")(handlers.all_statistics)
    http_repository.add(app, handlers.models)
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        path = {
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in ("model", "version")
                if f"{{{name}}}" in model
            ]
        }
        for end, endpoint, codes in (
            ("", handlers.model, (404,)),
            ("/ready", handlers.model_ready, (404, 503)),
            ("/config", handlers.config, (404,)),
            ("/stats", handlers.statistics, (404,)),
        ):
            app.get(f"{model}{end}", openapi_extra=path, responses=_errors(*codes))(endpoint)
        app.post(
            f"{model}/infer",
            response_class=Response,
            openapi_extra=openapi.BODY | {"parameters": path["parameters"] + openapi.BODY["parameters"]},
            responses={200: {"model": messages.InferenceResponse}}
            | _errors(400, 404, 408, 413, 415, 429, 500, 503, 504),
        )(handlers.infer)


class _Handlers:
    """One coroutine a route."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics, self.models = service, metrics, service.models

    async def live(self) -> messages.Live:
        """Return whether the process answers; if not, it is to be restarted."""
        self._service.check_alive()
        return messages.Live(live=True)

    async def ready(self) -> messages.Ready:
        """Return whether the server takes new requests."""
        self._service.check_ready()
        return messages.Ready(ready=True)

    async def server(self) -> messages.ServerMetadata:
        """Describe the server."""
        return self._service.metadata()

    async def all_statistics(self) -> messages.ModelStatistics:
        """Return statistics of all models."""
        return self._service.statistics("")

    async def metrics(self, request: Request) -> Response:
        """Return the metrics in Prometheus' format, or in that of OpenMetrics if the Accept header asks for it."""
        media_type = negotiate(request.headers.get("accept", ""))
        return Response(self._metrics.page(media_type), media_type=media_type, headers={"vary": "accept"})

    async def model(self, request: Request) -> messages.ModelMetadata:
        """Describe the model's inputs and outputs."""
        return self._service.models.find(*_model_of(request)).model.metadata()

    async def model_ready(self, request: Request) -> messages.ModelReady:
        """Return whether the server takes new requests to the model."""
        entry = self._service.models.find(*_model_of(request))
        if entry.backend is None:
            raise entry.unavailable
        if not self._service.is_ready(entry.name):
            raise NotReadyError("the server is stopping")
        return messages.ModelReady(name=entry.name, ready=True, batches=[*entry.backend.engine.statistics().batches])

    async def config(self, request: Request) -> messages.ModelConfig:
        """Describe the model as perf_analyzer reads it."""
        return self._service.models.find(*_model_of(request)).model.config()

    async def statistics(self, request: Request) -> messages.ModelStatistics:
        """Return the model's statistics."""
        return self._service.statistics(*_model_of(request))

    async def infer(self, request: Request) -> Response:
        """Classify images."""
        try:
            model, version = _model_of(request)
            most = self._service.models.find(model, version).model.most_numbers
            body = await self.read(request)
            header = request.headers.get(codec.HEADER_LENGTH)
            decoded = codec.decode(body, header, model=model, version=version, most_numbers=most)
            answering = self._service.infer(
                decoded, admission=request.state.admission, request_id=logs.request_id.get()
            )
            answer = await _while_connected(request.receive, answering)
        except ClientDisconnect:
            return Response(status_code=_GONE)
        head = {"model_name": answer.model, "model_version": answer.version, "parameters": answer.parameters}
        if answer.id:
            head["id"] = answer.id
        body, json_bytes = codec.encode(head, answer.outputs)
        if json_bytes is None:
            return Response(body, media_type="application/json")
        return Response(body, media_type="application/octet-stream", headers={codec.HEADER_LENGTH: str(json_bytes)})

    async def read(self, request: Request) -> bytes:
        """Read a body, which has been admitted already."""
        encoding, chunks = request.headers.get("content-encoding", ""), []
        codec.check_encoding(encoding)
        admission: Admission = request.state.admission
        async with admission.reading():
            async for chunk in request.stream():
                admission.received(len(chunk))
                if chunk:  # starlette ends with an empty one
                    chunks.append(chunk)
        body = b"".join(chunks)  # no copy of a single one
        if encoding.strip().lower() in {"", "identity"}:
            return body
        door = self._service.door
        async with door.inflating:
            most = min(door.limits.max_body, door.limits.max_bodies - len(body))
            admission.hold(len(body) + most)
            try:  # in a thread: a small body may take as long as the largest one
                body = await asyncio.to_thread(codec.inflate, body, encoding, most)
            finally:
                admission.hold(len(body))
        return body


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``; cancel it if the client leaves.

    Raises:
        ClientDisconnect: The client has left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(receive())  # after the body, only "http.disconnect" follows
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


def _model_of(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", "")


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    request.scope[_REASON] = messages.REASONS.get(type(error))
    if isinstance(error, HTTPException):  # no such route, or not with this method
        request.scope[_REASON] = "unknown_path"
        return JSONResponse({"error": f"path: {error.detail}"}, error.status_code, headers=error.headers)
    return _explain(error)


def _explain(error: Exception, headers: Mapping[str, str] | None = None) -> JSONResponse:
    status, message, retry_after = refusal(error)
    retry = {} if retry_after is None else {"retry-after": str(max(1, math.ceil(retry_after)))}  # whole seconds
    return JSONResponse({"error": message}, status, headers={**retry, **(headers or {})})


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": messages.ErrorResponse} for code in codes}


class Guard:
    """The routes, with request ids, tokens, admission, counts and logs around them.

    While the service is draining, connections are closed after each response: a client that sends a request on one
    while it is being closed would get no answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        infer: Callable[[Request], Awaitable[Response]] | None,
        service: Service,
        metrics: Metrics,
        *,
        token: str | None,
        operator: str | None,
        public: Collection[str],
    ) -> None:
        """Wrap an application; ``infer`` answers requests for inference, if any; ``public`` paths need no token."""
        self._app, self._infer, self._public = app, infer, public
        self._service, self._metrics, self._token, self._operator = service, metrics, token, operator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = _begin(headers)
        status, size, started = 0, 0, scope.get("state", {}).get("arrived", time.monotonic())

        async def respond(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = scope.setdefault("state", {})["status"] = message["status"]
                last = ((b"connection", b"close"),) if self._service.draining else ()
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode()), *last]
            size += len(message.get("body", b""))
            await send(message)

        routed = _as_routed(scope)
        with self._metrics.in_flight("http").track_inprogress():
            try:
                await self._admit(routed, headers, receive, respond)
            except ServeError as error:  # before the application has begun
                await self._refusal(routed, error)(routed, receive, respond)
            except asyncio.CancelledError:  # by the server: the time for requests in flight is over
                if status:
                    raise
                await _explain(StoppingError("stopping: no time is left for this request"))(routed, receive, respond)
            except Exception as error:  # noqa: BLE001 (the client gets a 500)
                _log.exception("a request failed", extra={"path": scope["path"][:_PATH]})
                if not status:  # the framework sends it before it raises
                    await _explain(error)(routed, receive, respond)
            finally:
                self._count(scope, routed, status or 500, size, time.monotonic() - started)

    def refuse(self, scope: Scope) -> Response | None:
        """Return why an inference request is refused by its head; None if it may be passed on.

        Under overload, most requests end here. To make a task for each, and to read its body, would take the time in
        which others are answered.
        """
        if not self._is_inference(scope):
            return None
        # In a context of its own, as a task has: the request's id is of this request alone.
        return contextvars.copy_context().run(self._refuse, _as_routed(scope))

    def _refuse(self, scope: Scope) -> Response | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        try:
            self._enter(scope, headers)
        except ServeError as error:
            response, request_id = self._refusal(scope, error), _begin(headers)
            response.headers["x-request-id"] = request_id
            if self._service.draining:
                response.headers["connection"] = "close"
            seconds = time.monotonic() - scope["state"]["arrived"]
            self._count(scope, scope, response.status_code, len(response.body), seconds)
            return response
        return None

    def _refusal(self, scope: Scope, error: ServeError) -> Response:
        scope[_REASON] = messages.REASONS.get(type(error))
        return _explain(error, _HEADERS.get(type(error)))

    async def _admit(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        """Pass on a request that may pass: by its token, and if it is for inference, once there is place for it."""
        if not self._is_inference(scope) or self._infer is None:
            if scope["path"].startswith(http_repository.OPERATED):
                check_operator(self._operator, headers.get(b"authorization", b"").decode("latin-1"))
            elif scope["path"] not in self._public:
                self._check_token(headers)
            await self._app(scope, receive, send)
            return
        if "admission" not in scope.setdefault("state", {}):
            self._enter(scope, headers)
        with scope["state"]["admission"]:
            found = _INFER.fullmatch(scope["path"])
            if found is None:
                await self._app(scope, receive, send)
                return
            # Without the framework's way to the same handler, which takes as long as all that the handler does.
            scope.update(endpoint=self._infer, path_params=found.groupdict(default=""))
            response = await self._infer(Request(scope, receive))
        await response(scope, receive, send)

    def _is_inference(self, scope: Scope) -> bool:
        """Whether a request takes places; those to the repository are small."""
        return (
            scope["method"] == "POST" and self._infer is not None and not scope["path"].startswith(http_repository.PATH)
        )

    def _enter(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Take a place for a request, if it may have one."""
        self._check_token(headers)
        length, state = headers.get(b"content-length", b""), scope["state"]
        size, found = int(length[:20]) if length.isdigit() else 0, _INFER.fullmatch(scope["path"])
        state["admission"] = self._service.admit(
            arrived=state.get("arrived"),
            size=size,
            patience=codec.patience_of(headers),
            model=found["model"] if found else "",
        )

    def _check_token(self, headers: dict[bytes, bytes]) -> None:
        check_token(self._token, headers.get(b"authorization", b"").decode("latin-1"))

    def _count(self, scope: Scope, routed: Scope, status: int, size: int, seconds: float) -> None:
        """Count a request that has ended, and log it if that is asked for."""
        unrouted = "infer" if routed["path"].endswith("/infer") else "none"
        self._metrics.request("http", getattr(routed.get("endpoint"), "__name__", unrouted), status, seconds)
        if reason := routed.get(_REASON):
            self._metrics.refused(reason)
        if _access.isEnabledFor(logging.INFO):
            line = {"protocol": "http", "client": _address(scope.get("client")), "method": scope["method"]}
            line |= {"path": scope["path"][:_PATH], "status": status, "bytes": size, "ms": round(seconds * 1e3, 3)}
            _access.info("request", extra=line)


def _begin(headers: Mapping[bytes, bytes]) -> str:
    return logs.begin(*(headers.get(name, b"").decode("latin-1") for name in (b"x-request-id", b"traceparent")))


def _as_routed(scope: Scope) -> Scope:
    """Return a request as its route knows it: without a slash at the end, and HEAD as GET, whose body is not sent."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    return {**scope, "path": scope["path"].removesuffix("/") or "/", "method": method}


def _address(client: tuple[str, int] | None) -> str:
    if client is None:
        return ""
    host, port = client
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
