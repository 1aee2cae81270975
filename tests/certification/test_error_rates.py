"""How often certificates are wrong, on simulated traffic whose true disagreement lies exactly on epsilon.

Every draw is a fresh table of iid requests. A certificate for a step whose risk is epsilon or more is wrong, which may
happen to at most a share delta of the draws. It should not happen far more rarely either: that would waste data.
"""

import functools

import numpy as np
import pytest
from scipy.stats import binomtest

import gati_jax
from gati_jax import Ledger
from gati_jax.certification import accuracy_gap_bound
from tests.planning.reference import OFF, make_plan, make_table, serve

certify = functools.partial(gati_jax.certify, ledger=None)
certify_conditional = functools.partial(gati_jax.certify_conditional, ledger=None)
certify_together = functools.partial(gati_jax.certify_together, ledger=None)
EPSILON, DELTA, N, DRAWS = 0.1, 0.1, 200, 250
RISKS = [0.02, 0.06, EPSILON, 0.13]
NESTED = [[OFF], [-1.0], [-2.0], [-3.0], [-4.0]]
LATE_FIRST = [[OFF, OFF], [OFF, 1.0], [1.0, 1.0]]


def nested(rng, risks):
    """One cache that answers every request; at step i + 1 the wrong answers of a share risks[i] come through."""
    uniform = rng.random(N)
    step = np.searchsorted(risks, uniform, side="right") + 1  # where a request's wrong answer first comes through
    wrong = uniform < risks[-1]
    scores = np.where(wrong, -step.astype(float), -rng.integers(1, len(risks) + 1, N))
    return make_table([wrong], [scores])


def taken_over(rng, risks):
    """Each cache answers every request; the last one is wrong on risks[0], the one before it on risks[1] ..."""
    wrong = [rng.random(N) < risk for risk in reversed(risks)]
    return make_table(wrong, np.ones((len(risks), N)))


def by_exits(rng, shares, risks):
    """Requests leave at sites 1, 2, ... with these shares; each site's are wrong with this risk of its own."""
    exits = rng.choice(len(shares) + 1, N, p=[*shares, 1 - sum(shares)])
    wrong = rng.random(N) < np.append(risks, 0.0)[exits]
    scores = exits == np.arange(len(shares))[:, None]
    return make_table(np.tile(wrong, (len(shares), 1)), scores.astype(float))


def marginal(draw, path, first_bad, risks):
    plan = make_plan(path)
    return lambda rng: (certify(plan, draw(rng, risks), EPSILON, DELTA).step, first_bad)


def conditional(path, first_bad, shares, risks):
    plan = make_plan(path)
    return lambda rng: (certify_conditional(plan, by_exits(rng, shares, risks), EPSILON, DELTA).step, first_bad)


def together(rng):
    """Three plans, each of one cache whose risk is its epsilon: any of them is certified wrongly."""
    epsilons = [0.05, 0.1, 0.2]
    plans = {str(e): (make_plan([[OFF] * 3, np.where(np.arange(3) == i, 1.0, OFF)]), e) for i, e in enumerate(epsilons)}
    found = certify_together(plans, taken_over(rng, epsilons[::-1]), DELTA)
    return max(certificate.step for certificate in found.values()), 1


def looks(rng):
    """Two plans certified on the same rows, the second if the first one failed: either is certified wrongly."""
    table = taken_over(rng, [EPSILON, EPSILON])
    plans = [make_plan([[OFF, OFF], step]) for step in ([1.0, OFF], [OFF, 1.0])]
    ledger = Ledger()
    first = gati_jax.certify(plans[0], table, EPSILON, DELTA, ledger=ledger)
    if first.certified:
        return first.step, 1
    with pytest.warns(UserWarning, match="look 2"):
        return gati_jax.certify(plans[1], table, EPSILON, DELTA, ledger=ledger).step, 1


CASES = {
    "first step": marginal(nested, NESTED[:2], 1, [EPSILON]),
    "several steps before": marginal(nested, NESTED, 3, RISKS),
    "another cache after a safe one": marginal(taken_over, LATE_FIRST, 2, [0.02, EPSILON]),
    "three plans together": together,
    "two looks": looks,
    "one exit": conditional([[OFF], [1.0]], 1, [0.6], [EPSILON]),
    "the first of two exits, at a later step": conditional(LATE_FIRST, 2, [0.4, 0.5], [EPSILON, 0.0]),
    "both exits, the first one harmless": conditional(LATE_FIRST[::2], 1, [0.4, 0.5], [0.0, EPSILON * 0.9 / 0.5]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_epsilon_is_certified_at_most_as_often_as_delta(case):
    rng = np.random.default_rng(20)
    steps, first_bad = np.array([CASES[case](rng) for _ in range(DRAWS)]).T
    wrong = int((steps >= first_bad).sum())
    assert binomtest(wrong, DRAWS).proportion_ci(0.95, method="exact").low <= DELTA
    assert wrong / DRAWS >= DELTA / 4
    if first_bad[0] > 1:
        assert np.mean(steps >= 1) > 0.9  # what is safely below is certified


def test_exits_that_are_all_on_epsilon_need_no_share_of_delta_each():
    # All of three must pass for one wrong certificate: rarer than one alone.
    rng, case = np.random.default_rng(3), conditional([[OFF] * 3, [1.0] * 3], 1, [0.3] * 3, [EPSILON] * 3)
    assert 0 < np.mean([case(rng)[0] >= 1 for _ in range(DRAWS)]) <= DELTA


def test_simulated_risks_are_what_they_are_called():
    # The simulation itself, with the law of large numbers: its risks carry the meaning of the test above.
    rng = np.random.default_rng(1)
    tables = [nested(rng, RISKS) for _ in range(100)]
    for thresholds, risk in zip(NESTED[1:], RISKS, strict=True):
        wrong = sum(serve(table, thresholds).wrong for table in tables)
        low, high = binomtest(wrong, 100 * N).proportion_ci(0.9999, method="exact")
        assert low <= risk <= high


@pytest.mark.parametrize(("losses", "gains"), [(0.05, 0.0), (0.05, 0.05), (0.005, 0.004)])
def test_the_bound_on_the_accuracy_gap_is_wrong_at_most_as_often_as_delta(losses, gains):
    # A bet's capital is compared with 1 / delta by Markov's inequality, so at a fixed n the bound is wrong far more
    # rarely than delta. Measured at n = 2,000, delta = 0.1 on 1,000 draws: 0.005, 0.005 and 0.003 of them.
    rng, n, wrong = np.random.default_rng(4), 2000, 0
    for _ in range(DRAWS):
        kind = rng.choice(3, n, p=[losses, gains, 1 - losses - gains])
        wrong += accuracy_gap_bound(kind != 1, kind != 0, DELTA).upper < losses - gains
    assert binomtest(wrong, DRAWS).proportion_ci(0.95, method="exact").low <= DELTA
