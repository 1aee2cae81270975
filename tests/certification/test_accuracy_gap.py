"""The accuracy gap's bound against rational arithmetic and full enumeration."""

import dataclasses
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multinomial

import gati_jax
from gati_jax import Ledger
from gati_jax.certification import AccuracyGap, accuracy_gap_bound
from gati_jax.certification.accuracy_gap import bet_sizes, gap_bound
from tests.planning.reference import make_plan, make_table

DELTAS = st.sampled_from([0.01, 0.05, 0.3])


def columns(losses, gains, n, order=None):
    """Right answers of base and cascade; ties are half right, half wrong."""
    kind = np.array([1] * losses + [-1] * gains + [0] * (n - losses - gains))
    tie = np.arange(n) % 2 == 0
    base, cascade = np.where(kind == 0, tie, kind == 1), np.where(kind == 0, tie, kind == -1)
    order = np.arange(n) if order is None else order
    return base[order], cascade[order]


@st.composite
def counts(draw, most=60):
    n = draw(st.integers(0, most))
    losses = draw(st.integers(0, n))
    return losses, draw(st.integers(0, n - losses)), n


def capital(gap, values, bets):
    """Bet after bet, in rational numbers."""
    total = Fraction(0)
    for bet in bets:
        one, stake = Fraction(1), Fraction(bet) / (1 - Fraction(gap))
        for value in values:
            one *= 1 + stake * (Fraction(gap) - value)
        total += one
    return total / len(bets)


@settings(deadline=None, max_examples=40)
@given(counts(most=25), DELTAS)
def test_the_bound_is_where_the_capital_comes_to_one_over_delta(drawn, delta):
    losses, gains, n = drawn
    values = [1] * losses + [-1] * gains + [0] * (n - losses - gains)
    upper, bets = gap_bound(losses, gains, n, delta), bet_sizes(n, delta).tolist()
    if upper < 1 - 1e-6:
        assert capital(upper + 1e-7, values, bets) >= 1 / Fraction(delta)
    assert capital(max(-1.0, upper - 1e-7), values, bets) < 1 / Fraction(delta)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 10), DELTAS)
def test_the_bound_is_wrong_with_probability_at_most_delta(losses, gains, n, delta):
    """Whatever n: the probabilities of all tables of n requests in which it is wrong, summed."""
    p = np.array([losses, gains, 40 - losses - gains]) / 40
    wrong = sum(
        multinomial.pmf([a, b, n - a - b], n, p)
        for a, b in itertools.product(range(n + 1), repeat=2)
        if a + b <= n and gap_bound(a, b, n, delta) < p[0] - p[1] - 1e-12
    )
    assert wrong <= delta


@settings(deadline=None, max_examples=30)
@given(counts(), DELTAS)
def test_the_bound_is_above_the_mean_and_moves_with_the_counts(drawn, delta):
    losses, gains, n = drawn
    upper = gap_bound(losses, gains, n, delta)
    assert (losses - gains) / max(n, 1) <= upper <= 1
    assert gap_bound(losses, gains, n, delta / 2) >= upper  # surer is wider
    if losses + gains < n:
        assert gap_bound(losses + 1, gains, n, delta) >= upper >= gap_bound(losses, gains + 1, n, delta)


@settings(deadline=None, max_examples=30)
@given(counts(), DELTAS, st.randoms(use_true_random=False))
def test_the_order_of_the_requests_does_not_matter(drawn, delta, random):
    losses, gains, n = drawn
    order = list(range(n))
    random.shuffle(order)
    gap = accuracy_gap_bound(*columns(losses, gains, n), delta)
    assert gap == accuracy_gap_bound(*columns(losses, gains, n, order), delta)
    assert (gap.n, gap.losses, gap.gains) == drawn[2:] + drawn[:2]
    base, cascade = columns(losses, gains, n)
    assert gap.mean == pytest.approx(base.mean() - cascade.mean() if n else 0.0)


def test_more_requests_bound_it_more_tightly():
    bounds = [gap_bound(n // 100, n // 100, n, 0.05) for n in (100, 1000, 10_000, 100_000)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] < 0.002


@pytest.mark.parametrize("n", [10**4, 10**9])
def test_large_counts_are_no_trouble(n):
    assert gap_bound(0, 0, n, 1e-9) < 100 / n
    assert gap_bound(n, 0, n, 1e-9) == 1.0
    assert gap_bound(0, n, n, 1e-9) < 0
    assert math.isfinite(gap_bound(2**52, 2**51, 2**53 - 1, 1e-300))


def test_all_or_no_requests():
    none = np.zeros(0, bool)
    assert accuracy_gap_bound(none, none, 0.05).upper == 1
    assert accuracy_gap_bound(none, none, 0.05).mean == 0
    assert accuracy_gap_bound(np.ones(50, bool), np.zeros(50, bool), 0.05).upper == 1
    assert accuracy_gap_bound(np.zeros(50, bool), np.ones(50, bool), 0.05).upper < -0.5


@pytest.mark.parametrize(
    ("base", "cascade"),
    [
        (np.ones(3, bool), np.ones(4, bool)),
        (np.ones((3, 1), bool), np.ones((3, 1), bool)),
        (np.ones(3), np.ones(3, bool)),
        (np.array([0.5, np.nan, 1.0]), np.ones(3, bool)),
        (np.ones(3, bool), np.array([1, 0, 2])),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_columns_that_are_not_two_of_booleans_are_refused(base, cascade):
    with pytest.raises((gati_jax.InputError, TypeError)):
        accuracy_gap_bound(base, cascade, 0.05)


@pytest.mark.parametrize(("delta", "comparisons"), [(0.0, 1), (1.0, 1), (float("nan"), 1), (0.05, 0)])
def test_a_risk_out_of_range_is_refused(delta, comparisons):
    with pytest.raises(gati_jax.InputError, match="delta, comparisons: expected"):
        accuracy_gap_bound(np.ones(3, bool), np.ones(3, bool), delta, comparisons=comparisons)


@pytest.mark.parametrize(
    "change",
    [
        {"upper": 0.0},
        {"upper": 1.5},
        {"upper": float("nan")},
        {"losses": 30},
        {"gains": 0},
        {"delta": 0.001},
        {"comparisons": 100},
        {"n": 100},
        {"n": 4},
        {"losses": -1},
        {"comparisons": 0},
    ],
)
def test_a_bound_that_its_own_counts_refute_is_refused(change):
    gap = accuracy_gap_bound(*columns(6, 4, 1000), 0.05)
    assert dataclasses.replace(gap, upper=gap.upper + 0.1).upper > gap.upper  # a looser bound is sound
    with pytest.raises(gati_jax.InputError, match="accuracy gap: "):
        dataclasses.replace(gap, **change)


def test_certify_bounds_the_loss_for_whichever_step_the_data_chooses():
    n = 400
    table = make_table([np.arange(n) < 3], -np.arange(n)[None] % 4 + 1.0)
    labels = np.zeros(n, int)
    labels[:2] = 1  # the cache, which says 1, is right where the base is not
    plan = make_plan([[np.inf], [1.0], [0.0], [-1.0], [-2.0]])
    assert gati_jax.certify(plan, table, 0.1, ledger=None).accuracy_gap is None
    certificate = gati_jax.certify(plan, dataclasses.replace(table, labels=labels), 0.1, ledger=None)
    gap = certificate.accuracy_gap
    assert isinstance(gap, AccuracyGap)
    assert (certificate.step, gap.n, gap.losses, gap.gains, gap.comparisons) == (4, n, 1, 2, 4)
    assert gap.upper == gap_bound(1, 2, n, 0.05 / 4)
    ledger = Ledger()
    assert not gati_jax.certify(plan, table, 0.0001, ledger=ledger).certified
    with pytest.warns(UserWarning, match="look 2"):
        later = gati_jax.certify(plan, dataclasses.replace(table, labels=labels), 0.1, ledger=ledger)
    comparisons = 27  # four steps, of which each has 6 / (pi^2 2^2) of delta, so that 26.3 would do
    assert later.accuracy_gap == AccuracyGap(
        n=n, losses=1, gains=2, upper=gap_bound(1, 2, n, 0.05 / comparisons), delta=0.05, comparisons=comparisons
    )
    for change in ({"comparisons": 3}, {"n": n + 1}, {"losses": 2, "gains": 2, "upper": 1.0}):
        other = dataclasses.replace(gap, **{"upper": 1.0} | change)
        with pytest.raises(gati_jax.InputError, match="accuracy_gap: expected"):
            dataclasses.replace(certificate, accuracy_gap=other)
    nothing = gati_jax.certify(plan, dataclasses.replace(table, labels=labels), 0.001, ledger=None)
    assert (nothing.certified, nothing.accuracy_gap) == (False, None)
