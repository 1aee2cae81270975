"""The page's addresses."""

import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .. import logs
from ..metrics import Metrics
from ..protocol import codec
from ..protocol.backend import Backend
from ..protocol.repository import Entry
from ..protocol.service import Compared, Service
from . import snapshot
from .feed import Feed, Feeds, Viewer

STREAM, COMPARE = "/page/stream", "/page/compare"
_STATIC = Path(__file__).with_name("static")
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
_GONE = 499  # see ``protocol.http``
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "media-src": "blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
Read = Callable[[Request], Awaitable[bytes]]
Wait = Callable[[Receive, Coroutine[Any, Any, Compared]], Awaitable[Compared]]


def add_page(app: FastAPI, service: Service, metrics: Metrics, read: Read, wait: Wait) -> tuple[str, ...]:
    """Add the page to an application; return the paths that need no token.

    Args:
        app: The application.
        service: Answers requests.
        metrics: What is shown.
        read: Returns the body of a request that has been admitted.
        wait: Returns the result of a coroutine, unless the client leaves.
    """
    files = {f"/page/{file.name}": file for file in sorted(_STATIC.iterdir()) if file.suffix in _TYPES}
    files["/"] = files.pop("/page/index.html")
    for path, file in files.items():
        app.get(path, include_in_schema=False)(_static(file))
    handlers = _Handlers(service, metrics, read, wait)
    app.get(STREAM, include_in_schema=False, response_model=None)(handlers.page_stream)
    app.post(COMPARE, include_in_schema=False, response_model=None)(handlers.compare)
    return tuple(files)


def _static(file: Path) -> Callable[[], Awaitable[Response]]:
    body, kind = file.read_bytes(), f"{_TYPES[file.suffix]}; charset=utf-8"

    async def page() -> Response:
        return Response(body, headers={"content-type": kind, **HEADERS})

    return page


class _Handlers:
    def __init__(self, service: Service, metrics: Metrics, read: Read, wait: Wait) -> None:
        self._service, self._metrics, self._read, self._wait = service, metrics, read, wait
        self._feeds = Feeds(self._feed)

    async def page_stream(self, model: str = "") -> Response:
        """Show what happens to a model, until the client leaves or the server stops."""
        entry = self._find(model)
        most_bytes = self._service.door.limits.max_body
        return _Stream(self._feeds.join(entry.name), lambda: snapshot.describe(entry, most_bytes=most_bytes), entry)

    async def compare(self, request: Request, model: str = "") -> Response:
        """Answer one input, with the scores on its way and the base's answer."""
        known, started = self._find(model).model, time.perf_counter()
        try:
            body = await self._read(request)
            header = request.headers.get(codec.HEADER_LENGTH)
            decoded = codec.decode(body, header, model=known.name, most_numbers=known.most_numbers)
            admission, request_id = request.state.admission, logs.request_id.get()
            answering = self._service.compare(decoded, admission=admission, request_id=request_id)
            found = await self._wait(request.receive, answering)
        except ClientDisconnect:
            return Response(status_code=_GONE)
        shown = snapshot.compared(found, known, (time.perf_counter() - started) * 1e3)
        return Response(shown.model_dump_json(), media_type="application/json", headers={"cache-control": "no-store"})

    def _find(self, model: str) -> Entry:
        """Return the model that the page asks for; without a name, the first one."""
        return self._service.models.find(model or next(iter(self._service.models.entries)))

    def _feed(self, model: str) -> Feed:
        return Feed(functools.partial(self._snapshot, self._find(model)), self._service.door.closing)

    def _snapshot(self, entry: Entry) -> bytes:
        return _event("now", snapshot.read(self._metrics, self._service, entry))


class _Stream(StreamingResponse):
    """Server-sent events of one viewer, whose place is free again however it ends."""

    def __init__(self, viewer: Viewer, describe: Callable[[], snapshot.Facts], entry: Entry) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._viewer, self._describe, self._entry = viewer, describe, entry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._viewer.leave()

    async def _events(self) -> AsyncIterator[bytes]:
        known: Backend | None = None
        first = True
        async for item in self._viewer:
            if self._entry.loaded is not None and (first or self._entry.backend is not known):
                first, known = False, self._entry.backend
                yield _event("about", self._describe())
            yield item


def _event(name: str, data: "snapshot.Facts | snapshot.Snapshot") -> bytes:
    return f"event: {name}\ndata: {data.model_dump_json()}\n\n".encode()
