"""Exact binomial tests of "the disagreement exceeds epsilon", and the bound that goes with them."""

import math

from scipy.stats import beta, binom

MOST_SAMPLES = 2**40  # no split is larger


def p_value(disagreements: int, n: int, epsilon: float) -> float:
    """Return the probability of so few disagreements among n requests if each disagreed with probability epsilon.

    Example:
        >>> round(p_value(0, 149, 0.02), 4)
        0.0493
    """
    return float(binom.cdf(disagreements, n, epsilon))


def largest_passing(n: int, epsilon: float, delta: float) -> int:
    """Return the most disagreements among n requests that still certify epsilon; -1 if even 0 would not.

    Example:
        >>> largest_passing(2500, 0.02, 0.05), largest_passing(100, 0.02, 0.05)
        (38, -1)
    """
    k = int(binom.ppf(delta, n, epsilon))  # the smallest k with cdf(k) >= delta
    return k if p_value(k, n, epsilon) <= delta else k - 1


def upper_bound(k: int, n: int, delta: float) -> float:
    """Return Clopper and Pearson's upper bound on a rate, with confidence 1 - delta, after k of n.

    Example:
        >>> round(upper_bound(0, 149, 0.05), 4), upper_bound(3, 3, 0.05)
        (0.0199, 1.0)
    """
    return float(beta.ppf(1 - delta, k + 1, n - k)) if k < n else 1.0


def samples_needed(rate: float, epsilon: float, delta: float) -> int | None:
    """Return how many requests would certify epsilon if they disagreed at ``rate``; None if no number below 2^40 would.

    Where ``rate`` is not 0, somewhat fewer may do, too: disagreements come in whole numbers.

    Example:
        >>> samples_needed(0.0, 0.02, 0.05), samples_needed(0.03, 0.02, 0.05)
        (149, None)
    """
    if rate >= epsilon:
        return None
    high = 1
    while not _passes(high, rate, epsilon, delta):
        high *= 2
        if high > MOST_SAMPLES:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _passes(middle, rate, epsilon, delta) else (middle, high)
    return high


def rows_needed(rate: float, epsilon: float, delta: float, unit: str = "rows") -> str:
    """Say how many fresh rows would certify epsilon: at the least, and at an observed rate of disagreement.

    Example:
        >>> rows_needed(0.01, 0.02, 0.05)
        'it takes 149 rows of which none disagrees, about 719 at the observed 1.00%'
    """
    least, likely = (samples_needed(share, epsilon, delta) for share in (0.0, rate))
    text = f"it takes {least or f'over {MOST_SAMPLES}'} {unit} of which none disagrees"
    if rate <= 0:
        return text
    return f"{text}, {f'about {likely}' if likely else f'and no number of {unit} does'} at the observed {rate:.2%}"


def _passes(n: int, rate: float, epsilon: float, delta: float) -> bool:
    return p_value(math.ceil(rate * n), n, epsilon) <= delta
