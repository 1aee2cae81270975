"""Background work that leaves most of the device, or of a core, to those who wait."""

import time
from collections.abc import Callable

from gati_jax._errors import InputError


class Pace:
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
            msg = f"share: expected a number above 0 and at most 1, got {share}"
            raise InputError(msg)
        self.share, self._clock, self._sleep = share, clock, sleep
        self.worked = 0.0
        """Seconds, all in all."""
        self.longest = 0.0
        """Seconds of the longest piece: so long may a step of the server have waited for the device."""
        self._began = clock()

    def start(self) -> "Pace":
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
