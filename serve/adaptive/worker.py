"""Threads in the background: the worker runs trials and refits in a share of the time; the saver saves the state."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from gati_jax.errors import InputError

_SAVE = 5.0  # seconds between two saves while nothing changes
_AGAIN = 1.0  # seconds before a save that failed is tried again
_IDLE = 0.25  # seconds between two looks at whether there is something to do
_RETRY = (1.0, 60.0)  # seconds before a piece that failed is tried again: at first, and at most
_log = logging.getLogger("serve.adaptive.worker")


class Works(Protocol):
    """What the worker runs: ``Recovery``."""

    def work(self, pause: Callable[[], None] | None = None) -> bool:
        """Do one piece, if there is anything to do; return whether there was."""
        ...


class _StoppingError(Exception):
    """Raised in the middle of a piece when the server stops."""


class Worker:
    """Runs pieces of work in a thread of its own, in a share of the time, while it is ``allowed`` to."""

    def __init__(self, recovery: Works, share: float, allowed: Callable[[], bool] = lambda: True) -> None:
        """Prepare."""
        self.recovery, self._allowed = recovery, allowed
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
        wait = _RETRY[0]
        while not self._stopping.is_set():
            try:
                if self._allowed() and self.recovery.work(self.throttle.start()):
                    self.throttle()
                else:
                    self._sleep(_IDLE)
                wait = _RETRY[0]
            except _StoppingError:
                return
            except Exception as error:  # noqa: BLE001 (the server goes on)
                self.failures += 1
                bug = not isinstance(error, OSError)  # a disk that is full is none
                _log.error(
                    "adaptation: recovery failed; it is tried again",
                    exc_info=bug,
                    extra={"seconds": wait, "why": str(error)},
                )
                self._stopping.wait(wait)
                wait = min(2 * wait, _RETRY[1])

    def _sleep(self, seconds: float) -> None:
        if self._stopping.wait(seconds):
            raise _StoppingError


class Saver:
    """Saves the state in a thread of its own, at once when it has changed and every few seconds.

    So no thread that answers waits for a disk. What cannot be saved is tried again until it can.
    """

    def __init__(self, save: Callable[[], None]) -> None:
        """Prepare; ``save`` raises OSError where the disk is full, say."""
        self._save = save
        self._wake = threading.Condition()
        self._wanted = self._tried = 0  # changes: how many there were, and how many a save has taken along
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="adaptation-state", daemon=True)
        self.failing = False
        """Whether the last save failed."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread, and save once more; if it hangs in a save, leave it there."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if not self._thread.is_alive():
            self.try_to_save()

    def changed(self) -> None:
        """Have the state saved at once."""
        with self._wake:
            self._wanted += 1
            self._wake.notify_all()

    def wait(self, timeout: float) -> None:
        """Wait until the changes so far are saved, or a save of them has failed."""
        with self._wake:
            wanted = self._wanted
            self._wake.wait_for(lambda: self._tried >= wanted or self._stopping, timeout)

    def try_to_save(self) -> None:
        """Save; where that fails, say so once."""
        with self._wake:
            wanted = self._wanted
        try:
            self._save()
        except Exception as error:  # noqa: BLE001 (tried again)
            if not self.failing:
                _log.error(
                    "adaptation: the state cannot be saved: trials pause, and what changes is answered by the base",
                    exc_info=not isinstance(error, OSError),
                    extra={"why": str(error)},
                )
            self.failing = True
        else:
            if self.failing:
                _log.warning("adaptation: the state is saved again, and trials go on")
            self.failing = False
        with self._wake:
            self._tried = wanted
            self._wake.notify_all()

    def _run(self) -> None:
        while True:
            with self._wake:
                seconds = _AGAIN if self.failing else _SAVE
                self._wake.wait_for(lambda: self._stopping or self._wanted > self._tried, seconds)
                if self._stopping:
                    return
            self.try_to_save()


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
