"""How much accuracy a cascade may lose, bounded by betting against "it loses at least g".

A request counts 1 if the base is right and the cascade wrong, -1 if it is the other way round, 0 else; the gap is the
mean of these. Every g is ruled out at which a capital, betting at odds that are fair if the gap is g, comes to 1 /
delta. Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (arXiv:2010.09686): here a
mixture of constant bets (their grid Kelly) of sizes that are fixed before the data is seen. It is valid for any n and
depends on no order, so it can be recomputed from three counts.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float, Int

from gati_jax.errors import InputError
from gati_jax.planning.tables import ReplayTable

from .betting import log_capital, smallest_ruled_out

METHOD = "betting, mixture of constant bets"
_LARGEST_BET = 0.99  # of the capital: one lost request may not ruin it
_TOLERANCE = 1e-9  # logarithms differ between machines


@dataclasses.dataclass(frozen=True, kw_only=True)
class AccuracyGap:
    """With confidence 1 - delta, the cascade is at most ``upper`` less accurate than the base.

    This delta is the gap's own: with the certificate's it adds up to the risk that either of them is wrong.
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
    """Bounds that hold together: steps among which the data chose, times plans, times looks at the data."""
    method: str = METHOD

    def __post_init__(self) -> None:
        """Check the counts, and that the bound follows from them.

        Raises:
            InputError: Says what was expected.
        """
        counts = min(self.n, self.losses, self.gains) >= 0 and self.losses + self.gains <= self.n < 2**53
        if not (counts and 0 < self.delta < 1 and 1 <= self.comparisons < 2**53):
            raise InputError(
                f"accuracy gap: expected counts, got {self.losses} and {self.gains} of {self.n}, delta {self.delta}"
            )
        least = gap_bound(self.losses, self.gains, self.n, self.delta / self.comparisons)
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
    upper = gap_bound(losses, gains, len(base), delta / comparisons)
    return AccuracyGap(n=len(base), losses=losses, gains=gains, upper=upper, delta=delta, comparisons=comparisons)


def certified_gap(
    table: ReplayTable, classes: Int[np.ndarray, " n"], delta: float, *, level: float, steps: int
) -> AccuracyGap | None:
    """Bound the loss of accuracy at a certified step: the same data chose it, so all steps' bounds must hold.

    Args:
        table: Of the certify split; without labels there is no bound.
        classes: The cascade's answers.
        delta: The bound's.
        level: That each p-value of the steps was compared with.
        steps: Of the path.
    """
    if table.labels is None:
        return None
    comparisons = math.ceil(steps * delta / level)
    return accuracy_gap_bound(table.answers == table.labels, classes == table.labels, delta, comparisons=comparisons)


def gap_bound(losses: int, gains: int, n: int, delta: float) -> float:
    """Return the smallest gap at which the capital comes to 1 / delta; 1 where it never does."""
    bets = bet_sizes(n, delta)
    return smallest_ruled_out(
        lambda gap: float(log_capital(_log_bets(gap, bets, losses, gains, n))), delta, lowest=-1.0
    )


def _log_bets(
    gap: float, bets: Float[np.ndarray, " bets"], losses: int, gains: int, n: int
) -> Float[np.ndarray, " bets"]:
    """Return the logarithm of each bet's capital against a gap of ``gap`` or more."""
    stakes = bets / (1 - gap)  # a lost request leaves 1 - bet of the capital
    ties = (n - losses - gains) * np.log1p(stakes * gap)
    return losses * np.log1p(-bets) + gains * np.log1p(stakes * (1 + gap)) + ties


def bet_sizes(n: int, delta: float) -> Float[np.ndarray, " bets"]:
    """Return shares of the capital to stake: the best ones for variances of 1, 1/4, 1/16 ... of single requests."""
    log = -math.log(delta)
    smallest = max(log / max(n, 1), 2.0**-60)  # below it the largest bet is the best
    variances = 4.0 ** -np.arange(1 + math.ceil(max(0.0, -math.log(smallest, 4))))
    return np.unique(np.minimum(np.sqrt(2 * log / (max(n, 1) * variances)), _LARGEST_BET))
