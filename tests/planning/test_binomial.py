"""The exact tests against sums of the pmf in rational numbers."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax.certification import largest_passing, p_value, samples_needed
from tests.planning.reference import exact_cdf

# Dyadic numbers are exact in binary, so that "at most delta" has one answer.
EPSILONS = st.integers(1, 60).map(lambda k: k / 64)
DELTAS = st.integers(1, 31).map(lambda k: k / 32)
SMALL = settings(deadline=None, max_examples=40)


@SMALL
@given(st.data(), st.integers(1, 60), EPSILONS)
def test_p_value_is_the_sum_of_the_pmf(data, n, epsilon):
    k = data.draw(st.integers(0, n))
    assert p_value(k, n, epsilon) == pytest.approx(float(exact_cdf(k, n, epsilon)), rel=1e-9)


@SMALL
@given(st.integers(1, 60), EPSILONS, DELTAS)
def test_largest_passing_is_the_last_count_within_delta(n, epsilon, delta):
    passing = [k for k in range(n + 1) if exact_cdf(k, n, epsilon) <= Fraction(delta)]
    assert largest_passing(n, epsilon, delta) == max(passing, default=-1)


@pytest.mark.parametrize("n", range(1, 12))
def test_a_tail_exactly_at_delta_passes(n):
    assert largest_passing(n, 0.5, 0.5**n) == 0  # none of n at a half: exactly 2^-n
    assert largest_passing(n, 0.5, 0.5**n * 0.999) == -1


@SMALL
@given(st.integers(2, 20), st.integers(0, 18), st.sampled_from([1 / 64, 1 / 8, 1 / 2]))
def test_samples_needed_suffice(epsilon_64ths, rate_percent_of_epsilon, delta):
    epsilon = epsilon_64ths / 64
    rate = epsilon * rate_percent_of_epsilon / 32  # at most 9/16 of epsilon: small numbers suffice
    n = samples_needed(rate, epsilon, delta)
    assert n is not None
    disagreements = -((-Fraction(rate) * n) // 1)  # rounded up
    assert exact_cdf(int(disagreements), n, epsilon) <= Fraction(delta)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.125, 0.0625), (0.5, 0.25), (0.015625, 0.5)])
def test_samples_needed_without_disagreements_is_the_smallest_number(epsilon, delta):
    n = samples_needed(0.0, epsilon, delta)
    assert n is not None
    assert exact_cdf(0, n, epsilon) <= delta
    assert n == 1 or exact_cdf(0, n - 1, epsilon) > delta


@pytest.mark.parametrize("rate", [0.1, 0.11, 1.0])
def test_no_number_of_samples_certifies_a_rate_at_or_above_epsilon(rate):
    assert samples_needed(rate, 0.1, 0.05) is None
