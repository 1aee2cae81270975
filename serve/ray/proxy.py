"""What Ray Serve's proxy says of a request whose replica has died: an error after which a client may ask again."""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.middleware import Middleware

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]
_BODY = json.dumps({"error": "replica: it ended before it had answered this request; ask again"}).encode()
_HEADERS = [(b"content-type", b"application/json"), (b"retry-after", b"1")]


def middlewares() -> list[Middleware]:
    """Return what Serve's proxy wraps itself in, where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names this."""
    return [Middleware(Retryable)]


class Retryable:
    """Status 503 with ``Retry-After`` where Serve has no answer, in place of a bare 500.

    A replica's own errors are answers, and pass.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        """Wrap Serve's proxy."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request."""
        started = False

        async def note(message: Mapping[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        await self._app(scope, receive, note)
        if not started and scope["type"] == "http":  # Serve has logged why; its server would send a bare 500
            await send({"type": "http.response.start", "status": 503, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": _BODY})
