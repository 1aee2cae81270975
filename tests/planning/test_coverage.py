"""The certificate's promise on simulated traffic whose true disagreement lies exactly on epsilon.

Every draw is a fresh table of iid requests. A certificate for a step whose risk is epsilon or more is wrong; that may
happen to at most a share delta of the draws. It should not happen far more rarely either: that would waste data.
"""

import numpy as np
import pytest
from scipy.stats import binomtest

import gati_jax

OFF = np.inf
EPSILON, DELTA, N, DRAWS = 0.1, 0.1, 200, 1000


def nested(rng, risks, make_table):
    """One cache that answers every request; at step i + 1 the wrong answers of a share risks[i] come through."""
    uniform = rng.random(N)
    step = np.searchsorted(risks, uniform, side="right") + 1  # where a request's wrong answer first comes through
    wrong = uniform < risks[-1]
    scores = np.where(wrong, -step.astype(float), -rng.integers(1, len(risks) + 1, N))
    return make_table([wrong], [scores])


def taken_over(rng, risks, make_table):
    """Step 1 opens the cache at site 2, wrong on risks[0]; step 2 another before it, for all, wrong on risks[1]."""
    wrong = [rng.random(N) < risk for risk in reversed(risks)]
    return make_table(wrong, np.ones((2, N)), sites=(1, 2))


def wrongly_certified(draw, path, risks, make_table, make_plan, sites):
    """Count the draws in which a step with a risk of epsilon or more is certified."""
    rng = np.random.default_rng(20)
    plan = make_plan(path, sites=sites)
    first_bad = 1 + int(np.flatnonzero(np.asarray(risks) >= EPSILON)[0])
    steps = [gati_jax.certify(plan, draw(rng, risks, make_table), EPSILON, DELTA).step for _ in range(DRAWS)]
    return sum(step >= first_bad for step in steps), steps


NESTED_PATH = [[OFF], [-1.0], [-2.0], [-3.0], [-4.0]]


@pytest.mark.parametrize(
    ("draw", "path", "risks", "sites"),
    [
        (nested, NESTED_PATH[:2], [EPSILON], (1,)),
        (nested, NESTED_PATH, [0.02, 0.06, EPSILON, 0.13], (1,)),
        (taken_over, [[OFF, OFF], [OFF, 1.0], [1.0, 1.0]], [0.02, EPSILON], (1, 2)),
    ],
    ids=["first step", "several steps before", "another cache after a safe one"],
)
def test_a_step_on_epsilon_is_certified_at_most_as_often_as_delta(make_table, make_plan, draw, path, risks, sites):
    count, steps = wrongly_certified(draw, path, risks, make_table, make_plan, sites)
    assert binomtest(count, DRAWS).proportion_ci(0.95, method="exact").low <= DELTA
    assert count / DRAWS >= DELTA / 4
    if risks[0] < EPSILON:
        assert np.mean(np.asarray(steps) >= 1) > 0.9  # what is safely below is certified


def test_simulated_risks_are_what_they_are_called(make_table, walk):
    # The simulation itself, with the law of large numbers: its risks carry the meaning of the test above.
    rng, risks = np.random.default_rng(1), [0.02, 0.06, EPSILON, 0.13]
    tables = [nested(rng, risks, make_table) for _ in range(100)]
    for thresholds, risk in zip(NESTED_PATH[1:], risks, strict=True):
        wrong = sum(walk(table, thresholds).wrong for table in tables)
        low, high = binomtest(wrong, 100 * N).proportion_ci(0.9999, method="exact")
        assert low <= risk <= high


def test_looks_keep_the_promise_together(make_table, make_plan):
    # Two plans certified on the same rows, each tested at delta / 2: that either is wrong happens to at most delta.
    rng = np.random.default_rng(5)
    plan = make_plan([[OFF, OFF], [1.0, OFF]], sites=(1, 2))
    other = make_plan([[OFF, OFF], [OFF, 1.0]], sites=(1, 2))
    either, draws = 0, 300
    for _ in range(draws):
        table = taken_over(rng, [EPSILON, EPSILON], make_table)
        with pytest.warns(UserWarning, match="look 2"):
            either += any(gati_jax.certify(p, table, EPSILON, DELTA, looks=2).certified for p in (plan, other))
    assert binomtest(either, draws).proportion_ci(0.95, method="exact").low <= DELTA
    assert either / draws >= DELTA / 4
