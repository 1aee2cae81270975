"""Rules of other papers, against plain loops and SciPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import softmax
from scipy.stats import entropy

from gati_jax.planning import replay_plan
from tests.planning.reference import make_costs, make_table, random_tables
from train.reproduce import POLICIES, oracle_exits, policy_table, shared_threshold_plan

LOGITS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 6), st.just(3)), elements=st.integers(-4, 4)
)
SDN, BRANCHY, PABEE = POLICIES.values()


@given(LOGITS)
def test_scores_of_the_papers(logits):
    """Log-odds order requests as the largest probability does; patience counts sites in a row."""
    p = softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(SDN(logits), np.log(p.max(-1) / (1 - p.max(-1))), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(-BRANCHY(logits), entropy(p, axis=-1), atol=1e-9)
    classes = logits.argmax(-1)
    for request in range(classes.shape[1]):
        run = 0
        for site in range(len(classes)):
            run = run + 1 if site and classes[site, request] == classes[site - 1, request] else 0
            assert PABEE(logits)[site, request] == run


def test_certainty_beyond_float32_still_tells_requests_apart():
    assert np.diff(SDN(np.array([[[40.0, 0, 0], [50.0, 0, 0]]], np.float32))) == pytest.approx(10)


@pytest.fixture
def table():
    return random_tables(3, 3, 60)


def test_one_threshold_is_lowered_for_all_sites_until_too_many_disagree(table):
    table, costs = table
    plan = shared_threshold_plan(table, costs, epsilon=0.3)
    assert (plan.path == plan.path[:, :1]).all()
    assert (np.diff(plan.path[1:, 0]) < 0).all()
    rates = [replay_plan(table, thresholds).disagreement for thresholds in plan.path]
    assert plan.disagreement.tolist() == pytest.approx(rates)
    assert max(rates) <= 0.3
    lower = table.scores[table.scores < plan.path[-1, 0]]  # the first that was left out
    if lower.size:
        assert replay_plan(table, np.full(3, lower.max())).disagreement > 0.3


@pytest.mark.parametrize("odd", [np.nan, -np.inf, np.inf])
def test_scores_that_are_not_finite_are_no_steps(odd):
    table = make_table([[0, 0, 0, 1]], [[3, 2, odd, odd]], depth=2)
    plan = shared_threshold_plan(table, make_costs([1, 1], [0.1]), epsilon=0.5)
    largest = float(np.finfo(np.float32).max)
    assert plan.path[:, 0].tolist() == [np.inf, *([largest] if odd > 0 else []), 3, 2]
    assert plan.disagreement.tolist() == ([0, 0.25, 0.25, 0.25] if odd > 0 else [0, 0, 0])


def test_a_policy_keeps_the_requests_and_gives_its_own_classes(table):
    table, _ = table
    logits = np.random.default_rng(0).standard_normal((*table.scores.shape, 3)).astype(np.float32)
    scored = policy_table(table, logits, SDN)
    assert (scored.classes == logits.argmax(-1)).all()
    assert (scored.rows == table.rows).all()
    assert scored.scores.dtype == np.float32


def test_the_oracle_leaves_at_the_first_site_where_any_candidate_agrees(table):
    table, _ = table
    for request, exit_ in enumerate(oracle_exits(table)):
        right = [s for s, agrees in zip(table.sites, table.agrees[:, request], strict=True) if agrees]
        assert exit_ == min(right, default=table.depth)
