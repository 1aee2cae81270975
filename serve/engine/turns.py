"""One device for several engines: they take turns, a step each, in equal shares of its time.

Start-time fair queueing (Goyal, Vin and Cheng 1996): each engine has a clock that its steps move on by the time that
they take. Of those that wait, the engine whose clock is least goes first. One that was idle begins at the clock of the
others, so it saves nothing up.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol


class Turn(Protocol):
    """An engine's place among those that share a device."""

    def take(self) -> None:
        """Wait until the device is this engine's; nothing happens if it is already."""

    def give_back(self) -> None:
        """Let others have it, if it is this engine's."""


class Alone:
    """The turn of an engine that shares its device with no other."""

    def take(self) -> None:
        """Go on at once."""

    def give_back(self) -> None:
        """Do nothing: no other engine waits."""


class Turns:
    """Hands out the turns of one device.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with no engine."""
        self._changed, self._clock = threading.Condition(), clock
        self._waiting: set[_Shared] = set()
        self._holder: _Shared | None = None
        self._now = self._since = 0.0  # the clock of the last turn, and when that began

    def join(self) -> Turn:
        """Return the turn of one more engine."""
        return _Shared(self)

    def take(self, turn: "_Shared") -> None:
        """See ``Turn``."""
        with self._changed:
            if self._holder is turn:
                return
            turn.used = max(turn.used, self._now)
            self._waiting.add(turn)
            while self._holder is not None or min(self._waiting, key=lambda one: one.used) is not turn:
                self._changed.wait()
            self._waiting.remove(turn)
            self._holder, self._now, self._since = turn, turn.used, self._clock()

    def give_back(self, turn: "_Shared") -> None:
        """See ``Turn``."""
        with self._changed:
            if self._holder is turn:
                turn.used += self._clock() - self._since
                self._holder = None
                self._changed.notify_all()


class _Shared:
    """A turn among others."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self.used = turns, 0.0

    def take(self) -> None:
        self._turns.take(self)

    def give_back(self) -> None:
        self._turns.give_back(self)
