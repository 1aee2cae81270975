"""The protocol over HTTP: routes, their OpenAPI description, errors, and clients that leave."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse
from starlette.types import Receive

from gati_jax import __version__

from .. import logs
from ..engine.records import ServeError
from ..metrics import Metrics, negotiate
from ..page import add_page
from . import codec, http_repository, messages, openapi, page
from .admission import Admission
from .guard import REASON, Guard, explain
from .messages import NotReadyError
from .service import Service

HEALTH: tuple[str, ...] = ("/v2/health/live", "/v2/health/ready")
_GONE = 499  # nginx's "client closed request", for /metrics only
T = TypeVar("T")


def create_app(
    service: Service,
    metrics: Metrics,
    *,
    token: str | None = None,
    operator: str | None = None,
    admin: bool = False,
    with_page: bool = True,
) -> Guard:
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
    request.scope[REASON] = messages.REASONS.get(type(error))
    if isinstance(error, HTTPException):  # no such route, or not with this method
        request.scope[REASON] = "unknown_path"
        return JSONResponse({"error": f"path: {error.detail}"}, error.status_code, headers=error.headers)
    return explain(error)


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": messages.ErrorResponse} for code in codes}
