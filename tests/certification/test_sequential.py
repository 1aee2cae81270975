"""Sequential certification against the binomial test, rational arithmetic, and streams that just miss epsilon."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

import gati_jax
from gati_jax.certification import SequentialCertifier, p_value
from gati_jax.certification.betting import SHARES


def feed(certifier, losses, q=1.0):
    for row in losses:
        certifier.add(row, q)
    return certifier


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.05, 1.0])), max_size=40), st.sampled_from([0.01, 0.2]))
def test_capital_in_rational_numbers(requests, epsilon):
    certifier = SequentialCertifier(1, epsilon, 1e-9)
    exact = Fraction(epsilon)
    capitals = [Fraction(1)] * len(SHARES)
    for loss, q in requests:
        certifier.add(np.array([loss]), q)
        for i, r in enumerate(map(Fraction, SHARES)):
            stake = Fraction(q) * (1 - r) / (1 - Fraction(q) * exact)
            capitals[i] *= 1 + stake * (exact - (1 / Fraction(q) if loss else 0))
    expected = float(sum(capitals) / len(capitals))
    assert math.exp(certifier.log_capital()[0]) == pytest.approx(expected, rel=1e-9)


def test_it_certifies_what_is_safe_and_stops_before_what_is_not():
    rng = np.random.default_rng(0)
    risks = np.array([0.0, 0.002, 0.004, 0.03, 0.0])  # the last one lies behind one that fails
    certifier = feed(SequentialCertifier(5, 0.01, 0.05, maximum=10_000), rng.random((10_000, 5)) < risks)
    assert certifier.certified == 2
    assert certifier.decided
    assert certifier.log_capital()[4] > -math.log(0.05)


def test_steps_may_be_ready_at_different_times():
    """The second is ready long before the first, and has lost its capital again by then."""
    losses = np.zeros((1500, 2), bool)
    losses[:100, 0] = np.arange(100) % 8 == 0
    losses[150:250, 1] = True
    certifier = feed(SequentialCertifier(2, 0.05, 0.05), losses[:250])
    assert certifier.certified == -1
    assert certifier.log_capital()[1] < 0
    assert feed(certifier, losses[250:]).certified == 1
    assert feed(SequentialCertifier(2, 0.05, 0.05), losses[100:]).certified == 0  # it never had any


def test_it_gives_up():
    certifier = feed(SequentialCertifier(1, 0.01, 0.05, maximum=50), np.zeros((80, 1), bool))
    assert (certifier.n, certifier.certified, certifier.decided) == (50, -1, True)


def test_once_decided_it_is_decided():
    certifier = feed(SequentialCertifier(1, 0.1, 0.1), np.zeros((200, 1), bool))
    assert certifier.certified == 0
    before = certifier.n
    feed(certifier, np.ones((100, 1), bool))
    assert (certifier.certified, certifier.n, certifier.losses[0]) == (0, before, 0)


@given(st.integers(0, 20), st.integers(100, 600))
@settings(max_examples=20, deadline=None)
def test_looking_at_any_time_costs_more_than_looking_once(losses, n):
    column = np.zeros((n, 1), bool)
    column[:losses] = True
    certifier = feed(SequentialCertifier(1, 0.05, 0.05), column)
    if certifier.certified == 0:
        assert p_value(int(certifier.losses[0]), certifier.n, 0.05) <= 0.05


@pytest.mark.parametrize("q", [1.0, 0.2])
def test_wrong_certificates_are_rare(q):
    """Risks just above epsilon on every step: at most delta of the streams certify any."""
    epsilon, delta, streams = 0.1, 0.1, 80
    wrong = 0
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        seen = (rng.random((300, 3)) < epsilon * 1.0001) & (rng.random((300, 1)) < q)
        wrong += feed(SequentialCertifier(3, epsilon, delta), seen, q).certified >= 0
    assert wrong <= binom.isf(1e-6, streams, delta)


@pytest.mark.parametrize("arguments", [(0, 0.1, 0.1), (1, 0.0, 0.1), (1, 0.1, 1.0), (1, float("nan"), 0.1)])
def test_bad_arguments(arguments):
    with pytest.raises(gati_jax.InputError, match="expected"):
        SequentialCertifier(*arguments)


def test_bad_requests():
    certifier = SequentialCertifier(2, 0.1, 0.1)
    for losses, q in [(np.zeros(3, bool), 1.0), (np.zeros(2), 1.0), (np.zeros(2, bool), 0.0)]:
        with pytest.raises((gati_jax.InputError, TypeError)):
            certifier.add(losses, q)
    assert certifier.n == 0
