"""How fast the images of a model are answered under load."""

import math

FULL = 8  # images that wait with which the device is taken to be busy: a batch
_MEMORY = 5.0  # seconds of load over which the rate is averaged
_LEAST = 0.25  # seconds of load before it is believed


class Drain:
    """The rate of one model, over the time in which at least ``FULL`` of its images wait, whose bodies are here."""

    def __init__(self, now: float) -> None:
        """Begin with nothing."""
        self.waiting = 0
        self._answered = self._loaded = 0.0
        self._at = now

    @property
    def rate(self) -> float | None:
        """Images answered per second under load; None if there was none."""
        return self._answered / self._loaded if self._loaded >= _LEAST and self._answered else None

    def advance(self, now: float) -> None:
        """Let the time since the last change count, if the model was under load."""
        if self.waiting >= FULL:
            passed = now - self._at
            keep = math.exp(-passed / _MEMORY)
            self._answered, self._loaded = self._answered * keep, self._loaded * keep + passed
        self._at = now

    def leave(self, images: int, *, answered: bool) -> None:
        """Count images that leave, and that waited."""
        self._answered += images if answered and self.waiting >= FULL else 0
        self.waiting -= images
