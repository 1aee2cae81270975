"""The query planner on made-up exits and times, against brute force."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.planner import Option, after, before

BASE, TIGHT, LOOSE = Option("base", 8.0, 0.0), Option("1%", 5.0, 0.01), Option("5%", 3.0, 0.05)
MODEL = (BASE, TIGHT, LOOSE)

options = st.lists(
    st.builds(Option, st.just("any"), st.sampled_from([1.0, 2.0, 3.0, 5.0]), st.sampled_from([0.0, 0.01, 0.05])),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize(
    ("budget", "names"),
    [
        (16.0, ("base", "base")),
        (13.5, ("base", "1%")),  # either may leave early; equally tight, equally fast: the first pair
        (11.0, ("1%", "1%")),  # 0.02 in 10 ms; the base and 5% would just keep to it, too
        (8.0, ("1%", "5%")),
        (6.0, ("5%", "5%")),
        (1.0, ("5%", "5%")),  # nothing fits: as fast as can be
    ],
)
def test_budgets_by_hand(budget, names):
    pair = before(MODEL, MODEL, budget)
    assert (pair.first.name, pair.second.name) == names


@given(first=options, second=options, budget=st.floats(0.5, 12.0))
def test_no_pair_is_better(first, second, budget):
    chosen = before(first, second, budget)
    for one, other in itertools.product(first, second):
        ms, epsilon = one.expected_ms + other.expected_ms, one.epsilon + other.epsilon
        if chosen.expected_ms <= budget:
            assert ms > budget or (epsilon, ms) >= (chosen.epsilon, chosen.expected_ms)
        else:
            assert ms > budget
            assert ms >= chosen.expected_ms


@pytest.mark.parametrize(
    ("spent", "name"),
    [(1.0, "base"), (4.0, "base"), (4.5, "1%"), (7.0, "1%"), (8.0, "5%"), (11.9, "5%"), (20.0, "5%")],
)
def test_what_a_hit_saves_is_granted_to_the_second(spent, name):
    assert after(MODEL, 12.0 - spent).name == name


def test_a_trace_against_brute_force():
    """Times of the first vary with its exits; granting what is left disagrees least of all that keep to the budget.

    Brute force tries every assignment of the second's routes to the queries of a short trace. Queries do not share
    time, so the best assignment keeps each query to its own budget.
    """
    budget = 11.0
    early, middle, late = 1.5, 4.0, 8.0
    trace = [middle, early, late, early, early, late, middle]

    def judge(assignment):
        too_late = sum(spent + option.expected_ms > budget for spent, option in zip(trace, assignment, strict=True))
        return too_late, sum(option.epsilon for option in assignment)

    granted = tuple(after(MODEL, budget - spent) for spent in trace)
    best = min(itertools.product(MODEL, repeat=len(trace)), key=judge)
    assert judge(granted) == pytest.approx(judge(best))
    planned = before(MODEL, MODEL, budget)
    fixed = judge((planned.second,) * len(trace))
    assert judge(granted) < fixed  # who keeps to the first plan is late after a late exit, or wastes an early one
    assert {option.name for option in granted} == {"base", "1%", "5%"}


def test_models_without_routes_are_refused():
    with pytest.raises(ValueError, match="at least one for each model, got 0 and 3"):
        before((), MODEL, 1.0)
    with pytest.raises(ValueError, match="at least one for the second model"):
        after((), 1.0)
