"""Logs on standard error: one JSON object a line, with the ids of the request that it is about.

A line goes into a queue, and a thread writes it: a reader of standard error that stalls does not stall an inference. A
full queue drops further lines; they are counted, and reported once lines are read again. What native code (gRPC's,
XLA's) writes to file descriptor 2 becomes such lines too.
"""

import collections
import contextlib
import contextvars
import faulthandler
import itertools
import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

ACCESS = "serve.access"
"""The logger of one line a request, see ``configure``."""
_NATIVE = "stderr"  # the logger of what native code writes

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""The id of the request that the current task serves."""
_trace: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("trace", default=None)

_LONGEST = 128  # characters of a client's request id
_RUN, _NUMBERS = os.urandom(8).hex(), itertools.count()  # to ask the system for each id would give up the interpreter
_LONGEST_TEXT = 16_000  # characters of a message, and of an exception, which is cut at its beginning
_MOST_BYTES = 4 * 2**20  # that wait for the reader
_PATIENCE = 1.0  # seconds that the end of the process waits for the reader
_REPEATS, _WINDOW, _PLACES = 20, 10.0, 1000  # warnings of one place in so many seconds; places that are remembered
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_ABSL = re.compile(r"([IWEF])\d{4} \S+ +\d+ (\S+):(\d+)\]")  # how lines of gRPC's and XLA's logs begin
_LEVELS = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
_TRACEPARENT = re.compile(  # version 00 ends here; later ones may go on
    r"(?:(00)|(?!00|ff)[0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(?(1)|(?:-.*)?)"
)


class JsonFormatter(logging.Formatter):
    """Formats a record with its ``extra`` as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_LONGEST_TEXT],
        }
        if current := request_id.get():
            line["request_id"] = current
        line |= _trace.get() or {}
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[-_LONGEST_TEXT:]
        try:
            return json.dumps(line, default=str, allow_nan=False)
        except ValueError:  # JSON has no infinity
            return json.dumps({key: str(value) for key, value in line.items()})


class Repeats(logging.Filter):
    """Leaves out warnings, and lines of native code, that one place repeats; the next one that passes says how many.

    Errors of this server always pass: a client that got a 500 was told that the log says why.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with none."""
        super().__init__()
        self.left_out = 0
        self._clock, self._lock = clock, threading.RLock()  # garbage that is collected within may warn
        self._seen: dict[tuple[str, int], tuple[float, int]] = {}  # by place: since when, and how many

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record passes."""
        foreign = record.levelno > logging.WARNING and not record.name.startswith("serve")
        if record.levelno != logging.WARNING and not foreign and record.name != _NATIVE:
            return True
        place, now = (record.pathname, record.lineno), self._clock()
        with self._lock:
            since, count = self._seen.get(place, (now, 0))
            if now - since >= _WINDOW:
                if count > _REPEATS:
                    vars(record)["left_out"] = count - _REPEATS
                since, count = now, 0
            if place not in self._seen and len(self._seen) >= _PLACES:
                self._seen.clear()
            self._seen[place] = (since, count + 1)
            self.left_out += count >= _REPEATS
        if count == _REPEATS - 1:
            vars(record)["note"] = f"repeats within {_WINDOW:g} s are left out"
        return count < _REPEATS


class Writer:
    """A bounded queue of lines, and the thread that writes them."""

    def __init__(self, write: Callable[[bytes], None], most_bytes: int = _MOST_BYTES) -> None:
        """Start the thread.

        Args:
            write: Writes lines; may block, and raise ``OSError``.
            most_bytes: The most that may wait; as much again may be in ``write``.
        """
        self.dropped = 0
        self._write, self._most_bytes = write, most_bytes
        self._lines: collections.deque[bytes] = collections.deque()
        self._bytes = self._reported = 0
        self._writing = False
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="logs", daemon=True).start()

    def put(self, line: str) -> None:
        """Take a line, or drop it if the queue is full; never waits."""
        encoded = line.encode() + b"\n"
        with self._changed:
            if self._bytes + len(encoded) > self._most_bytes:
                self.dropped += 1
                return
            self._lines.append(encoded)
            self._bytes += len(encoded)
            self._changed.notify_all()

    def flush(self, seconds: float = _PATIENCE) -> bool:
        """Wait until all lines are written; return whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._writing, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                lines, self._lines, self._bytes, self._writing = list(self._lines), collections.deque(), 0, True
            try:
                self._write(b"".join(lines))
            except OSError:  # the reader is gone; perhaps another one comes
                with self._changed:
                    self.dropped += len(lines)
            else:
                with contextlib.suppress(OSError):
                    self._report()
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def _report(self) -> None:
        """Say how many lines were dropped: the reader has just taken some."""
        if missing := self.dropped - self._reported:
            record = logging.LogRecord("serve.logs", logging.WARNING, __file__, 0, "lines were dropped", None, None)
            vars(record)["dropped"] = missing
            self._write(JsonFormatter().format(record).encode() + b"\n")
            self._reported += missing


class Handler(logging.Handler):
    """Formats records where they are made, and has them written by a thread."""

    def __init__(self, descriptor: int) -> None:
        """Write to a file descriptor."""
        super().__init__()
        self.writer, self.repeats = Writer(lambda data: _write(descriptor, data)), Repeats()
        self.addFilter(self.repeats)
        self.setFormatter(JsonFormatter())
        self.descriptor = descriptor
        self._reading: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        try:
            self.writer.put(self.format(record))
        except Exception:  # noqa: BLE001 (as other handlers do)
            self.handleError(record)

    def flush(self) -> None:
        """Wait a while until all lines are written."""
        self.writer.flush()

    def close(self) -> None:
        """Write what native code has said so far; from now on it writes by itself."""
        if self._reading is not None:
            os.dup2(self.descriptor, 2)  # ends the pipe
            self._reading.join(_PATIENCE / 2)
            self._reading = None
        self.writer.flush()
        super().close()

    def capture(self) -> None:
        """Turn what is written to file descriptor 2 from now on into records.

        The pipe does not block who writes into it: native code may hold the lock of the interpreter meanwhile, which
        the thread that reads needs. What finds the pipe full is lost.
        """
        read, write = os.pipe()
        os.set_blocking(write, False)
        os.dup2(write, 2)
        os.close(write)
        self._reading = threading.Thread(target=self._read, args=(read,), name="stderr", daemon=True)
        self._reading.start()

    def _read(self, pipe: int) -> None:
        with open(pipe, "rb") as lines:
            while line := lines.readline(_LONGEST_TEXT):
                if text := line.decode(errors="replace").strip():
                    level, file, number = found.groups() if (found := _ABSL.match(text)) else ("W", "", "0")
                    record = logging.LogRecord(_NATIVE, _LEVELS[level], file, int(number), text, None, None)
                    # Not through ``handle``, whose lock is held while the handler is closed. What has no place is
                    # part of a longer message, such as a traceback.
                    if not file or self.filter(record):
                        self.writer.put(self.format(record))


_handler: Handler | None = None  # of this process, since it has one standard error


def configure(level: str, *, access: bool = False) -> None:
    """Log in JSON from now on; other packages log warnings only.

    Args:
        level: The lowest level of this server's own lines.
        access: Whether each request gets a line; with level "debug" it does in any case.
    """
    global _handler  # noqa: PLW0603
    if _handler is None:
        _handler = Handler(os.dup(2))
        logging.basicConfig(level=logging.WARNING, handlers=[_handler], force=True)
        logging.captureWarnings(capture=True)
        sys.excepthook = _uncaught
        threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)
        sys.unraisablehook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)
        faulthandler.enable(_handler.descriptor)  # a crash leaves no time for a queue: these lines are no JSON
        if sys.platform != "win32":
            _handler.capture()
    logging.getLogger("serve").setLevel(level.upper())
    logging.getLogger(ACCESS).setLevel(logging.INFO if access or level == "debug" else logging.WARNING)


def close() -> None:
    """Write all lines that wait; from now on standard error is no longer ours."""
    if _handler is not None:
        _handler.close()


def left_out() -> dict[str, int]:
    """Return how many lines were not written, by reason: a full queue, or repeated warnings."""
    if _handler is None:
        return {"stalled": 0, "repeated": 0}
    return {"stalled": _handler.writer.dropped, "repeated": _handler.repeats.left_out}


def begin(given_id: str | None, traceparent: str | None) -> str:
    """Let the lines of the current task name its request; return the request's id.

    Args:
        given_id: What the client calls it, kept if it is short and printable ASCII; otherwise the id is a new one.
        traceparent: W3C's header, https://www.w3.org/TR/trace-context/; ignored if it is malformed.
    """
    current = identify(given_id)
    request_id.set(current)
    found = _TRACEPARENT.fullmatch(traceparent) if traceparent and len(traceparent) <= 2 * _LONGEST else None
    _trace.set(found and {"trace_id": found[2], "span_id": found[3]})
    return current


def identify(given: str | None) -> str:
    """Return a request's id: the client's, if it is short and printable ASCII, otherwise a new one."""
    if given and len(given) <= _LONGEST and given.isascii() and given.isprintable():
        return given
    return f"{_RUN}{next(_NUMBERS):016x}"


def _uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        logging.getLogger("serve").critical("uncaught exception", exc_info=(kind, error or kind(), traceback))


def _write(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # another process that shares it has made it so
            with contextlib.suppress(ValueError):  # more than select can watch
                select.select([], [descriptor], [], _PATIENCE)
