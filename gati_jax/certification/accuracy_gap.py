"""How much accuracy a cascade may lose, bounded by betting against "it loses at least g".

A request counts 1 if the base is right and the cascade wrong, -1 if it is the other way round, 0 else; the gap is the
mean of these. Whoever bets shares of a capital of 1 on "the gap is below g", at odds that are fair if it is g, comes to
1 / delta with probability at most delta if it is g or more (Markov); every g at which the bet comes that far is ruled
out. Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (arXiv:2010.09686): here a
mixture of constant bets (their grid Kelly) of sizes that are fixed before the data is seen. The mean of such capitals
is a fair bet again, valid for any n, and depends on no order: it can be computed anew from three counts.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool
from scipy.optimize import root_scalar

from gati_jax.errors import InputError

METHOD = "betting, mixture of constant bets"
_LARGEST_GAP = 1 - 1e-12  # at 1 stakes would be infinite
_ACCURACY = 1e-13
_LARGEST_BET = 0.99  # of the capital: one lost request may not ruin it
_TOLERANCE = 1e-9  # another machine's logarithms


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccuracyGap:
    """With confidence 1 - delta, the cascade is at most ``upper`` less accurate than the base.

    This delta is the gap's own: that it or the certificate beside it is wrong has the sum of both as its probability.
    """

    n: int
    losses: int
    """Requests of the n that only the base has right."""
    gains: int
    """Requests that only the cascade has right."""
    upper: float
    delta: float
    """As asked for; tested at ``delta / comparisons``."""
    comparisons: int = 1
    """Bounds that hold together: steps among which the data chose, times plans, times looks."""
    method: str = METHOD

    def __post_init__(self) -> None:
        """Refuse what its own counts refute.

        Raises:
            InputError: Says what was expected.
        """
        counts = min(self.n, self.losses, self.gains) >= 0 and self.losses + self.gains <= self.n < 2**53
        if not (counts and 0 < self.delta < 1 and 1 <= self.comparisons < 2**53):
            raise InputError(
                f"accuracy gap: expected counts, got {self.losses} and {self.gains} of {self.n}, delta {self.delta}"
            )
        least = upper_bound(self.losses, self.gains, self.n, self.delta / self.comparisons)
        if not least - _TOLERANCE <= self.upper <= 1:
            raise InputError(
                f"accuracy gap: {self.losses} and {self.gains} of {self.n} bound it by {least}, not by {self.upper}"
            )

    @property
    def mean(self) -> float:
        """The gap on the n requests: the base's accuracy minus the cascade's."""
        return (self.losses - self.gains) / max(self.n, 1)


def accuracy_gap_bound(
    base_right: Bool[np.ndarray, " n"], cascade_right: Bool[np.ndarray, " n"], delta: float, *, comparisons: int = 1
) -> AccuracyGap:
    """Bound the base's accuracy minus the cascade's from above.

    Args:
        base_right: Whether the base's answer is the label.
        cascade_right: Whether the cascade's is.
        delta: The risk that the bound is wrong.
        comparisons: Bounds that are to hold together, each at ``delta / comparisons``.

    Raises:
        InputError: Columns of different lengths or of other values than true and false; delta outside (0, 1).

    Example:
        >>> right = np.ones(1000, bool)
        >>> round(accuracy_gap_bound(right, right, 0.05).upper, 4)
        0.0044
    """
    base, cascade = np.asarray(base_right), np.asarray(cascade_right)
    if base.shape != cascade.shape or base.ndim != 1 or {base.dtype, cascade.dtype} != {np.dtype(bool)}:
        got = f"{base.dtype}{list(base.shape)} and {cascade.dtype}{list(cascade.shape)}"
        raise InputError(f"base_right, cascade_right: expected two columns of booleans of one length, got {got}")
    if not 0 < delta < 1 or comparisons < 1:
        raise InputError(
            f"delta, comparisons: expected a number between 0 and 1, and 1 or more, got {delta} and {comparisons}"
        )
    losses, gains = int((base & ~cascade).sum()), int((cascade & ~base).sum())
    upper = upper_bound(losses, gains, len(base), delta / comparisons)
    return AccuracyGap(n=len(base), losses=losses, gains=gains, upper=upper, delta=delta, comparisons=comparisons)


def upper_bound(losses: int, gains: int, n: int, delta: float) -> float:
    """Return the smallest gap at which the capital comes to 1 / delta; 1 where it never does."""
    # What a bet wins does not fall with g, whatever came: what is ruled out at g is ruled out above it.
    bets, needed = _bets(n, delta), -math.log(delta)
    if _log_capital(_LARGEST_GAP, bets, losses, gains, n) < needed:
        return 1.0
    found = root_scalar(
        lambda gap: _log_capital(gap, bets, losses, gains, n) - needed, bracket=(-1.0, _LARGEST_GAP), xtol=_ACCURACY
    )
    return min(1.0, float(found.root) + 2 * _ACCURACY)  # to the safe side


def _bets(n: int, delta: float) -> list[float]:
    """Return shares of the capital to stake: the best ones for variances of 1, 1/4, 1/16 ... of single requests."""
    log = -math.log(delta)
    smallest = max(log / max(n, 1), 2.0**-60)  # below it the largest bet is the best
    variances = [4.0**-i for i in range(1 + math.ceil(max(0.0, -math.log(smallest, 4))))]
    return sorted({min(math.sqrt(2 * log / (max(n, 1) * v)), _LARGEST_BET) for v in variances})


def _log_capital(gap: float, bets: list[float], losses: int, gains: int, n: int) -> float:
    """Return the logarithm of the mean capital of all bets after n requests."""
    logs = []
    for bet in bets:
        stake = bet / (1 - gap)  # all but 1 - bet of the capital stays where a request is lost
        ties = (n - losses - gains) * math.log1p(stake * gap)
        logs.append(losses * math.log1p(-bet) + gains * math.log1p(stake * (1 + gap)) + ties)
    most = max(logs)
    return most + math.log(sum(math.exp(log - most) for log in logs) / len(logs))
