"""HTTP connections: uvicorn's server and protocol, with the bounds that they lack.

uvicorn reads headers of any length, waits for them for ever, and lets the event loop accept: libuv takes one connection
a turn, so that under load, when turns are long, new connections wait for seconds behind kept ones. Here all connections
that wait are accepted in one turn.
"""

import asyncio
import contextlib
import errno
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import httptools
import uvicorn
from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from .admission import Limits

BACKLOG = 2048
_BURST = 128  # connections that are accepted in one turn
_PAUSE = 0.1  # seconds
_QUIET = 60.0  # seconds between two complaints of the same
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_log = logging.getLogger("serve.http")


class Reply(NamedTuple):
    """An answer that is not the application's."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


class _Answered:
    """In the place of uvicorn's cycle of a request and its response: one that is over."""

    response_complete = True
    message_event = asyncio.Event()


_ANSWERED: Any = _Answered()
_CLOSE = ((b"connection", b"close"),)


class HttpServer(uvicorn.Server):
    """uvicorn on one listening socket, without its signal handlers and with bounded connections.

    Args:
        app: The application.
        listener: A bound socket; it listens from now on.
        limits: Of connections, heads and times.
        drain: Seconds that requests in flight have to finish, once ``should_exit`` is set.
        tls: Files of a certificate chain and its key.
        refused: Called with the reason of each connection that is closed: "connections", "descriptors", "head", "slow".
        refuse: Returns the answer to a request that the application need not see, by its head; None for any other.
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
        refuse: Callable[[Scope], Reply | None] = lambda _: None,
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
        self.limits, self.refused, self.refuse = limits, refused, refuse
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
            if isinstance(connection, Connection) and connection.due < now:
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
        if len(self.server_state.connections) + len(self._opening) >= self.limits.connections:
            self.refused("connections")
            accepted.close()
            return
        accepted.settimeout(0.0)
        with contextlib.suppress(OSError):  # the client has left
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = loop.create_task(self._connect(loop, accepted))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _connect(self, loop: asyncio.AbstractEventLoop, accepted: socket.socket) -> None:
        tls, task = self.config.ssl, asyncio.current_task()
        timeout = None if tls is None else self.limits.header_timeout
        try:
            await loop.connect_accepted_socket(
                lambda: Connection(self, lambda: self._opening.discard(task)),
                accepted,
                ssl=tls,
                ssl_handshake_timeout=timeout,
            )
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
                    self.refused("descriptors")
                    accepted.close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)


class Connection(HttpToolsProtocol):
    """A connection whose requests' heads are bounded, in size and time, and which is not idle for ever.

    ``due`` is when it is closed, by the monotonic clock; while a request is with the application, which has clocks of
    its own, that is never.
    """

    def __init__(self, server: HttpServer, opened: Callable[[], object] = lambda: None) -> None:
        """Wait for a request; ``opened`` is called once the server counts this among its connections."""
        super().__init__(server.config, server.server_state, server.lifespan.state, asyncio.get_running_loop())
        self._limits, self._refused, self._refuse = server.limits, server.refused, server.refuse
        self._in_head = self._in_body = False
        self._opened = opened
        self._running: RequestResponseCycle | None = None
        self._events = self._silent = 0  # of the parser; bytes without one
        self._bytes = self._count = 0  # of the head
        self._discarded = 0
        self._began = self._last = time.monotonic()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        super().connection_made(cast("asyncio.Transport", transport))
        self._opened()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the application that the client has left: uvicorn tells the request that came last, which may wait."""
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:  # noqa: ANN401 (uvicorn's)
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    @property
    def due(self) -> float:
        """When the connection is closed unless something happens."""
        if self._in_head:
            return self._began + self._limits.header_timeout
        if self._is_busy:
            return math.inf
        if self._in_body:  # of a request that was refused: it is discarded
            return self._began + self._limits.timeout
        return self._last + self._limits.keep_alive

    @property
    def _is_busy(self) -> bool:
        return bool(self.cycle) and not self.cycle.response_complete

    def expire(self) -> None:
        """Close the connection: its time is over."""
        if self._in_head and not self._is_busy and not self.transport.is_closing():
            self._reject(408, f"head: expected all of it within {self._limits.header_timeout:g} s", "slow")
        else:
            self.transport.abort()  # what the client has not read by now, it will not

    def shutdown(self) -> None:
        """Close the connection if no request is with the application, or after that."""
        if self._is_busy:
            self.cycle.keep_alive = False
        elif not self.transport.get_write_buffer_size():
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived."""
        parser = self.parser
        if parser is None or self.transport.is_closing():
            return
        events = self._events
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # answered as if it had not been asked for
        except httptools.HttpParserError:
            if self._bytes > self._limits.header_bytes or self._count > self._limits.header_count:
                self._reject_head()
            else:
                self._reject(400, "head: expected a request of HTTP/1.1", "head")
        else:
            # A header, or a trailer, is one event when it is complete: an endless one grows in the parser.
            self._silent = self._silent + len(data) if self._events == events else 0
            if self._silent > self._limits.header_bytes:
                self._reject_head()

    # The parser's events; an exception stops it

    def on_message_begin(self) -> None:
        """Start the clocks of a request."""
        super().on_message_begin()
        self._events += 1
        self._in_head, self._in_body = True, False
        self._bytes = self._count = self._discarded = 0
        self._began = time.monotonic()
        self.scope.setdefault("state", {})["arrived"] = self._began

    def on_url(self, url: bytes) -> None:
        """Count a part of the path."""
        self._measure(len(url), 0)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, or a trailer."""
        self._measure(len(name) + len(value), 1)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Pass the request to the application, unless its head is enough for an answer.

        A client that does not read its answers, or sends on before it has them, waits as with the application.
        """
        self._in_head, self._in_body, parser = False, True, self.parser
        assert parser is not None  # noqa: S101 (narrows the type)
        if not (self._is_busy or self.pipeline or self.flow.write_paused or self.transport.is_closing()):
            scope: Any = self.scope
            path = self.url.partition(b"?")[0].decode("latin-1")
            scope |= {"method": parser.get_method().decode("ascii"), "path": path}
            if (reply := self._refuse(scope)) is not None:
                keep = parser.get_http_version() != "1.0" and parser.should_keep_alive()
                self._answer(reply, keep=keep)
                return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Keep a part of a body; one whose request was refused is discarded, up to the largest that may be."""
        self._events += 1
        super().on_body(body)
        if self.cycle.response_complete:
            self._discarded += len(body)
            if self._discarded > self._limits.max_body:
                self.transport.abort()

    def on_message_complete(self) -> None:
        """End a request."""
        self._events += 1
        self._in_body, self._last = False, time.monotonic()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Begin to be idle, or to discard the rest of the body."""
        self._last = time.monotonic()
        super().on_response_complete()
        self._unset_keepalive_if_required()  # uvicorn's timer, which the rest of a refused body would stop for good

    def _measure(self, size: int, count: int) -> None:
        self._events += 1
        self._bytes, self._count = self._bytes + size, self._count + count
        if self._bytes > self._limits.header_bytes or self._count > self._limits.header_count:
            raise ValueError("the head is too large")

    def _answer(self, reply: Reply, *, keep: bool) -> None:
        """Answer without the application; the body is discarded as it comes."""
        self.cycle = _ANSWERED
        headers = [*self.server_state.default_headers, *reply.headers, *(() if keep else _CLOSE)]
        lines = b"".join(b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[reply.status], lines, reply.body))
        self.server_state.total_requests += 1
        if not keep:
            self.transport.close()

    def _reject_head(self) -> None:
        most = f"{self._limits.header_bytes} bytes in {self._limits.header_count} headers"
        self._reject(431, f"head: expected at most {most}, got more", "head")

    def _reject(self, status: int, message: str, reason: str) -> None:
        """Answer without the application, and hang up."""
        if self.transport.is_closing():  # what came before was the last request
            return
        self._refused(reason)
        if self._is_busy:  # an answer is being written
            self.transport.abort()
            return
        body = json.dumps({"error": message}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
