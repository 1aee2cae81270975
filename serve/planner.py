"""A thin query planner: a chain of two models with one latency budget.

GATI splits a query's latency budget over its models, and grants later models what a hit saves in earlier ones. Here
the first model (say, a detector) and the second (a classifier of what it found) have each their routes (see
``Route``): from the base, slow and exact, to loose plans, fast and certified for less agreement. ``before`` chooses a
route for both, such that together they keep to the budget in expectation; once the first is through, ``after``
chooses the second's again, for all the time that is really left: a looser one, a tighter one, or no early exit at all.

Pure functions of made-up or measured times; whoever calls the two models calls these in between.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """A route of a model, as the planner sees it."""

    name: str
    expected_ms: float
    """Of one request, see ``routes.expected_ms``."""
    epsilon: float
    """What is certified of its disagreement; 0 for the base."""


class Pair(NamedTuple):
    """The routes that a query is begun with."""

    first: Option
    second: Option

    @property
    def expected_ms(self) -> float:
        """Both models, one after the other."""
        return self.first.expected_ms + self.second.expected_ms

    @property
    def epsilon(self) -> float:
        """A bound of the share of queries in which either model disagrees with its base."""
        return self.first.epsilon + self.second.epsilon


def before(first: Sequence[Option], second: Sequence[Option], budget_ms: float) -> Pair:
    """Choose both routes: of the pairs expected to keep to the budget the one with the least disagreement.

    Where none keeps to it, the fastest pair. Of pairs that disagree equally little, the faster one.

    Raises:
        ValueError: A model without routes.
    """
    if not first or not second:
        msg = f"routes: expected at least one for each model, got {len(first)} and {len(second)}"
        raise ValueError(msg)
    pairs = [Pair(one, other) for one in first for other in second]
    in_time = [pair for pair in pairs if pair.expected_ms <= budget_ms]
    if not in_time:
        return min(pairs, key=lambda pair: (pair.expected_ms, pair.epsilon))
    return min(in_time, key=lambda pair: (pair.epsilon, pair.expected_ms))


def after(second: Sequence[Option], left_ms: float) -> Option:
    """Choose the second model's route for the time that the first has left: the tightest that is expected to fit.

    A hit in the first leaves more than was planned for, and the second may do without early exits; a miss leaves less,
    and it leaves earlier. Where none fits, the fastest.

    Raises:
        ValueError: There are no routes.
    """
    if not second:
        msg = "routes: expected at least one for the second model, got none"
        raise ValueError(msg)
    in_time = [option for option in second if option.expected_ms <= left_ms]
    if not in_time:
        return min(second, key=lambda option: (option.expected_ms, option.epsilon))
    return min(in_time, key=lambda option: (option.epsilon, option.expected_ms))
