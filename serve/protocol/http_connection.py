"""An HTTP connection: uvicorn's protocol, with the bounds that it lacks.

uvicorn reads headers of any length, waits for them for ever, and for clients that do not read their answers.

Clients that ask again as soon as they are refused could have the event loop do nothing else, so that no answer is in
time. So refusals have a pace: a connection is not read from again before those that came before it are over.
"""

import asyncio
import dataclasses
import json
import math
import select
import sys
import time
from collections.abc import Callable
from typing import cast

import httptools
import uvicorn
from starlette.responses import Response
from starlette.types import Scope
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from .admission import Limits

_REFUSAL = 0.002  # seconds for each refusal: several times what it takes
_LONGEST_PAUSE = 1.0  # seconds; Retry-After is no less
_SHORTEST_PAUSE = 0.02
_AT_ONCE = 8  # requests of one reading that are refused without a task
_REFUSED = {429, 503, 504}
_SPARE = 1.0  # seconds for which a connection has been idle that makes place for a new one


@dataclasses.dataclass
class Shared:
    """What the connections of a server share; see ``HttpServer`` for the first three."""

    limits: Limits
    refused: Callable[[str], None]
    refuse: Callable[[Scope], Response | None]
    idle: "dict[Connection, None]" = dataclasses.field(default_factory=dict)
    """Connections without a request, the one that has been idle longest first."""
    refusing: float = -math.inf
    """When the refusals so far are over, by their pace."""

    def pause(self) -> float:
        """Count a refusal, and return for how long no request is to be read from its connection."""
        now = time.monotonic()
        self.refusing = min(max(self.refusing, now) + _REFUSAL, now + _LONGEST_PAUSE)
        return self.refusing - now


class Connection(HttpToolsProtocol):
    """A connection whose requests' heads are bounded, in size and time, and which is not idle for ever.

    While a request is with the application, which has clocks of its own, it is closed only if the client reads nothing
    of the answers that are there.
    """

    def __init__(
        self, config: uvicorn.Config, state: ServerState, shared: Shared, opened: Callable[[], object] = lambda: None
    ) -> None:
        """Wait for a request; ``opened`` is called once ``state`` counts this among its connections."""
        super().__init__(config, state, {}, asyncio.get_running_loop())
        self._limits, self._refused, self._refuse = shared.limits, shared.refused, shared.refuse
        self._idle, self._pause, self._opened = shared.idle, shared.pause, opened
        self._refusals = 0  # of one reading
        self._paused = math.nan  # when reading was paused because of a refusal
        self._waiting_since: float | None = None  # when it was, if a request came meanwhile
        self._answering: RequestResponseCycle | None = None  # of several requests, the one that is with the application
        self._in_head = self._in_body = False
        self._events = self._silent = 0  # of the parser; bytes without one
        self._bytes = self._count = 0  # of the head
        self._discarded = 0
        self._began = self.last = self._read_at = time.monotonic()
        self._unread = 0  # bytes of answers that the client has not taken

    def is_over(self, now: float) -> bool:
        """Whether it is to be closed; called several times a second, by the monotonic clock."""
        unread = self.transport.get_write_buffer_size()
        if unread != self._unread:
            self._unread, self._read_at = unread, now
        if unread:
            return now > self._read_at + self._limits.idle_timeout
        if self._is_busy:
            return False
        if self._in_head:
            return now > self._began + self._limits.header_timeout
        if self._in_body:  # of a request that was refused: it is discarded
            return now > self._began + self._limits.timeout
        return now > self.last + self._limits.keep_alive

    @property
    def _is_busy(self) -> bool:
        return bool(self.cycle) and not self.cycle.response_complete

    def is_spare(self, now: float) -> bool:
        """Whether it may be closed for another one, if it is idle."""
        return now > self.last + _SPARE and not self.transport.get_write_buffer_size()

    def expire(self) -> None:
        """Close the connection: its time is over."""
        if self._in_head and not self._is_busy and not self._unread and not self.transport.is_closing():
            self._reject(408, f"head: expected all of it within {self._limits.header_timeout:g} s", "slow")
        else:
            self.transport.abort()  # what the client has not read by now, it will not

    def shutdown(self) -> None:
        """Close the connection if no request is with the application, or after that."""
        if self._is_busy:
            self.cycle.keep_alive = False
        elif not self.transport.get_write_buffer_size():
            self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin to be idle."""
        super().connection_made(transport)
        self._opened()
        self._idle[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Abandon the request that is with the application; uvicorn abandons the last one that came."""
        self._idle.pop(self, None)
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived."""
        parser = self.parser
        if parser is None or self.transport.is_closing():
            return
        events, self._refusals = self._events, 0
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
        self._idle.pop(self, None)
        self._events += 1
        self._in_head, self._in_body = True, False
        self._bytes = self._count = self._discarded = 0
        self._began = self._waiting_since or time.monotonic()
        self._waiting_since = None
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
        """Pass the request to the application."""
        self._in_head, self._in_body = False, True
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Refuse a request by its head, or pass it to the application."""
        at_once = not self.pipeline and not self.flow.write_paused and self._refusals < _AT_ONCE
        refusal = self._refuse(_scope_of(cycle)) if at_once else None
        if refusal is None:
            self._answering = cycle
            super()._start_asgi_task(cycle, app)
            return
        if not cycle.keep_alive:
            refusal.headers["connection"] = "close"
        head = b"".join(b"%s: %s\r\n" % header for header in refusal.raw_headers)
        self.transport.write(STATUS_LINE[refusal.status_code] + head + b"\r\n" + bytes(refusal.body))
        cycle.response_started = cycle.response_complete = True
        _scope_of(cycle)["state"]["status"] = refusal.status_code
        self._refusals += 1
        if refusal.headers.get("connection") == "close":
            self.transport.close()
        self._answering = cycle
        self.on_response_complete()

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
        self._in_body = False
        super().on_message_complete()
        self._rest()

    def on_response_complete(self) -> None:
        """Begin to be idle, or to discard the rest of the body."""
        answered = self._answering
        super().on_response_complete()
        self._rest()
        if answered is not None and _scope_of(answered)["state"].get("status") in _REFUSED:
            self._slow_down()
        self._unset_keepalive_if_required()  # uvicorn's timer, which the rest of a refused body would stop for good

    def _slow_down(self) -> None:
        """Read nothing for a while."""
        seconds = self._pause()
        if seconds > _SHORTEST_PAUSE and not self.pipeline and not self.transport.is_closing():
            self._paused = time.monotonic()
            self.flow.pause_reading()
            self.loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        """Read again; the clocks of a request that has come meanwhile began when reading was paused."""
        if self.transport.is_closing():
            return
        if sys.platform != "win32":
            poll = select.poll()
            poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
            self._waiting_since = self._paused if poll.poll(0) else None
        self.flow.resume_reading()

    def _rest(self) -> None:
        """Begin to be idle, if there is nothing to answer and nothing to discard."""
        self.last = time.monotonic()
        if not (self._is_busy or self._in_head or self._in_body or self.transport.is_closing()):
            self._idle.pop(self, None)
            self._idle[self] = None

    def _measure(self, size: int, count: int) -> None:
        self._events += 1
        self._bytes, self._count = self._bytes + size, self._count + count
        if self._bytes > self._limits.header_bytes or self._count > self._limits.header_count:
            raise ValueError("the head is too large")

    def _reject_head(self) -> None:
        most = f"{self._limits.header_bytes} bytes in {self._limits.header_count} headers"
        self._reject(431, f"head: expected at most {most}, got more", "head")

    def _reject(self, status: int, message: str, reason: str) -> None:
        """Answer without the application, and hang up."""
        self._refused(reason)
        if self._is_busy:  # an answer is being written
            self.transport.abort()
            return
        body = json.dumps({"error": message}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


def _scope_of(cycle: RequestResponseCycle) -> Scope:
    return cast("Scope", cycle.scope)  # which uvicorn has a type of its own for
