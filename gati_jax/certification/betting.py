"""Testing by betting: alarms at too many disagreements, bounds on their mean, and certifying on traffic as it comes.

**Betting against a hypothesis.** A capital starts at 1 and is multiplied, for every request, by a factor whose mean
given the past is at most 1 if the hypothesis is true. Such a capital is a nonnegative supermartingale: it ever comes to
1 / delta with probability at most delta (Ville), so the hypothesis may be rejected at any time. A mean of such capitals
is one again, which is how several bets share a start of 1 where the best one is not known (Waudby-Smith and Ramdas,
"Estimating means of bounded random variables by betting", arXiv:2010.09686).

**What is observed.** D_t is 1 if served request t disagrees with the base. It is observed for a share of the hits only:
with a probability q_t that is fixed before the request comes (predictable), by an independent coin. The loss X_t =
1[hit, observed, disagrees] / q_t then has the same mean given the past as D_t.

**The e-process** (`EProcess`) bets against "for every t, the mean of D_t given the past is at most epsilon": it grows
when a cascade disagrees too often. Its factor is 1 + s_t (X_t - epsilon), where the stake s_t is below 1 / epsilon, so
that no factor is negative. If the true risk is r and requests are observed with probability b, the stake that grows
fastest is s = b (r - epsilon) / (epsilon (1 - b epsilon)); the factors are then the likelihood ratios, r / epsilon for
an observed disagreement and (1 - b r) / (1 - b epsilon) for none. Validity needs b to be predictable; it need not equal
q_t. Bets on r = 2, 4, 8 ... times epsilon share the capital.

Restarts: in long quiet phases a bet loses nearly all that it has in play, so it never plays with everything. Its first
stake is 1/2 of its part, the next 1/6, then 1/12: the n-th is 1 / (n (n + 1)), and 1 / (n + 1) is in reserve after n.
When what is in play has fallen to a share of the next stake, that stake joins it. The time is decided by the past
alone, and moving capital from the reserve into play leaves the sum as it is, so all restarts share one delta. After n
of them an alarm needs 2 log(n) more evidence; a detector that restarts with its full capital each time would raise a
false alarm sooner or later. Shiryaev-Roberts e-detectors (Shin, Ramdas and Rinaldo, arXiv:2203.03532) restart for free,
and bound the mean time between false alarms where this bounds the probability that there is ever one.

**The confidence sequence** (`upper_bound`) bets against "the mean disagreement is m or more": an observed disagreement
multiplies the capital by r < 1, any other request by (1 - q r m) / (1 - q m). That is 1 + s (m - X) with s = q (1 - r)
/ (1 - q m). Several r share the capital, and every m at which it comes to 1 / delta is ruled out. Where risks change,
let p_t be the mean of D_t given the past: a factor's mean is 1 + s_t (m - p_t) <= exp(s_t (m - p_t)), so the capital
over exp(sum of s_t (m - p_t)) is a supermartingale. With confidence 1 - delta, at all times at once, the mean of the
p_t so far, weighted by s_t (about proportional to q_t), is below the bound.

**Certifying on traffic** (`SequentialCertifier`) decides at any time how far along its path a plan may go. The null
hypothesis of a step is that at every time, the mean of the conditional risks so far is more than epsilon, where a
request's conditional risk is the mean of its loss given all before it. Requests need not be independent. A rejection
says, with confidence 1 - delta, that at some time the traffic so far was served with a mean conditional risk of at most
epsilon; for a path of one step, at the time of the rejection. It extends to later traffic as far as that is like it,
which the monitor watches. The plan, the order of its steps and when to give up are fixed before the first request.

Each step bets against it with the factors of the confidence sequence, at m = epsilon: r for an observed loss and (1 -
q r epsilon) / (1 - q epsilon) for none, for several r < 1. Under the null hypothesis the capital ever comes to 1 /
delta with probability at most delta.

The path is walked from its strictest step on. A step is certified once its capital has come to 1 / delta and all
before it are certified, possibly at different times. This needs no correction for the number of steps (fixed-sequence
testing): to certify anything wrongly, the first step whose null hypothesis is true must have been rejected.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import root_scalar
from scipy.special import xlogy

from gati_jax.errors import InputError, check_share

RATIOS = (2.0, 4.0, 8.0, 16.0, 32.0)
"""What the bets of an e-process take for the risk, over epsilon."""
COLLAPSED = 1 / 8
"""Of the next stake: when what is in play falls below, the bet restarts."""
ALIKE = 0.1
"""r of a bet that takes all losses for alike: what it keeps after a loss of 1."""
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
"""r: what the bets of a confidence sequence take for the risk, over the one that they bet against."""
LARGEST_MEAN = 1 - 1e-12
"""At 1 stakes would be infinite."""
MAXIMUM = 50_000
"""Requests after which a certifier gives up, by default."""
_ACCURACY = 1e-13


def log_capital(log_bets: Float[np.ndarray, "bets ..."]) -> Float[np.ndarray, "..."] | np.float64:
    """Return the logarithm of the mean capital of bets, from the logarithms of their capitals."""
    # As scipy.special.logsumexp, which takes a hundred times as long for so few: this runs for every request.
    return np.logaddexp.reduce(log_bets, axis=0) - math.log(len(log_bets))


def smallest_ruled_out(log_capital_at: Callable[[float], float], delta: float, *, lowest: float) -> float:
    """Return the smallest mean at which the capital against it comes to 1 / delta; 1 where it never does.

    Args:
        log_capital_at: Of a mean, non-decreasing: what is ruled out at a mean is ruled out above it.
        delta: The risk that the bound is wrong.
        lowest: Where the capital is still below 1 / delta.
    """
    needed = -math.log(delta)
    if log_capital_at(LARGEST_MEAN) < needed:
        return 1.0
    found = root_scalar(lambda m: log_capital_at(m) - needed, bracket=(lowest, LARGEST_MEAN), xtol=_ACCURACY)
    return min(1.0, float(found.root) + 2 * _ACCURACY)  # to the safe side


def stakes(epsilon: float, probability: float, ratios: tuple[float, ...] = RATIOS) -> tuple[float, ...]:
    """Return each bet's stake on one request.

    Args:
        epsilon: The risk that is bet against.
        probability: b, with which the request will be observed if it hits; fixed before it comes.
        ratios: Risks over epsilon; a risk is taken to be at most half-way from epsilon to 1.
    """
    risks = [min(ratio * epsilon, (1 + epsilon) / 2) for ratio in ratios]
    return tuple(probability * (r - epsilon) / (epsilon * (1 - probability * epsilon)) for r in risks)


def mean_p_value(losses: Float[np.ndarray, " n"], mean: float, expected: float) -> float:
    """Return a p-value of "the mean of the loss is ``mean`` or more".

    Each loss X multiplies a bet's capital by 1 + s (mean - X), which has a mean of at most 1 if the hypothesis is true;
    so capital over c has a probability of at most 1 / c (Markov). Of two bets with half of the capital each, one takes
    losses for 0 or 1 with the expected mean, the other for all alike, so that it can stake more.

    Args:
        losses: In [0, 1], independent and of one distribution; their order does not matter.
        mean: What is bet against.
        expected: The mean that is taken for true; known before these losses.

    Example:
        >>> round(mean_p_value(np.zeros(72), 0.05, 0.0), 3)
        0.029
    """
    kept = np.array([[min(expected / mean, 0.9)], [ALIKE]])
    stakes_of = (1 - np.maximum(kept, 1e-9)) / (1 - mean)
    return min(1.0, math.exp(-float(log_capital(np.log1p(stakes_of * (mean - losses)).sum(1)))))


class EProcess:
    """The capital against "the disagreement, given the past, is at most epsilon"; 1 before the first request."""

    __slots__ = ("_factors", "_floors", "_stakes", "epsilon", "playing", "ratios", "restarts")

    def __init__(self, epsilon: float, ratios: tuple[float, ...] = RATIOS) -> None:
        """Put the first stakes in play.

        Args:
            epsilon: The risk that is bet against.
            ratios: Risks to bet on, over epsilon, each above 1.

        Raises:
            InputError: Epsilon outside (0, 1); a ratio of 1 or less; no ratio.
        """
        check_share("epsilon", epsilon)
        if not ratios or not min(ratios) > 1:
            raise InputError(f"ratios: expected numbers above 1, got {ratios}")
        self.epsilon, self.ratios = epsilon, ratios
        self.restarts = [1] * len(ratios)
        """How many stakes each bet has put in play."""
        self.playing = [1 / 2] * len(ratios)
        """What each bet has in play, of a part that began as 1."""
        self._floors = [COLLAPSED / 6] * len(ratios)
        self._stakes: dict[float, tuple[float, ...]] = {}  # by probability: few are ever used
        self._factors: dict[float, tuple[float, ...]] = {}  # of a request without a loss

    def bet(self, loss: float, probability: float) -> float:
        """Bet on one request.

        Args:
            loss: 1 / q if it was observed to disagree, where q is the probability with which it was observed; else 0.
            probability: b, fixed before the request; best near q.

        Returns:
            The capital after a loss; 0 where there was none, for without a loss it cannot rise.
        """
        factors = self._factors.get(probability) or self._prepare(probability)
        playing, floors = self.playing, self._floors
        if loss:
            factors = [f + s * loss for f, s in zip(factors, self._stakes[probability], strict=True)]
        for i, factor in enumerate(factors):
            playing[i] = capital = playing[i] * factor
            if capital < floors[i]:
                self._restart(i)
        return self.total if loss else 0.0

    @property
    def total(self) -> float:
        """What is in play and in reserve, the mean over all bets."""
        parts = itertools.starmap(lambda play, n: play + 1 / (n + 1), zip(self.playing, self.restarts, strict=True))
        return sum(parts) / len(self.playing)

    def resume(self, playing: Sequence[float], restarts: Sequence[int]) -> None:
        """Go on from what another process had in play, and how many stakes it had put there."""
        self.playing, self.restarts = list(playing), list(restarts)
        self._floors = [COLLAPSED / ((n + 1) * (n + 2)) for n in restarts]

    def _restart(self, i: int) -> None:
        self.restarts[i] = n = self.restarts[i] + 1
        self.playing[i] += 1 / (n * (n + 1))
        self._floors[i] = COLLAPSED / ((n + 1) * (n + 2))

    def _prepare(self, probability: float) -> tuple[float, ...]:
        if not 0 < probability <= 1:
            raise InputError(f"probability: expected a number in (0, 1], got {probability}")
        placed = stakes(self.epsilon, probability, self.ratios)
        self._stakes[probability] = placed
        self._factors[probability] = factors = tuple(1 - stake * self.epsilon for stake in placed)
        return factors


class Count(NamedTuple):
    """Requests observed with one probability."""

    requests: int
    """All of them, misses and hits."""
    seen: int
    """Those that hit, were observed, and disagreed."""


def mean_disagreement(counts: Mapping[float, Count]) -> float:
    """Return the share of requests that disagree, each observed one counted 1 / q times; 0 before the first request."""
    return sum(c.seen / q for q, c in counts.items()) / max(1, sum(c.requests for c in counts.values()))


def upper_bound(counts: Mapping[float, Count], delta: float) -> float:
    """Return the smallest mean disagreement that is ruled out; 1 where none is.

    Args:
        counts: By the probability of being observed, in (0, 1].
        delta: The risk that this bound is ever wrong, over all times at which it is asked for.
    """
    return smallest_ruled_out(lambda m: float(log_capital(log_bets(counts, m))), delta, lowest=1e-15)


def log_bets(counts: Mapping[float, Count], m: float) -> Float[np.ndarray, " bets"]:
    """Return the logarithm of each bet's capital against a mean disagreement of ``m`` or more."""
    shares = np.array(SHARES)
    logs = xlogy(sum(c.seen for c in counts.values()), shares)  # -infinity for a bet on none, once one is seen
    for q, c in counts.items():
        logs = logs + (c.requests - c.seen) * (np.log1p(-q * shares * m) - math.log1p(-q * m))
    return logs


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
