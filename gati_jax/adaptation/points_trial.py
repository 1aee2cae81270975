"""From which score on may stored points answer? Read off past traffic, then certified on later traffic.

1. Watch. Of every request it is known what the points would have said; where the base's answer is known, too, whether
   that was right. From the latest of these, conformal risk control proposes a threshold for a risk below epsilon.
   Where points would answer hardly anyone, nothing is tried: a trial costs the base's answer to every request.
2. Trial. The threshold is fixed now. On all requests that come later, ``SequentialCertifier`` tests it: the loss is
   that of the *whole* service, had points answered from that score on: theirs where they had, what the cascade did
   elsewhere. So the promise of epsilon is not shared out. What points would answer becomes no point, on trial as in
   service: else the trial would know every frame before the one that is asked for, and the service would not.
3. Open; the monitor watches the whole from then on, and may close them. Each trial in a row that comes to nothing waits
   twice as long for the next.
"""

import collections
import dataclasses
import math
from typing import Literal, NamedTuple

import numpy as np

from .points import threshold_for
from .sequential import SequentialCertifier

_HOPELESS = 0.01  # of the capital that a trial begins with
_RECENT = 50  # lookups by which it is judged whether points are near
State = Literal["watching", "trial", "open", "empirical"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointsTrialConfig:
    """How points are opened."""

    known: int = 200
    """Requests with a known base answer from which thresholds are read."""
    every: int = 100
    """Requests between two looks at whether a trial would be worth it."""
    share: float = 0.05
    """Of the requests, that points must be expected to answer for a trial to begin."""
    risk: float = 0.25
    """Over epsilon, for which the threshold is read."""
    most: int = 4000
    """Requests of a trial, and to wait for the next after the first that came to nothing."""
    gap: int = 10
    """Requests left out before it."""
    lookups: float = 0.1
    """Share of requests for which points are asked while hardly any has a point near it: a look at 2,000 points takes
    0.15 ms, for nothing where requests do not repeat."""


class Seen(NamedTuple):
    """A served request, as points see it."""

    score: float
    """Of the nearest point; -inf where there was none, NaN where points were not asked."""
    point_wrong: bool
    """Whether the point disagrees with the base; only where that is known."""
    served_wrong: bool
    """Whether what was served does, as far as is known."""
    q: float
    """The probability with which the base's answer was to be known."""
    known: bool


class PointsTrial:
    """Decides when points are open; state only, no points."""

    def __init__(self, epsilon: float, config: PointsTrialConfig | None = None) -> None:
        """Watch."""
        self.config, self.epsilon = config or PointsTrialConfig(), epsilon
        self.state: State = "watching"
        self.threshold = np.inf
        """From which on points may answer; infinite but when open."""
        self.n = 0
        """Requests of the present trial."""
        self._proposed, self._wait = np.inf, self.config.every
        self._begin_watch()

    def _begin_watch(self) -> None:
        self._past: collections.deque[Seen] = collections.deque(maxlen=self.config.known)
        self._since = 0
        self._would: collections.deque[float] = collections.deque(maxlen=self.config.known)
        self._near: collections.deque[bool] = collections.deque(maxlen=_RECENT)

    @property
    def lookups(self) -> float:
        """Share of requests for which points are to be asked."""
        some_near = len(self._near) < _RECENT or sum(self._near) >= self.config.share * _RECENT
        return 1.0 if some_near or self.state != "watching" else self.config.lookups

    @property
    def wants_trial(self) -> bool:
        """Whether one would be worth it, as things are; ask after every request, and ``begin`` it."""
        if self.state != "watching" or len(self._past) < self.config.known or self._since < self._wait:
            return False
        self._since = 0
        self._proposed = self._propose()
        return self._share(self._proposed) >= self.config.share

    def would_miss(self, score: float) -> bool:
        """Whether points would not have answered a request, now or by the threshold on trial; NaN: were not asked."""
        return not score >= {"trial": self._proposed, "open": self.threshold}.get(self.state, np.inf)

    def _propose(self) -> float:
        past = self._past
        scores, wrong = np.array([s.score for s in past]), np.array([s.point_wrong for s in past])
        weights = np.array([1 / s.q for s in past])
        found = threshold_for(scores, wrong, weights, risk=self.config.risk * self.epsilon)
        if np.isfinite(found):
            return found
        # Fewer rows than a risk so small can be read from: the best of what was seen.
        right = scores[~wrong & np.isfinite(scores)]
        above = right[right > scores[wrong].max(initial=-np.inf)]
        return float(np.median(above)) if len(above) else np.inf

    def _share(self, threshold: float) -> float:
        return float(np.mean(np.array(self._would) >= threshold))

    def begin(self, delta: float, now: int) -> None:
        """Begin the trial that was wanted.

        Args:
            delta: Its part of the risk.
            now: Number of the newest request that has come: only later ones count.
        """
        self.state, self.n = "trial", 0
        self._after = now + self.config.gap
        self._certifier = SequentialCertifier(1, self.epsilon, delta, maximum=self.config.most)

    def close(self) -> None:
        """Stop answering, as an alarm asks, and watch again."""
        self.state, self.threshold = "watching", np.inf
        self._begin_watch()

    def add(self, number: int, seen: Seen) -> State:
        """Take a served request, in order; says how things stand.

        Args:
            number: In the order in which requests came.
            seen: What is known of it.
        """
        self._since += 1
        if math.isnan(seen.score):
            return self.state
        self._would.append(seen.score)
        self._near.append(seen.score > -math.inf)
        if self.state == "watching" and seen.known:
            self._past.append(seen)
        elif self.state == "trial" and number > self._after:
            self.n += 1
            wrong = seen.point_wrong if seen.score >= self._proposed else seen.served_wrong
            self._certifier.add(np.array([wrong or not seen.known]), seen.q)  # a base answer that was lost: the worst
            self._decide()
        return self.state

    def _decide(self) -> None:
        certifier = self._certifier
        if certifier.certified >= 0:
            self.state, self.threshold, self._wait = "open", self._proposed, self.config.every
        elif certifier.decided or certifier.log_capital()[0] < np.log(_HOPELESS):
            self.state = "empirical"

    def watch_again(self) -> None:
        """After an empirical end: begin anew, and wait twice as long as the last time."""
        self._wait = max(self.config.most, 2 * self._wait)
        self.close()
