"""The worker: runs trials and refits in a thread of its own, in a share of the time, until the server stops."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from gati_jax.errors import InputError

_KEEP = 5.0  # seconds between two calls of ``keep``
_IDLE = 0.25  # seconds between two looks at whether there is something to do
_RETRY = (1.0, 60.0)  # seconds before a piece that failed is tried again: at first, and at most
_log = logging.getLogger(__name__)


class Works(Protocol):
    """What the worker runs: ``Recovery``."""

    def work(self, pause: Callable[[], None] | None = None) -> bool:
        """Do one piece, if there is anything to do; return whether there was."""
        ...


class _StoppingError(Exception):
    """Raised in the middle of a piece when the server stops."""


class Worker:
    """Runs pieces of work in a thread of its own, in a share of the time, and ``keep`` between them, by the clock."""

    def __init__(self, recovery: Works, share: float, keep: Callable[[], None] = lambda: None) -> None:
        """Prepare."""
        self.recovery, self._keep = recovery, keep
        self._stopping = threading.Event()
        self.throttle = Throttle(share, sleep=self._sleep)
        self._thread = threading.Thread(target=self._run, name="adaptation", daemon=True)
        self.failures = 0
        """Pieces that failed."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """End the thread behind its present piece; return whether there was time enough."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        wait, keep_at = _RETRY[0], time.monotonic() + _KEEP
        while not self._stopping.is_set():
            try:
                if time.monotonic() >= keep_at:
                    self._keep()
                    keep_at = time.monotonic() + _KEEP
                if self.recovery.work(self.throttle.start()):
                    self.throttle()
                else:
                    self._sleep(_IDLE)
                wait = _RETRY[0]
            except _StoppingError:
                return
            except Exception:  # noqa: BLE001 (the server goes on)
                self.failures += 1
                _log.exception("adaptation: recovery failed; it is tried again", extra={"seconds": wait})
                self._stopping.wait(wait)
                wait = min(2 * wait, _RETRY[1])

    def _sleep(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise _StoppingError


class Throttle:
    """Sleeps after every piece of work, so long that work takes its share of the time and no more.

    Pass it as ``pause``: ``refit(..., pause=throttle.start())``. Time between two calls counts as work, whatever the
    process did meanwhile; on a CPU, XLA may use several cores for it, so a share of 0.25 is a quarter of the time.
    """

    def __init__(
        self,
        share: float = 0.25,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Begin a piece of work now; ``sleep`` may raise to end the work between two pieces."""
        if not 0 < share <= 1:
            raise InputError(f"share: expected a number above 0 and at most 1, got {share}")
        self.share, self._clock, self._sleep = share, clock, sleep
        self.worked = 0.0
        """Seconds of all pieces, those that failed left out."""
        self._began = clock()

    def start(self) -> "Throttle":
        """Begin a piece of work now."""
        self._began = self._clock()
        return self

    def __call__(self) -> None:
        """End a piece of work, sleep, and begin the next."""
        worked = self._clock() - self._began
        self.worked += worked
        if self.share < 1:
            self._sleep(worked * (1 / self.share - 1))
        self._began = self._clock()
