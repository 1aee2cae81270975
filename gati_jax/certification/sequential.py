"""Certifying on traffic as it comes: how far along its path a plan may go, decided at any time.

**The null hypothesis** of a step: at every time of the block, the mean of the conditional risks so far is more than
epsilon. (A request's conditional risk is the mean of its loss given all before it.) A step that disagrees too often
throughout is a case of it, requests need not be independent. A rejection says, with confidence 1 - delta, that the
traffic up to it was served with a mean conditional risk of at most epsilon at some time; it speaks of later traffic as
far as that goes on alike, and the monitor watches whether it does. For a path of one step it says so of the very time
of the rejection. The plan, the order of its steps and when to give up are fixed before the first request.

**The test** bets against the null: a capital is multiplied by 1 + s (epsilon - X), X = loss / q, where the loss is
known with a probability q that is fixed before the request comes, and the stake s >= 0 is, too. Each factor's mean
given the past is at most exp(s (epsilon - risk)), so under the null the capital stays below a nonnegative
supermartingale from 1, and comes to 1 / delta with probability at most delta, at *any* time (Ville; `estimate.py` has
the argument, and how requests weigh where q varies). The stakes are those that make the factors r for a loss and (1 -
q r epsilon) / (1 - q epsilon) for none, for several r < 1 that share the capital: r epsilon is what such a bet takes
for the risk.

**The path** is walked from its strictest step on. A step is certified once its capital has come to 1 / delta and all
before it are certified, be it at different times. This needs no correction for the number of steps (fixed sequence, as
in `planning/testing.py`): to certify anything wrongly, the first step whose null is true must have been rejected.
"""

import math

import numpy as np
from jaxtyping import Bool, Float

from gati_jax.errors import InputError

from .betting import SHARES

METHOD = "sequential betting, conditional mean"
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
        "_log_capital",
        "_reached",
        "_shares",
        "certified",
        "delta",
        "epsilon",
        "losses",
        "maximum",
        "n",
        "steps",
    )

    def __init__(self, steps: int, epsilon: float, delta: float, *, maximum: int = MAXIMUM) -> None:
        """Start without any request.

        Args:
            steps: Of the path, strict to loose; leave out the bare base, which needs no certificate.
            epsilon: The disagreement to certify.
            delta: The risk of certifying any step wrongly.
            maximum: Requests after which it gives up; what is not certified by then stays so.

        Raises:
            InputError: An argument is out of its range.
        """
        if steps < 1 or maximum < 1:
            raise InputError(f"steps, maximum: expected 1 or more, got {steps} and {maximum}")
        if not (0 < epsilon < 1 and 0 < delta < 1):
            raise InputError(f"epsilon, delta: expected numbers between 0 and 1, got {epsilon} and {delta}")
        self.steps, self.epsilon, self.delta, self.maximum = steps, epsilon, delta, maximum
        self.n = 0
        self.losses = np.zeros(steps, np.int64)
        """Seen so far, by step."""
        self.certified = -1
        """The farthest certified step; -1 where none is."""
        self._reached: Bool[np.ndarray, " steps"] = np.zeros(steps, bool)
        self._shares = np.array(SHARES)[:, None]
        self._log_capital: Float[np.ndarray, "bets steps"] = np.full((len(SHARES), steps), -math.log(len(SHARES)))

    @property
    def decided(self) -> bool:
        """Whether further requests would change nothing."""
        return self.certified == self.steps - 1 or self.n >= self.maximum

    @property
    def empirical(self) -> bool:
        """Whether it ended with nothing certified: what was measured may be reported, and opens no cache."""
        return self.decided and self.certified < 0

    def add(self, losses: Bool[np.ndarray, " steps"], q: float = 1.0) -> None:
        """Take one request; once decided, it is ignored.

        Args:
            losses: By step, whether it is known to disagree there.
            q: The probability, fixed before it came, with which that would be known if it did: 1 where the base's
                answer is always computed.

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
        kept = np.log1p(-q * self._shares * self.epsilon) - math.log1p(-q * self.epsilon)
        with np.errstate(divide="ignore"):  # a bet on no loss at all is lost with the first
            self._log_capital += np.where(losses, np.log(self._shares), kept)
        self._reached |= self.log_capital() >= -math.log(self.delta)
        self.certified = self.steps - 1 if self._reached.all() else int(self._reached.argmin()) - 1

    def log_capital(self) -> Float[np.ndarray, " steps"]:
        """Return the logarithm of each step's capital; 0 before the first request."""
        return np.logaddexp.reduce(self._log_capital, axis=0)
