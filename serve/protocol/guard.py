"""What stands before every HTTP route: request ids, the token, counts and logs."""

import hmac
import logging
import math
import time
from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import logs
from serve.metrics import Metrics

from .errors import UnauthorizedError, refusal

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
        msg = "authorization: expected 'Bearer' and this server's token"
        raise UnauthorizedError(msg)


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
