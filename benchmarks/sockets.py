"""A load generator that is cheap: prepared bytes over raw sockets, in one thread that waits by epoll.

It shares the machine with the server, so what it takes is taken from the server; ``Outcomes.busy`` says how much.
``drive`` is meant for a process of its own. ``benchmarks.driving`` is its counterpart for engines, gRPC and remote
servers: every request is a task there, which costs several times as much.

A request is sent at its scheduled time whether or not others are answered (open loop), or when one of a number of
clients is free (closed loop). It goes on a kept connection, if one is free, or on a new one that is closed after the
answer. Beyond a bound of connections requests wait here; as latency counts from the scheduled time, that is measured.
"""

import dataclasses
import errno
import re
import select
import socket
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int16, Int64

CLOSED, SILENT = 0, -1
"""Instead of a status: the connection was closed without an answer; there was none in time."""
_NUMBER = re.compile(rb'"data": ?\[(-?\d+)')
_CHUNK = 65536
_CONNECTING = {0, errno.EINPROGRESS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """Requests of one kind.

    Attributes:
        port: Of the server, on loopback.
        messages: Whole requests as bytes; each is asked for by its index.
        rows: Which of them is sent, request by request.
        seconds: When; None for a closed loop.
        clients: Requests on the way at once in a closed loop, which ends after ``until`` seconds or the last row.
        keep: Whether connections are kept.
        reads: The number of leading integers of answers' tensors that are recorded, at most 2.
        connections: The most at once.
    """

    port: int
    messages: Sequence[bytes]
    rows: Int64[np.ndarray, " n"]
    seconds: Float64[np.ndarray, " n"] | None = None
    clients: int = 0
    until: float = float("inf")
    keep: bool = True
    reads: int = 0
    connections: int = 700


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What became of a stream's requests, as far as they were sent; times in seconds from the start."""

    rows: Int64[np.ndarray, " n"]
    scheduled: Float64[np.ndarray, " n"]
    sent: Float64[np.ndarray, " n"]
    done: Float64[np.ndarray, " n"]
    """Infinite without an answer."""
    status: Int16[np.ndarray, " n"]
    """HTTP's, or ``CLOSED`` or ``SILENT``."""
    values: Int64[np.ndarray, "n 2"]
    """Integers of the answer, -1 for none."""
    seconds: float
    """Until the last answer."""
    busy: float
    """Seconds of processor time of the whole generator."""
    error: str
    """The first error of a socket."""


def drive(streams: Sequence[Stream], *, patience: float = 30.0) -> list[Outcomes]:
    """Send the requests of all streams at once; return what became of those of each.

    Args:
        streams: At least one.
        patience: Seconds to wait for answers after the last request.
    """
    return _Driver(streams, patience).run()


class _Lane:
    """A stream under way."""

    def __init__(self, stream: Stream) -> None:
        n = len(stream.rows)
        self.stream, self.next, self.flying = stream, 0, 0
        self.rows = stream.rows.tolist()
        self.at = [0.0] * n if stream.seconds is None else stream.seconds.tolist()
        self.sent, self.done, self.status = [float("inf")] * n, [float("inf")] * n, [SILENT] * n
        self.values: dict[int, tuple[int, ...]] = {}
        self.idle: list[_Connection] = []
        self.waiting: deque[int] = deque()
        self.free = stream.connections

    def outcomes(self, seconds: float, busy: float, error: str) -> Outcomes:
        n = self.next
        values = np.full((n, 2), -1, np.int64)
        for i, found in self.values.items():
            values[i, : len(found)] = found
        return Outcomes(
            self.stream.rows[:n],
            np.array(self.at[:n], np.float64),
            np.array(self.sent[:n], np.float64),
            np.array(self.done[:n], np.float64),
            np.array(self.status[:n], np.int16),
            values,
            seconds,
            busy,
            error,
        )


class _Connection:
    """A socket with at most one request."""

    __slots__ = ("buffer", "close", "index", "lane", "missing", "peer", "status", "unsent")

    def __init__(self, lane: _Lane, connected: socket.socket) -> None:
        self.lane, self.peer = lane, connected
        self.index, self.buffer, self.unsent = -1, b"", b""
        self.status, self.missing, self.close = CLOSED, -1, False


class _Driver:
    """One run."""

    def __init__(self, streams: Sequence[Stream], patience: float) -> None:
        self._lanes = [_Lane(stream) for stream in streams]
        self._patience = patience
        self._poll, self._open = select.epoll(), dict[int, _Connection]()
        self._error, self._busy, self._start = "", time.thread_time(), time.perf_counter()

    def run(self) -> list[Outcomes]:
        last = 0.0
        try:
            while True:
                wake = min((self._send_due(lane) for lane in self._lanes), default=float("inf"))
                now, flying = self._now(), any(lane.flying for lane in self._lanes)
                if wake == float("inf") and (not flying or now > last + self._patience):
                    break
                if wake < float("inf"):
                    last = now
                wait = min(wake - now, 0.1) if wake < float("inf") else 0.1
                for descriptor, event in self._poll.poll(max(wait, 0.0)):
                    if connection := self._open.get(descriptor):  # it may have been closed in this turn
                        self._handle(connection, event)
        finally:
            for connection in self._open.values():
                connection.peer.close()
            self._poll.close()
        seconds, busy = self._now(), time.thread_time() - self._busy
        return [lane.outcomes(seconds, busy, self._error) for lane in self._lanes]

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _send_due(self, lane: _Lane) -> float:
        """Send what is due; return when the next request is, infinity for none."""
        n, stream = len(lane.rows), lane.stream
        if stream.seconds is None:
            while lane.next < n and lane.flying < stream.clients and (now := self._now()) < stream.until:
                lane.at[lane.next] = now
                self._send_next(lane)
            done = lane.next == n or self._now() >= stream.until
            return float("inf") if done else max(self._now() + 0.05, 0.0)
        while lane.next < n and lane.at[lane.next] <= self._now():
            self._send_next(lane)
        return lane.at[lane.next] if lane.next < n else float("inf")

    def _send_next(self, lane: _Lane) -> None:
        lane.next += 1
        lane.flying += 1
        self._place(lane, lane.next - 1)

    def _place(self, lane: _Lane, index: int) -> None:
        """Send a request on a free connection or a new one, or let it wait for one."""
        if lane.stream.keep and lane.idle:
            connection = lane.idle.pop()
        elif lane.free > 0:
            connection = self._connect(lane)
            if connection is None:
                self._end(lane, index, CLOSED)
                return
        else:
            lane.waiting.append(index)
            return
        message = lane.stream.messages[lane.rows[index]]
        lane.sent[index] = self._now()
        connection.index, connection.status, connection.missing, connection.buffer = index, CLOSED, -1, b""
        self._write(connection, message)

    def _connect(self, lane: _Lane) -> _Connection | None:
        made = socket.socket()
        made.setblocking(False)  # noqa: FBT003 (the method's own)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if (code := made.connect_ex(("127.0.0.1", lane.stream.port))) not in _CONNECTING:
            self._error = self._error or f"connect: {errno.errorcode.get(code, code)}"
            made.close()
            return None
        connection = _Connection(lane, made)
        lane.free -= 1
        self._open[made.fileno()] = connection
        self._poll.register(made.fileno(), select.EPOLLIN)
        return connection

    def _write(self, connection: _Connection, data: bytes) -> None:
        waited = bool(connection.unsent)
        try:
            sent = connection.peer.send(data)
        except BlockingIOError:  # not connected yet, or full
            sent = 0
        except OSError as error:
            self._failed(connection, error)
            return
        connection.unsent = data[sent:]
        if bool(connection.unsent) != waited:
            wanted = select.EPOLLIN | select.EPOLLOUT if connection.unsent else select.EPOLLIN
            self._poll.modify(connection.peer.fileno(), wanted)

    def _handle(self, connection: _Connection, event: int) -> None:
        if event & select.EPOLLOUT and connection.unsent:
            self._write(connection, connection.unsent)
        if event & ~select.EPOLLOUT and connection.peer.fileno() >= 0:
            try:
                data = connection.peer.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError as error:
                self._failed(connection, error)
                return
            if data and connection.index >= 0:
                self._read(connection, data)
            else:
                self._shut(connection)

    def _read(self, connection: _Connection, data: bytes) -> None:
        data = connection.buffer + data if connection.buffer else data
        connection.buffer = data
        if connection.missing < 0:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                return
            head = data[:end].lower()
            connection.status = int(head[9:12])
            connection.missing = end + 4 + int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0] or 0)
            connection.close = b"\r\nconnection: close" in head
        if len(data) < connection.missing:
            return
        lane, index = connection.lane, connection.index
        if lane.stream.reads and connection.status == 200:  # noqa: PLR2004 (HTTP)
            lane.values[index] = tuple(int(found) for found in _NUMBER.findall(data)[: lane.stream.reads])
        status, connection.index = connection.status, -1
        if connection.close or not lane.stream.keep:
            self._shut(connection)
        else:
            lane.idle.append(connection)
        self._end(lane, index, status)

    def _end(self, lane: _Lane, index: int, status: int) -> None:
        """Note the end of a request; one that waits for a connection takes its place."""
        lane.status[index] = status
        lane.done[index] = self._now() if status > CLOSED else float("inf")
        lane.flying -= 1
        if lane.waiting and (lane.free > 0 or lane.idle):
            self._place(lane, lane.waiting.popleft())

    def _failed(self, connection: _Connection, error: OSError) -> None:
        if connection.index >= 0:
            self._error = self._error or repr(error)
        self._shut(connection)

    def _shut(self, connection: _Connection) -> None:
        """Close a connection; a request on it has no answer."""
        del self._open[connection.peer.fileno()]
        connection.peer.close()
        lane = connection.lane
        lane.free += 1
        if connection in lane.idle:
            lane.idle.remove(connection)
        if connection.index >= 0:
            index, connection.index = connection.index, -1
            self._end(lane, index, CLOSED)


def message(path: str, body: bytes | None = None, *, headers: str = "", keep: bool = True) -> bytes:
    """Return a request as bytes: POST with a body, GET without one; ``headers`` are lines that end with CRLF."""
    method, length = ("GET", "") if body is None else ("POST", f"Content-Length: {len(body)}\r\n")
    close = "" if keep else "Connection: close\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}{length}{close}\r\n".encode() + (body or b"")
