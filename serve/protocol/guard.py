"""What surrounds every HTTP request: its id, token, place among those in work, refusal, count and log line."""

import asyncio
import contextvars
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import logs
from ..engine.records import ServeError
from ..metrics import Metrics
from . import codec, http_repository, messages
from .messages import EncodingError, StoppingError, UnauthorizedError, refusal
from .repository import check_operator
from .service import Service, check_token

REASON = "gati.refused"
"""The key under which a scope says why its request was refused."""
_PATH = 200  # characters of a path in a log line
_INFER = re.compile(r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?/infer")
_HEADERS: dict[type[Exception], dict[str, str]] = {
    UnauthorizedError: {"www-authenticate": "Bearer"},
    EncodingError: {"accept-encoding": "gzip, deflate"},
}
_log, _access = logging.getLogger("serve.http"), logging.getLogger(logs.ACCESS)


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
                await explain(StoppingError("stopping: no time is left for this request"))(routed, receive, respond)
            except Exception as error:  # noqa: BLE001 (the client gets a 500)
                _log.exception("a request failed", extra={"path": scope["path"][:_PATH]})
                if not status:  # the framework sends it before it raises
                    await explain(error)(routed, receive, respond)
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
        scope[REASON] = messages.REASONS.get(type(error))
        return explain(error, _HEADERS.get(type(error)))

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
        if reason := routed.get(REASON):
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


def explain(error: Exception, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response to a request that has failed."""
    status, message, retry_after = refusal(error)
    retry = {} if retry_after is None else {"retry-after": str(max(1, math.ceil(retry_after)))}  # whole seconds
    return JSONResponse({"error": message}, status, headers={**retry, **(headers or {})})
