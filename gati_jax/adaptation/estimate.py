"""How often served requests have disagreed, and a bound on it that holds at any time.

Of n requests that were each looked at with probability q if they hit, d were seen to disagree; counts are kept for
each q. The bound bets against "the mean disagreement is m or more": for a disagreement seen the capital is multiplied
by r < 1, for any other request by (1 - q r m) / (1 - q m), which is 1 + s (m - X) with X = 1[seen to disagree] / q and
s = q (1 - r) / (1 - q m). Several r share the capital. Every m at which it comes to 1 / delta is ruled out.

What the bound is about where risks change: let p_t be the mean of request t's disagreement, given the past. The
factor's mean is 1 + s_t (m - p_t) <= exp(s_t (m - p_t)), so the capital over exp(sum of s_t (m - p_t)) is a
supermartingale from 1. Hence, with confidence 1 - delta and at all times at once, the mean of the p_t so far, weighted
by s_t, is below the bound: the running mean of the conditional risks, where closely watched requests weigh more (s_t
is about proportional to q_t).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from scipy.optimize import root_scalar

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
    if log_capital(counts, _LARGEST) < needed:
        return 1.0
    # No factor falls with m, so what is ruled out at m is ruled out above it.
    found = root_scalar(lambda m: log_capital(counts, m) - needed, bracket=(1e-15, _LARGEST), xtol=_ACCURACY)
    return min(1.0, float(found.root) + 2 * _ACCURACY)  # to the safe side


def log_capital(counts: Mapping[float, Count], m: float) -> float:
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
