"""The background's thread: trials and refits, in a share of the time, until the server stops."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from gati_jax.errors import InputError

_IDLE = 0.25  # seconds between two looks at whether there is something to do
_AGAIN = (1.0, 60.0)  # seconds before what has failed is tried again: at first, and at most
_log = logging.getLogger(__name__)


class Works(Protocol):
    """A ``Background``, as far as it matters here."""

    def work(self, pause: Callable[[], None] | None = None) -> bool:
        """Do one piece, if there is anything to do; say whether there was."""
        ...


class _EndingError(Exception):
    """The server stops, in the middle of a piece."""


class Worker:
    """Works in a thread of its own.

    Args:
        background: Does a piece at a time, and calls its pause in between.
        share: Of the time.
    """

    def __init__(self, background: Works, share: float) -> None:
        """Prepare."""
        self._background = background
        self._stopping = threading.Event()
        self._pace = Throttle(share, sleep=self._rest)
        self._thread = threading.Thread(target=self._run, name="adaptation", daemon=True)
        self.failures = 0
        """Pieces that failed."""

    @property
    def seconds(self) -> float:
        """That pieces have taken so far, those that failed left out."""
        return self._pace.worked

    @property
    def longest(self) -> float:
        """Seconds of the longest piece: so long may a step have shared the device with it."""
        return self._pace.longest

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """End it behind the present piece, and wait for that; say whether there was time enough."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        wait = _AGAIN[0]
        while not self._stopping.is_set():
            try:
                if self._background.work(self._pace.start()):
                    self._pace()
                else:
                    self._rest(_IDLE)
                wait = _AGAIN[0]
            except _EndingError:
                return
            except Exception:  # noqa: BLE001 (the server goes on)
                self.failures += 1
                _log.exception("adaptation's background failed; it is tried again", extra={"seconds": wait})
                self._stopping.wait(wait)
                wait = min(2 * wait, _AGAIN[1])

    def _rest(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise _EndingError


class Throttle:
    """Rests after every piece of work, so long that work takes its share of the time and no more.

    It is what ``pause`` wants: ``refit(..., pause=pace.start())``. Time between two calls counts as work, whatever the
    process did meanwhile; on a CPU, XLA may use several cores for it, so a share of 0.25 is a quarter of the time.
    """

    def __init__(
        self,
        share: float = 0.25,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Begin a piece of work now.

        Args:
            share: Of the time, above 0 and at most 1.
            clock: Tells the time in seconds.
            sleep: Rests so many seconds. To end the work between two pieces, let it raise.

        Raises:
            InputError: No such share.
        """
        if not 0 < share <= 1:
            raise InputError(f"share: expected a number above 0 and at most 1, got {share}")
        self.share, self._clock, self._sleep = share, clock, sleep
        self.worked = 0.0
        """Seconds, all in all."""
        self.longest = 0.0
        """Seconds of the longest piece: so long may a step of the server have waited for the device."""
        self._began = clock()

    def start(self) -> "Throttle":
        """Begin a piece of work now."""
        self._began = self._clock()
        return self

    def __call__(self) -> None:
        """End a piece of work, rest, and begin the next."""
        worked = self._clock() - self._began
        self.worked += worked
        self.longest = max(self.longest, worked)
        if self.share < 1:
            self._sleep(worked * (1 / self.share - 1))
        self._began = self._clock()
