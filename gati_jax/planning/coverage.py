"""Does a certificate hold as often as it says? Measured on resplits of one large table of real requests."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Int
from scipy.stats import beta

from gati_jax._errors import InputError

from .certificate import CONDITIONAL, Certificate
from .path import plan as compose
from .planned import Plan
from .tables import CostTable, ReplayTable, replay_plan
from .testing import certify, exit_rates

Compose = Callable[[ReplayTable], Plan]
Certify = Callable[[Plan, ReplayTable], Certificate]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """How often certificates were wrong."""

    draws: int
    certified: int
    """Draws in which any step was certified."""
    failures: int
    """Draws in which the certified step's pooled rate is above epsilon."""
    low: float
    high: float
    """Clopper-Pearson 95 % interval of the failure rate over splits of this very table."""
    mean_rate: float
    """Of the certified steps' pooled rates; zero where nothing was certified."""
    worst_rate: float

    @property
    def rate(self) -> float:
        """The share of draws that failed."""
        return self.failures / self.draws


def resplit_coverage(
    table: ReplayTable,
    costs: CostTable,
    epsilon: float,
    delta: float,
    draws: int,
    seed: int,
    *,
    shares: tuple[float, float] = (0.25, 0.25),
    compose_with: Compose | None = None,
    certify_with: Certify | None = None,
) -> Coverage:
    """Split a table at random again and again: compose on one part, certify on another, judge by all that is left.

    The pooled rate is that of the certified step on every row but those that the plan was composed on: the finite
    population that the certify rows are drawn from, without replacement, and of which they are a part. A certificate
    fails where this rate is above epsilon; where it is conditional, where any of its exits' is. Drawing without
    replacement spreads counts less than the binomial distribution that the test reckons with (the variance is smaller
    by the share of the pool that is drawn), so failures are rarer than delta even on the boundary: this measure can
    refute a certificate, but says less of how tight it is than simulated tables do. Nor are the draws fresh requests:
    the interval is about splits of this table.

    Args:
        table: Replay of requests that no candidate was fitted on.
        costs: Measured times.
        epsilon: To certify in every draw.
        delta: The risk of error of each certificate.
        draws: Splits.
        seed: Of the splits.
        shares: Of the rows, for composing and for certifying; something must be left.
        compose_with: Returns a plan; unless told, ``plan`` with these costs, epsilon and delta, and no time to search:
            where a search ends depends on the machine, and a draw could not be repeated.
        certify_with: Returns its certificate; unless told, ``certify`` with these epsilon and delta, and equal rows as
            what they are here: two of the population.

    Raises:
        InputError: No draws, a part of the table would be empty, or see ``plan`` and ``certify``.
    """
    n = len(table)
    parts = [int(share * n) if 0 < share < 1 else 0 for share in shares]
    if draws < 1 or min(parts) < 1 or sum(parts) >= n:
        msg = f"draws, shares: expected one draw or more, and rows in every part of {n}, got {draws} and {shares}"
        raise InputError(msg)
    compose_with = compose_with or (lambda rows: compose(rows, costs, epsilon=epsilon, delta=delta, seconds=0.0))
    certify_with = certify_with or (lambda plan, rows: certify(plan, rows, epsilon, delta, repeats=True))
    rng = np.random.default_rng(seed)
    certified, failures, rates = 0, 0, []
    for _ in range(draws):
        order = rng.permutation(n)
        plan = compose_with(rows_of(table, order[: parts[0]]))
        certificate = certify_with(plan, rows_of(table, order[parts[0] : sum(parts)]))
        certified += certificate.certified
        rates.append(pooled_rate(plan, certificate, rows_of(table, order[parts[0] :])))
        failures += rates[-1] > epsilon
    low, high = clopper_pearson(failures, draws)
    return Coverage(
        draws=draws,
        certified=certified,
        failures=failures,
        low=low,
        high=high,
        mean_rate=float(np.mean(rates)),
        worst_rate=max(rates),
    )


def pooled_rate(plan: Plan, certificate: Certificate, table: ReplayTable) -> float:
    """Return the rate that a certificate bounds, on a table: of all requests, or the worst exit's if conditional."""
    if not certificate.certified:
        return 0.0  # the base answers
    outcome = replay_plan(table.take(plan.names), plan.thresholds(certificate.step))
    if certificate.method != CONDITIONAL:
        return outcome.disagreement
    exits = exit_rates(plan, certificate.step, outcome, certificate.epsilon)
    return max((e.disagreements / e.n for e in exits if e.n), default=0.0)


def rows_of(table: ReplayTable, index: Int[np.ndarray, " rows"]) -> ReplayTable:
    """Return the table of these rows."""
    return dataclasses.replace(
        table,
        answers=table.answers[index],
        classes=table.classes[:, index],
        scores=table.scores[:, index],
        rows=table.rows[index],
        labels=None if table.labels is None else table.labels[index],
    )


def clopper_pearson(count: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a binomial rate.

    Example:
        >>> [round(bound, 4) for bound in clopper_pearson(0, 100)]
        [0.0, 0.0362]
    """
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, n - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - tail, count + 1, n - count)) if count < n else 1.0
    return low, high
