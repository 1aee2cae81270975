"""The capital against rational arithmetic, likelihood ratios, and its mean over everything that can happen."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

import gati_jax
from gati_jax.certification.betting import COLLAPSED, RATIOS, EProcess, stakes

EPSILONS = st.sampled_from([0.002, 0.01, 0.1, 0.4])
PROBABILITIES = st.sampled_from([0.02, 0.3, 1.0])


def by_hand(epsilon, requests):
    """Reserve and play kept apart, stake after stake, in rational numbers."""
    exact, parts = Fraction(epsilon), []
    for bet in range(len(RATIOS)):
        reserve, play, n = Fraction(1, 2), Fraction(1, 2), 1
        for loss, probability in requests:
            stake = Fraction(stakes(epsilon, probability)[bet])
            play *= 1 + stake * (Fraction(loss) - exact)
            following = Fraction(1, (n + 1) * (n + 2))
            if play < Fraction(COLLAPSED) * following:
                play, reserve, n = play + following, reserve - following, n + 1
        parts.append(play + reserve)
    return sum(parts) / len(parts)


@settings(max_examples=50)
@given(EPSILONS, st.lists(st.tuples(st.booleans(), PROBABILITIES), max_size=25))
def test_wealth_is_what_reserve_and_play_come_to(epsilon, requests):
    process = EProcess(epsilon)
    requests = [(seen / probability, probability) for seen, probability in requests]
    for loss, probability in requests:
        process.bet(loss, probability)
    assert process.total == pytest.approx(float(by_hand(epsilon, requests)), rel=1e-9)


@pytest.mark.parametrize("epsilon", [0.05, 0.3])
def test_a_tolerable_cascade_is_a_fair_game_under_any_attention(epsilon):
    """The mean over every course of events is 1, though q depends on what was seen and restarts happen."""
    total, restarted = 0.0, 0
    for course in itertools.product([False, True], repeat=9):
        process, chance, q = EProcess(epsilon), 1.0, 0.8
        for seen in course:
            chance *= q * epsilon if seen else 1 - q * epsilon
            process.bet(seen / q, q)
            q = 0.5 if seen else min(1.0, 1.2 * q)
        total += chance * process.total
        restarted += max(process.restarts) > 1
    assert total == pytest.approx(1, abs=1e-12)
    assert restarted


def test_a_better_cascade_loses():
    epsilon, q, low = 0.2, 0.5, 0.1
    total = 0.0
    for course in itertools.product([False, True], repeat=8):
        process, seen = EProcess(epsilon), sum(course)
        for loss in course:
            process.bet(loss / q, q)
        total += (q * low) ** seen * (1 - q * low) ** (8 - seen) * process.total
    assert total < 0.999


@given(EPSILONS, PROBABILITIES, PROBABILITIES)
def test_the_mean_factor_is_one_with_any_q_that_was_fixed_before(epsilon, bet_on, looked_with):
    """A stale q makes no bet unfair, and no factor negative."""
    for stake in stakes(epsilon, bet_on):
        assert 0 < stake < bet_on / epsilon
        kept, seen = 1 - stake * epsilon, 1 + stake * (1 / looked_with - epsilon)
        assert kept > 0
        risk = looked_with * epsilon
        assert risk * seen + (1 - risk) * kept == pytest.approx(1, abs=1e-12)


@given(EPSILONS, PROBABILITIES)
def test_stakes_make_likelihood_ratios(epsilon, q):
    for ratio, stake in zip(RATIOS, stakes(epsilon, q), strict=True):
        risk = min(ratio * epsilon, (1 + epsilon) / 2)
        assert 1 + stake * (1 / q - epsilon) == pytest.approx(risk / epsilon)
        assert 1 - stake * epsilon == pytest.approx((1 - q * risk) / (1 - q * epsilon))


def test_restarts_are_paid_out_of_one_reserve():
    process = EProcess(0.01)
    for _ in range(20_000):
        process.bet(0.0, 0.5)
    assert min(process.restarts) > 5
    placed = [sum(1 / (n * (n + 1)) for n in range(1, count + 1)) for count in process.restarts]
    np.testing.assert_allclose([p + 1 / (n + 1) for p, n in zip(placed, process.restarts, strict=True)], 1)
    for play, n in zip(process.playing, process.restarts, strict=True):
        assert play >= COLLAPSED / ((n + 1) * (n + 2))  # never lost


def test_false_alarms_at_exactly_epsilon_under_attention():
    """Ville: at most delta of the streams; 200 of them, and a binomial's upper limit at one in a million."""
    delta, alarms = 0.1, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        process, attention = EProcess(0.05), 0
        wrong, coins = rng.random(800) < 0.05, rng.random(800)
        for disagrees, coin in zip(wrong.tolist(), coins.tolist(), strict=True):
            q = 1.0 if attention else 0.05
            seen = disagrees and coin < q
            attention = 20 if seen else max(0, attention - 1)
            if process.bet(1 / q if seen else 0.0, q) >= 1 / delta:
                alarms += 1
                break
    assert alarms <= binom.isf(1e-6, 200, delta)


@pytest.mark.parametrize("arguments", [(0.0,), (1.0,), (float("nan"),), (0.1, ()), (0.1, (2.0, 1.0))])
def test_bad_arguments(arguments):
    with pytest.raises(gati_jax.InputError, match="expected"):
        EProcess(*arguments)


@pytest.mark.parametrize("probability", [0.0, 1.1, float("nan")])
def test_bad_probability(probability):
    with pytest.raises(gati_jax.InputError, match="probability: expected"):
        EProcess(0.1).bet(0.0, probability)
