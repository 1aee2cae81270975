"""The model repository over HTTP: which models answer, and how one is loaded or taken away."""

import asyncio
from typing import Any

from fastapi import FastAPI, Request

from . import messages
from .messages import SlowBodyError, TooLargeError
from .repository import Repository

PATH, OPERATED = "/v2/repository/", "/v2/repository/models/"
"""Where all of it is, and what needs the token of those who operate the server."""
_SMALL, _SECONDS = 4096, 10.0  # bytes of a request, and seconds until it is here
_INDEX = {
    "requestBody": {
        "content": {"application/json": {"schema": {"type": "object", "properties": {"ready": {"type": "boolean"}}}}}
    }
}


def add(app: FastAPI, models: Repository) -> None:
    """Add the routes."""
    handlers = _Handlers(models)
    named = {"parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]}
    app.post(f"{PATH}index", responses=_errors(400, 401, 408, 413), openapi_extra=_INDEX)(handlers.index)
    for verb, endpoint in (("load", handlers.load), ("unload", handlers.unload)):
        codes = _errors(400, 401, 403, 404, 408, 413)
        app.post(f"{OPERATED}{{model}}/{verb}", responses=codes, openapi_extra=named)(endpoint)


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": messages.ErrorResponse} for code in codes}


class _Handlers:
    """One coroutine a route."""

    def __init__(self, models: Repository) -> None:
        self._models = models

    async def index(self, request: Request) -> list[messages.ModelIndex]:
        """List the models of the command line: which of them answer, and why the others do not."""
        asked = messages.parse(messages.IndexRequest, await _read_small(request))
        return self._models.index(ready=asked.ready)

    async def load(self, request: Request) -> messages.Done:
        """Load a model from its folder, anew or again; the answer comes once it answers, with what the folder has."""
        messages.parse(messages.LoadRequest, await _read_small(request))
        await self._models.load(request.path_params["model"])
        return messages.Done()

    async def unload(self, request: Request) -> messages.Done:
        """Take a model away; the answer comes once its last requests are answered."""
        await _read_small(request)
        await self._models.unload(request.path_params["model"])
        return messages.Done()


async def _read_small(request: Request) -> bytes:
    """Read the body of a request to the repository; an empty one is an object without fields."""
    body = b""
    try:
        async with asyncio.timeout(_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _SMALL:
                    raise TooLargeError(f"body: expected at most {_SMALL} bytes, got more")
    except TimeoutError:
        raise SlowBodyError(f"body: expected all of it within {_SECONDS:g} s") from None
    return body or b"{}"
