"""Whether traffic changes, told without labels: ADWIN on the scores of hits and on exits.

ADWIN (Bifet and Gavalda, "Learning from time-changing data with adaptive windowing", 2007) keeps a window of the latest
numbers and drops its older part whenever the means of both parts differ by more than chance. A change says nothing of
the disagreement: it only makes the monitor look more closely. Nothing that the monitor guarantees rests on it.
"""

import importlib
import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from gati_jax.errors import InputError

from .request_log import Observation

CONFIDENCE = 0.002  # ADWIN's own default: the chance that it finds a change where there is none, roughly, per window
SCORE_RANGE = 50.0  # selectors' scores beyond are as sure as can be; one wild score may not fill a window


@runtime_checkable
class ChangeTest(Protocol):
    """What is asked of a test for changes of a mean; river's are such."""

    @property
    def drift_detected(self) -> bool:
        """Whether the latest number showed a change."""
        ...

    def update(self, x: float) -> None:
        """Take the next number."""


def adwin() -> ChangeTest:
    """Return river's ADWIN.

    Raises:
        InputError: river is not installed.
    """
    try:
        drift = importlib.import_module("river.drift")
    except ImportError as error:
        raise InputError(
            'stir: expected the package river for ADWIN (pip install "gati-jax[adapt]"), got none; or stir=False'
        ) from error
    return drift.ADWIN(delta=CONFIDENCE)


class DriftDetector:
    """Two change tests: one on the scores of requests that hit, one on where requests leave."""

    __slots__ = ("_depth", "_exits", "_scores", "count")

    def __init__(self, depth: int, make: Callable[[], ChangeTest] = adwin) -> None:
        """Start without a past.

        Args:
            depth: Of the base: exits are told as shares of it.
            make: Returns a new change test.

        Raises:
            InputError: As ``make`` does.
        """
        self._depth = depth
        self._scores, self._exits = make(), make()
        self.count = 0
        """Changes found so far."""

    def stirred(self, observed: Observation) -> bool:
        """Take one request; return whether it shows that the traffic has changed."""
        exits, found = self._exits, False
        exits.update(observed.exit / self._depth)
        if exits.drift_detected:
            found = True
        score = observed.score
        if math.isfinite(score):
            scores = self._scores
            scores.update(min(max(score, -SCORE_RANGE), SCORE_RANGE))
            found = found or scores.drift_detected
        self.count += found
        return found
