"""Betting that a cascade disagrees more often than it may: a capital that grows large only if it does.

**What is bet against.** D_t is 1 if served request t disagrees with the base. The null hypothesis is that for every t
the mean of D_t, given all requests before t, is at most epsilon. D_t is seen only for a share of the hits: request t
is looked at with a probability q_t that is fixed before it comes (predictable), by a coin of its own. Its loss X_t =
1[hit, looked at, disagrees] / q_t then has the same mean given the past as D_t: q_t times D_t / q_t.

**One bet.** A capital is multiplied by 1 + s_t (X_t - epsilon). The stake s_t >= 0 is fixed before request t and below
1 / epsilon, so no factor is negative; under the null its mean given the past is at most 1. Such a capital is a
nonnegative supermartingale; it ever comes to 1 / delta with probability at most delta (Ville). The stake that grows
fastest if the true risk is r, when one looks with probability b, is s = b (r - epsilon) / (epsilon (1 - b epsilon)),
which is below b / epsilon for r < 1: then the factors are the likelihood ratios r / epsilon of a disagreement seen,
and (1 - b r) / (1 - b epsilon) of none. Validity needs b to be predictable and no more: it need not equal q_t.

**Not knowing r.** Several bets are kept, with r = 2, 4, 8 ... times epsilon, each with an equal part of the capital: a
mean of supermartingales is one (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting",
arXiv:2010.09686).

**Restarts.** In long quiet phases a bet loses nearly all that it has in play. So it never plays with everything: its
first stake is 1/2 of its part, the next 1/6, then 1/12: the n-th is 1 / (n (n + 1)), all together make 1, and 1 / (n +
1) is in reserve after n. Whenever what is in play has fallen to a share of the next stake, that stake joins it. *When*
is decided by the past alone, and moving capital from the reserve into play changes nothing of its sum, so reserve and
play together are still one supermartingale that starts at 1: all restarts share one delta, however many there are.
After n restarts an alarm needs 2 log(n) more evidence than the first would, which is what validity forever costs; a
detector that restarts at full wealth each time would raise false alarms sooner or later, for certain. Not a number can
be lost: what is in play never falls below a share of the next stake.

Shiryaev-Roberts e-detectors (Shin, Ramdas and Rinaldo, arXiv:2203.03532) restart without paying, and bound the mean
time between false alarms where this bounds the probability that there is ever one.
"""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

from scipy.optimize import root_scalar

from gati_jax.errors import InputError

RATIOS = (2.0, 4.0, 8.0, 16.0, 32.0)
"""What the bets take for the risk, over epsilon."""
COLLAPSED = 1 / 8
"""Of the next stake: what is in play has lost when it falls below."""


def stakes(epsilon: float, probability: float, ratios: tuple[float, ...] = RATIOS) -> tuple[float, ...]:
    """Return each bet's stake on one request.

    Args:
        epsilon: The risk that is bet against.
        probability: b, with which the request will be looked at if it hits; fixed before it comes.
        ratios: Risks over epsilon; a risk may come half-way from epsilon to 1.
    """
    risks = [min(ratio * epsilon, (1 + epsilon) / 2) for ratio in ratios]
    return tuple(probability * (r - epsilon) / (epsilon * (1 - probability * epsilon)) for r in risks)


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
        if not 0 < epsilon < 1:
            raise InputError(f"epsilon: expected a number between 0 and 1, got {epsilon}")
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
            loss: 1 / q if it was seen to disagree, where q is the probability that it was looked at with; else 0.
            probability: b, fixed before the request; best near q.

        Returns:
            The wealth after a loss; 0 where there was none: without a loss it cannot rise.
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


SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
"""r: what each bet takes for the risk, over the one that it bets against."""
_LARGEST = 1 - 1e-9
_ACCURACY = 1e-10


class Count(NamedTuple):
    """Requests looked at with one probability."""

    requests: int
    """All of them, misses and hits."""
    seen: int
    """Those that hit, were looked at, and disagreed."""


def mean_disagreement(counts: Mapping[float, Count]) -> float:
    """Return the share of requests that disagree, each one seen counted 1 / q times; 0 before the first request."""
    return sum(c.seen / q for q, c in counts.items()) / max(1, sum(c.requests for c in counts.values()))


def upper_bound(counts: Mapping[float, Count], delta: float) -> float:
    """Return the smallest mean disagreement that is ruled out; 1 where none is.

    Args:
        counts: By the probability of being looked at, in (0, 1].
        delta: The risk that this bound is ever wrong, over all times at which it is asked for.
    """
    needed = -math.log(delta)
    if estimate_log_capital(counts, _LARGEST) < needed:
        return 1.0
    # No factor falls with m, so what is ruled out at m is ruled out above it.
    found = root_scalar(lambda m: estimate_log_capital(counts, m) - needed, bracket=(1e-15, _LARGEST), xtol=_ACCURACY)
    return min(1.0, float(found.root) + 2 * _ACCURACY)  # to the safe side


def estimate_log_capital(counts: Mapping[float, Count], m: float) -> float:
    """Return the logarithm of the mean capital of all bets against a mean disagreement of m or more."""
    logs: list[float] = []
    for r in SHARES:
        if r == 0 and any(c.seen for c in counts.values()):
            continue  # this bet is lost
        lost = sum(c.seen for c in counts.values()) * math.log(r) if r else 0.0
        kept = sum((c.requests - c.seen) * (math.log1p(-q * r * m) - math.log1p(-q * m)) for q, c in counts.items())
        logs.append(lost + kept)
    most = max(logs)
    return most + math.log(sum(math.exp(log - most) for log in logs) / len(SHARES))
