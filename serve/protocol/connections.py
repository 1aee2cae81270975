"""uvicorn's server, with bounded connections; ``http_connection`` is one of them.

uvicorn lets the event loop accept: libuv takes one connection a turn, so that under load, when turns are long, new
connections wait for seconds behind kept ones. Here all connections that wait are accepted in one turn.
"""

import asyncio
import contextlib
import errno
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Generator
from pathlib import Path

import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from .admission import Limits
from .http_connection import Connection, Shared

BACKLOG = 2048
_BURST = 128  # connections that are accepted in one turn
_PAUSE = 0.1  # seconds
_QUIET = 60.0  # seconds between two complaints of the same
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_log = logging.getLogger("serve.http")


class HttpServer(uvicorn.Server):
    """uvicorn on one listening socket, without its signal handlers and with bounded connections.

    Args:
        app: The application.
        listener: A bound socket; it listens from now on.
        limits: Of connections, heads and times.
        drain: Seconds that requests in flight have to finish, once ``should_exit`` is set.
        tls: Files of a certificate chain and its key.
        refused: Called with the reason of each connection that is closed: "connections", "descriptors", "head", "slow".
        refuse: Returns the answer to a request that is refused by its head, before the application is called.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        limits: Limits,
        *,
        drain: float = 0.0,
        tls: tuple[Path, Path] | None = None,
        refused: Callable[[str], None] = lambda _: None,
        refuse: Callable[[Scope], Response | None] = lambda _: None,
    ) -> None:
        """Prepare; ``serve`` runs it."""
        cert, key = tls or (None, None)
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                ssl_certfile=cert,
                ssl_keyfile=key,
            )
        )
        self._shared = Shared(limits, refused, refuse)
        self._listener, self._drain = listener, drain
        listener.listen(BACKLOG)
        listener.settimeout(0.0)
        self._opening: set[asyncio.Task[None] | None] = set()
        self._accepting: asyncio.Task[None] | None = None
        self._spare: int | None = None
        self._complained = -math.inf

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals to ``lifecycle``."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections."""
        await super().startup(sockets=sockets or [])
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self._accepting = asyncio.create_task(self._accept())

    async def on_tick(self, counter: int) -> bool:
        """Close the connections whose time is over; called ten times a second."""
        if self._accepting is not None and self._accepting.done():
            self._accepting.result()  # raises why it ended
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection) and connection.is_over(now):
                connection.expire()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the requests in flight, as far as the time allows, and close all connections.

        Idle ones are aborted: over TLS, closing them would wait for the client's own goodbye.
        """
        del sockets
        if self._accepting is not None:
            self._accepting.cancel()
        self._listener.close()
        state, until = self.server_state, time.monotonic() + self._drain
        while state.connections or state.tasks:
            for connection in list(state.connections):
                connection.shutdown()
            left = until - time.monotonic()
            if left <= 0:
                break
            await asyncio.sleep(min(_PAUSE, left))
        for task in list(state.tasks):
            task.cancel()  # the application answers 503
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=_PAUSE)
        for connection in list(state.connections):
            connection.transport.abort()
        if self._spare is not None:
            os.close(self._spare)

    # Accepting

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                self._open(loop, (await loop.sock_accept(self._listener))[0])
                with contextlib.suppress(BlockingIOError):
                    for _ in range(_BURST):
                        self._open(loop, self._listener.accept()[0])
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._refuse_all(error)
                await asyncio.sleep(_PAUSE)  # without descriptors, even an accept of nothing fails

    def _open(self, loop: asyncio.AbstractEventLoop, accepted: socket.socket) -> None:
        if len(self.server_state.connections) + len(self._opening) >= self._shared.limits.connections:
            self._shared.refused("connections")
            idle = next(iter(self._shared.idle), None)
            if idle is None or not idle.is_spare(time.monotonic()):
                accepted.close()
                return
            del self._shared.idle[idle]
            idle.transport.abort()
        accepted.settimeout(0.0)
        with contextlib.suppress(OSError):  # the client has left
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = loop.create_task(self._connect(loop, accepted))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self, loop: asyncio.AbstractEventLoop, accepted: socket.socket) -> None:
        tls, task = self.config.ssl, asyncio.current_task()
        timeout = None if tls is None else self._shared.limits.header_timeout

        def connection() -> Connection:
            return Connection(self.config, self.server_state, self._shared, lambda: self._opening.discard(task))

        try:
            await loop.connect_accepted_socket(connection, accepted, ssl=tls, ssl_handshake_timeout=timeout)
        except OSError as error:  # TLS's, too
            accepted.close()
            _log.debug("a connection failed: %s", error)

    def _refuse_all(self, error: OSError) -> None:
        """Refuse the connections that wait, by the descriptor that was kept for this.

        Left alone, their clients would wait for nothing, and the loop would try to accept them again and again.
        """
        if time.monotonic() - self._complained > _QUIET:
            self._complained = time.monotonic()
            _log.error("new connections are refused: %s", error.strerror)
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
            with contextlib.suppress(OSError):
                for _ in range(_BURST):
                    accepted = self._listener.accept()[0]
                    self._shared.refused("descriptors")
                    accepted.close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)
