"""Certifying on traffic as it comes: how far along its path a plan may go, decided at any time.

**The null hypothesis** of a step: at every time, the mean of the conditional risks so far is more than epsilon, where a
request's conditional risk is the mean of its loss given all before it. Requests need not be independent. A rejection
says, with confidence 1 - delta, that at some time the traffic so far was served with a mean conditional risk of at most
epsilon; for a path of one step, at the time of the rejection. It extends to later traffic as far as that is like it,
which the monitor watches. The plan, the order of its steps and when to give up are fixed before the first request.

**The test** bets against the null hypothesis with the factors of the confidence sequence in `betting`, at m = epsilon:
r for an observed loss and (1 - q r epsilon) / (1 - q epsilon) for none, for several r < 1. Under the null hypothesis
the capital ever comes to 1 / delta with probability at most delta.

**The path** is walked from its strictest step on. A step is certified once its capital has come to 1 / delta and all
before it are certified, possibly at different times. This needs no correction for the number of steps (fixed-sequence
testing): to certify anything wrongly, the first step whose null hypothesis is true must have been rejected.
"""

import math

import numpy as np
from jaxtyping import Bool, Float

from gati_jax.errors import InputError, check_share

from .betting import SHARES, Count, log_bets, log_capital

MAXIMUM = 50_000


class SequentialCertifier:
    """Certifies steps of a path from the losses of requests, one after another.

    Example:
        >>> certifier = SequentialCertifier(steps=2, epsilon=0.05, delta=0.05)
        >>> for i in range(400):
        ...     certifier.add(np.array([False, i % 10 == 0]))  # the second step disagrees on 10 %
        >>> certifier.certified, certifier.decided
        (0, False)
    """

    __slots__ = (
        "_kept", "_log_bets", "_lost", "_reached", "certified", "delta", "epsilon", "losses", "maximum", "n", "steps",
    )  # fmt: skip

    def __init__(self, steps: int, epsilon: float, delta: float, *, maximum: int = MAXIMUM) -> None:
        """Start without any request.

        Args:
            steps: Of the path, strict to loose, without the bare base, which needs no certificate.
            epsilon: The disagreement to certify.
            delta: The risk of certifying any step wrongly.
            maximum: Requests after which it gives up: steps that are not certified by then never are, and if none is,
                the result is inconclusive.

        Raises:
            InputError: An argument is out of its range.
        """
        if steps < 1 or maximum < 1:
            raise InputError(f"steps, maximum: expected 1 or more, got {steps} and {maximum}")
        check_share("epsilon", epsilon)
        check_share("delta", delta)
        self.steps, self.epsilon, self.delta, self.maximum = steps, epsilon, delta, maximum
        self.n = 0
        self.losses = np.zeros(steps, np.int64)
        """Observed so far, by step."""
        self.certified = -1
        """The farthest certified step; -1 where none is."""
        self._reached: Bool[np.ndarray, " steps"] = np.zeros(steps, bool)
        self._log_bets: Float[np.ndarray, "bets steps"] = np.zeros((len(SHARES), steps))
        self._lost = log_bets({1.0: Count(1, 1)}, epsilon)[:, None]
        self._kept: dict[float, Float[np.ndarray, "bets one"]] = {}  # by q: few are ever used

    @property
    def decided(self) -> bool:
        """Whether further requests would change nothing."""
        return self.certified == self.steps - 1 or self.n >= self.maximum

    def add(self, losses: Bool[np.ndarray, " steps"], q: float = 1.0) -> None:
        """Take one request; once decided, it is ignored.

        Args:
            losses: By step, whether it is observed to disagree there.
            q: The probability, fixed before it came, of observing a disagreement: 1 where the base's answer is always
                computed.

        Raises:
            InputError: Losses of another shape or dtype; q outside (0, 1].
        """
        if losses.shape != (self.steps,) or losses.dtype != bool:
            raise InputError(f"losses: expected bool[{self.steps}], got {losses.dtype}{list(losses.shape)}")
        if not 0 < q <= 1:
            raise InputError(f"q: expected a probability above 0, got {q}")
        if self.decided:
            return
        self.n += 1
        self.losses += losses
        if q not in self._kept:
            self._kept[q] = log_bets({q: Count(1, 0)}, self.epsilon)[:, None]
        self._log_bets += np.where(losses, self._lost, self._kept[q])
        self._reached |= self.log_capital() >= -math.log(self.delta)
        self.certified = self.steps - 1 if self._reached.all() else int(self._reached.argmin()) - 1

    def log_capital(self) -> Float[np.ndarray, " steps"]:
        """Return the logarithm of each step's capital; 0 before the first request."""
        return np.asarray(log_capital(self._log_bets))
