"""What a script is at: a line that moves on a terminal, elsewhere a plain line where the log is silent for too long."""

import atexit
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, TextIO

from rich.live import Live
from rich.text import Text

from gati_jax.display import terminal

QUIET = 30.0  # seconds without a line
A_SECOND = 1.0  # between two drawings: seldom enough not to disturb what is timed


class Watch(logging.Handler):
    """Takes the newest line of the log for what is being done, and shows for how long it has been.

    On a terminal, bars are drawn above its line, by the same refreshes.

    Args:
        quiet: Off a terminal, say something after so many seconds without a line.
        clock: Returns the time in seconds.
    """

    def __init__(self, *, quiet: float = QUIET, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock."""
        super().__init__()
        self._console, self._quiet, self._clock = terminal(), quiet, clock
        self._stage, self._since = "starting", clock()
        self._said = self._since
        self._ended = threading.Event()
        self._live: Live | None = None
        self._stdout: TextIO | None = None

    def start(self) -> None:
        """Begin to show something."""
        if self._console.is_terminal:
            self._show()
            self._stdout, stream = sys.stdout, _Stdout(sys.stdout, self._hide)
            sys.stdout = stream
        else:
            threading.Thread(target=self._speak, daemon=True).start()

    def stop(self) -> None:
        """Remove the line."""
        self._ended.set()
        self._hide()
        if self._stdout is not None:
            sys.stdout, self._stdout = self._stdout, None

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line of the log for what is being done."""
        self._said = self._clock()
        if record.levelno == logging.INFO:
            self._stage, self._since = record.getMessage().partition("\n")[0], self._said
        if self._console.is_terminal:
            self._show()

    def speak(self) -> None:
        """Say what is being done, if nothing has been said for too long."""
        now = self._clock()
        if now - self._said >= self._quiet:
            self._said = now
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"{when} INFO still at it, {now - self._since:.0f} s: {self._stage}", file=sys.stderr, flush=True)

    def _speak(self) -> None:
        while not self._ended.wait(A_SECOND):
            self.speak()

    def _show(self) -> None:
        if self._live is None and not self._ended.is_set():
            self._live = Live(
                get_renderable=self._line,
                console=self._console,
                refresh_per_second=1 / A_SECOND,
                transient=True,
                redirect_stdout=False,  # results may go to a file
            )
            self._live.start(refresh=True)

    def _hide(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _line(self) -> Text:
        seconds = self._clock() - self._since
        return Text(f"{seconds:4.0f} s  {self._stage}", style="dim", no_wrap=True, overflow="ellipsis")


class _Stdout:
    """Standard output on a terminal, before whose first letter the line is removed."""

    def __init__(self, stream: TextIO, hide: Callable[[], None]) -> None:
        self._stream, self._hide = stream, hide

    def write(self, text: str) -> int:
        self._hide()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the stream has)
        return getattr(self._stream, name)


_early: list[Watch] = []


def start_early() -> None:
    """Show on a terminal that a script is being started, if one is: its imports take seconds."""
    is_script = sys.argv[0] == "-m" or sys.argv[0].startswith("gati-jax ")  # as ``python -m`` and the command set it
    if is_script and terminal().is_terminal and not {"-h", "--help"} & set(sys.argv):
        _early.append(watch := Watch())
        watch.start()
        atexit.register(watch.stop)


@contextlib.contextmanager
def watching() -> Generator[Watch]:
    """Show what is being done as long as the context lasts; the handler that it yields must get the log."""
    watch = _early.pop() if _early else None
    if watch is None:
        watch = Watch()
        watch.start()
    try:
        yield watch
    finally:
        watch.stop()
