"""The running bound against a product over requests, and against simulated streams whose risk changes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from gati_jax.certification.betting import (
    LARGEST_MEAN,
    SHARES,
    Count,
    log_bets,
    log_capital,
    mean_disagreement,
    upper_bound,
)

COUNTS = st.dictionaries(
    st.sampled_from([0.02, 0.5, 1.0]),
    st.integers(1, 3000).flatmap(lambda n: st.builds(Count, st.just(n), st.integers(0, min(n, 30)))),
)


@given(COUNTS, st.sampled_from([0.001, 0.02, 0.4]))
def test_capital_is_the_product_of_the_bets(counts, m):
    capitals = []
    for r in SHARES:
        log = 0.0
        for q, count in counts.items():
            stake = q * (1 - r) / (1 - q * m)
            lost, kept = 1 + stake * (m - 1 / q), 1 + stake * m
            assert lost == pytest.approx(r, abs=1e-9)
            log += (count.requests - count.seen) * math.log(kept)
            log += count.seen * math.log(r) if r else (-math.inf if count.seen else 0.0)
        capitals.append(log)
    expected = np.logaddexp.reduce(capitals) - math.log(len(SHARES))
    assert log_capital(log_bets(counts, m)) == pytest.approx(expected, abs=1e-6)


@given(COUNTS, st.sampled_from([0.01, 0.1]))
def test_bound_is_the_edge_of_what_is_ruled_out(counts, delta):
    upper = upper_bound(counts, delta)
    assert log_capital(log_bets(counts, min(upper, LARGEST_MEAN))) >= -math.log(delta) or upper == 1
    assert log_capital(log_bets(counts, upper - 1e-6)) < -math.log(delta)
    # A single look does at least as well: Clopper and Pearson's where q is 1.
    if set(counts) == {1.0}:
        n, k = counts[1.0]
        assert upper >= beta.ppf(1 - delta, k + 1, n - k) - 1e-9 if k < n else upper == 1


def test_nothing_is_known_before_the_first_request():
    assert mean_disagreement({}) == 0
    assert upper_bound({}, 0.05) == 1


def test_disagreements_seen_with_q_count_for_all_that_were_not():
    assert mean_disagreement({0.5: Count(100, 1), 1.0: Count(100, 3)}) == (2 + 3) / 200


def test_bound_holds_at_all_times_while_the_risk_rises():
    """The running mean weighted by q / (1 - q m) is above the bound, ever, in at most delta of the streams."""
    delta, wrong, streams = 0.2, 0, 100
    risks = np.where(np.arange(3000) < 1500, 0.002, 0.03)
    for seed in range(streams):
        rng, counts, weights, total = np.random.default_rng(seed), {}, 0.0, 0.0
        disagrees, coins, q = rng.random(3000) < risks, rng.random(3000), 0.2
        for t in range(3000):
            seen = bool(disagrees[t] and coins[t] < q)
            old = counts.get(q, Count(0, 0))
            counts[q] = Count(old.requests + 1, old.seen + seen)
            weights, total = weights + q, total + q * risks[t]
            q = 1.0 if seen else 0.2 if t % 100 == 0 else q
            if t % 300 == 299:
                # Weights are q up to the factor 1 / (1 - q m), below 1.1 here: allow for it.
                missed = upper_bound(counts, delta) < 0.9 * total / weights
                wrong += missed
                if missed:
                    break
    assert wrong <= 35
