"""A replica: the parts of one server, without its sockets, as a deployment of Ray Serve."""

import asyncio
import contextlib
import json
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import ray
from ray.exceptions import RayError

from gati_jax import Bundle

from ..assemble import assemble
from ..lifecycle import Parts
from ..protocol.connections import HttpServer
from ..protocol.http import create_app
from ..protocol.messages import ServeError
from ..protocol.service import check_token
from ..settings import Settings
from ..threads import in_thread
from .exchange import State
from .watched import Line, ReplicaParts, UnreachableError, parts_of

REPLICAS = "/replicas"
"""Where Prometheus' HTTP service discovery finds the address of every replica's metrics."""
_REPORTS, _FORGOTTEN = 1.0, 10.0  # seconds between two reports of a replica, and until one that is silent is forgotten
_PATIENCE = 2.0  # seconds for the controller's answer: it may wait for a disk
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class Directory:
    """Knows where each replica shows its metrics, and tells all when to look at folders; one actor for all replicas."""

    def __init__(self) -> None:
        """Know none."""
        self._seen: dict[str, float] = {}
        self._swaps = 0

    def report(self, address: str) -> int:
        """Hear of a replica that is alive; returns how often bundles are to have been swapped."""
        self._seen[address] = time.monotonic()
        return self._swaps

    def swap(self) -> None:
        """Have every replica look at the folders once more."""
        self._swaps += 1

    def addresses(self) -> list[str]:
        """Return the addresses of those that have reported lately."""
        since = time.monotonic() - _FORGOTTEN
        self._seen = {address: at for address, at in self._seen.items() if at > since}
        return sorted(self._seen)


class Replica:
    """One engine for each model, and the application in front of it.

    Args:
        settings: Of the server.
        directory: The actor of ``Directory``.
        controller: That of ``Controller``, if the bundle adapts.
    """

    def __init__(self, settings: Settings, directory: Any, controller: Any) -> None:  # noqa: ANN401 (handles are untyped)
        """Read the bundles; ``reconfigure`` compiles."""
        self._settings, self._directory = settings, directory
        self._parts: Parts = assemble(settings, _adapting(controller, settings.adapt_epsilon))
        self._tasks: list[asyncio.Future[None]] = []

    def __serve_build_asgi_app__(self) -> Callable[..., Awaitable[None]]:
        """Return the application, see ``ray.serve.ingress``."""
        app = self._app()

        async def with_replicas(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"] == REPLICAS:
                await self._answer_replicas(dict(scope["headers"]), send)
            else:
                await app(scope, receive, send)

        return with_replicas

    async def reconfigure(self, _: object) -> None:
        """Compile, and begin to report; Serve calls this before it sends requests."""
        if not self._tasks:
            await self._parts.service.models.begin()
            self._tasks = [asyncio.ensure_future(self._report())]

    def check_health(self) -> None:
        """Have Serve replace this replica if its engine has ended.

        Raises:
            NotReadyError: It has.
        """
        self._parts.service.check_alive()

    def _app(self, *, admin: bool = False) -> Any:  # noqa: ANN401 (the application, with ``refuse``)
        settings = self._settings
        return create_app(
            self._parts.service,
            self._parts.metrics,
            token=settings.token,
            operator=None,  # loading one replica's model would leave the others with another one
            admin=admin,
            with_page=False,
        )

    async def _report(self) -> None:
        """Show health and metrics at a port of this replica's own, tell the directory where, and swap when it says so.

        A bundle is replaced once the new one answers; the old one finishes what it has admitted.
        """
        host = ray.util.get_node_ip_address()
        listener = socket.create_server((self._settings.host if self._settings.loopback else "", 0))
        app, limits, refused = self._app(admin=True), self._parts.service.door.limits, self._parts.metrics.refused
        server = HttpServer(app, listener, limits, refused=refused, refuse=app.refuse)
        self._tasks.append(in_thread(lambda: asyncio.run(server.serve()), "admin"))
        address = f"{'127.0.0.1' if self._settings.loopback else host}:{listener.getsockname()[1]}"
        swaps = await self._directory.report.remote(address)  # by now: those before are in what was read
        while True:
            await asyncio.sleep(_REPORTS)
            with contextlib.suppress(RayError):  # the directory is on a machine that may be gone
                wanted = await self._directory.report.remote(address)
                if wanted != swaps:
                    swaps = wanted
                    self._tasks.append(asyncio.ensure_future(self._parts.service.models.refresh()))

    async def _answer_replicas(self, headers: Mapping[bytes, bytes], send: Send) -> None:
        try:
            check_token(self._settings.token, headers.get(b"authorization", b"").decode("latin-1"))
            status, body = 200, json.dumps([{"targets": await self._directory.addresses.remote()}])
        except ServeError as error:
            status, body = 401, json.dumps({"error": str(error)})
        content = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": content})
        await send({"type": "http.response.body", "body": body.encode()})


def _adapting(controller: Any, epsilon: float | None) -> Callable[[Bundle], ReplicaParts] | None:  # noqa: ANN401
    def send(*what: object) -> Callable[[], State]:
        asked = controller.exchange.remote(*what)

        def wait() -> State:
            try:
                return ray.get(asked, timeout=_PATIENCE)
            except RayError as error:
                raise UnreachableError(str(error)) from error

        return wait

    line = Line(send, secrets.token_hex(8))
    return None if controller is None else lambda bundle: parts_of(bundle, line, epsilon)
