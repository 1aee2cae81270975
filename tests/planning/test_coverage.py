"""The certificates' promises on simulated traffic whose true disagreement lies exactly on epsilon.

Every draw is a fresh table of iid requests. A certificate for a step whose risk is epsilon or more is wrong; that may
happen to at most a share delta of the draws. It should not happen far more rarely either: that would waste data.
"""

import dataclasses

import numpy as np
import pytest
from scipy.stats import binomtest

import gati_jax
from gati_jax.planning import accuracy_gap_bound, conditional_plan, resplit_coverage

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


def by_exits(rng, shares, risks, make_table):
    """Requests leave at sites 1, 2, ... with these shares; each site's are wrong with this risk of its own."""
    exits = rng.choice(len(shares) + 1, N, p=[*shares, 1 - sum(shares)])
    wrong = rng.random(N) < np.append(risks, 0.0)[exits]
    scores = exits == np.arange(len(shares))[:, None]
    return make_table(np.tile(wrong, (len(shares), 1)), scores.astype(float), depth=9)


def wrongly_conditional(shares, risks, path, first_bad, make_table, make_plan):
    rng, plan = np.random.default_rng(3), make_plan(path, depth=9)
    tables = (by_exits(rng, shares, risks, make_table) for _ in range(DRAWS))
    steps = [gati_jax.certify_conditional(plan, table, EPSILON, DELTA).step for table in tables]
    return sum(step >= first_bad for step in steps), steps


LATE_FIRST = [[OFF, OFF], [OFF, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("shares", "risks", "path", "first_bad"),
    [
        ([0.6], [EPSILON], [[OFF], [1.0]], 1),
        ([0.4, 0.5], [EPSILON, 0.0], LATE_FIRST, 2),
        ([0.4, 0.5], [0.0, EPSILON * 0.9 / 0.5], LATE_FIRST[::2], 1),
    ],
    ids=["one exit", "the first of two, at a later step", "both together, the first one harmless"],
)
def test_an_exit_on_alpha_is_certified_at_most_as_often_as_delta(make_table, make_plan, shares, risks, path, first_bad):
    count, steps = wrongly_conditional(shares, risks, path, first_bad, make_table, make_plan)
    assert binomtest(count, DRAWS).proportion_ci(0.95, method="exact").low <= DELTA
    assert count / DRAWS >= DELTA / 4
    if first_bad > 1:
        assert np.mean(np.asarray(steps) >= 1) > 0.9


def test_exits_that_are_all_on_alpha_share_no_delta_and_need_none(make_table, make_plan):
    # All of three must pass for one wrong certificate: rarer than one alone.
    count, _ = wrongly_conditional([0.3] * 3, [EPSILON] * 3, [[OFF] * 3, [1.0] * 3], 1, make_table, make_plan)
    assert 0 < count / DRAWS <= DELTA


def test_plans_together_keep_the_promise_together(make_table, make_plan):
    # Three plans, each of one cache whose risk is its epsilon: that any is wrongly certified happens to at most delta.
    rng, epsilons = np.random.default_rng(8), {"tight": 0.05, "default": 0.1, "loose": 0.2}
    plans = {}
    for i, (name, epsilon) in enumerate(epsilons.items()):
        path = np.full((2, 3), OFF)
        path[1, i] = 1.0
        plans[name] = (make_plan(path), epsilon)
    failures = 0
    for _ in range(DRAWS):
        table = make_table(rng.random((3, N)) < np.array([*epsilons.values()])[:, None], np.ones((3, N)))
        failures += any(c.certified for c in gati_jax.certify_together(plans, table, DELTA).values())
    assert binomtest(failures, DRAWS).proportion_ci(0.95, method="exact").low <= DELTA
    assert failures / DRAWS >= DELTA / 4


@pytest.mark.parametrize(("losses", "gains"), [(0.05, 0.0), (0.05, 0.05), (0.005, 0.004)])
def test_the_bound_on_the_accuracy_gap_is_wrong_at_most_as_often_as_delta(losses, gains):
    # A bet's capital is compared with 1 / delta by Markov's inequality, which costs: bounds by betting at a fixed n are
    # wrong far more rarely than delta. Measured at n = 2,000, delta = 0.1: 0.005, 0.005 and 0.003 of the draws.
    rng, n, wrong = np.random.default_rng(4), 2000, 0
    for _ in range(DRAWS):
        kind = rng.choice(3, n, p=[losses, gains, 1 - losses - gains])
        wrong += accuracy_gap_bound(kind != 1, kind != 0, DELTA).upper < losses - gains
    assert binomtest(wrong, DRAWS).proportion_ci(0.95, method="exact").low <= DELTA


def population(seed, n, make_table):
    """A table of requests whose caches are right more often where they are surer."""
    rng = np.random.default_rng(seed)
    scores = 1.5 * rng.normal(size=(3, n)) + [[0.0], [1.0], [2.0]]
    wrong = rng.random((3, n)) < 1 / (1 + np.exp(1 + 1.5 * scores))
    return make_table(wrong, scores.round(1), sites=(1, 2, 3))


@pytest.mark.parametrize("kind", ["marginal", "conditional"])
def test_resplits_of_one_table_fail_at_most_as_often_as_delta(make_table, make_costs, kind):
    table, costs = population(1, 800, make_table), make_costs([1.0] * 4, [0.05] * 3)
    epsilon, options = 0.08, {}
    if kind == "conditional":
        options = {
            "compose_with": lambda rows: conditional_plan(
                gati_jax.plan(rows, costs, epsilon=epsilon), rows, costs, epsilon, DELTA
            ),
            "certify_with": lambda plan, rows: gati_jax.certify_conditional(plan, rows, epsilon, DELTA),
        }
    draws = 8 if options else 40
    coverage = resplit_coverage(table, costs, epsilon, DELTA, draws, 0, **options)
    assert coverage.certified > draws / 2
    assert coverage.low <= DELTA
    assert coverage.rate == coverage.failures / draws
    assert 0 < coverage.mean_rate < epsilon
    interval = binomtest(coverage.failures, draws).proportion_ci(0.95, method="exact")
    assert (coverage.low, coverage.high) == pytest.approx((interval.low, interval.high))
    if not options:
        assert coverage == resplit_coverage(table, costs, epsilon, DELTA, draws, 0)


def test_resplits_find_out_who_certifies_what_does_not_hold(make_table, make_costs):
    table, costs = population(2, 800, make_table), make_costs([1.0] * 4, [0.05] * 3)

    def believed(plan, rows):
        """Certify what a fifth of the requests, taken for all of them, would allow."""
        counted = gati_jax.certify(plan, rows, 0.2, DELTA)
        return dataclasses.replace(counted, accuracy_gap=None)

    coverage = resplit_coverage(table, costs, 0.05, DELTA, 20, 0, certify_with=believed)
    assert coverage.low > DELTA
    assert coverage.worst_rate > 0.05


def test_a_resplit_judges_by_the_rows_that_the_plan_has_not_seen(make_table, make_costs, make_plan, walk):
    table, costs, seen = population(3, 200, make_table), make_costs([1.0] * 4, [0.05] * 3), []
    fixed = make_plan([[OFF] * 3, [0.0, 0.0, 0.0]], sites=(1, 2, 3))

    def compose(rows):
        seen.append(rows)
        return fixed

    def certify(plan, rows):
        seen.append(rows)
        return gati_jax.certify(plan, rows, 0.9, 0.5)

    coverage = resplit_coverage(
        table, costs, 0.9, 0.5, 1, 7, shares=(0.2, 0.3), compose_with=compose, certify_with=certify
    )
    select, certified = (set(rows.rows.tolist()) for rows in seen)
    assert (len(select), len(certified), len(select & certified)) == (40, 60, 0)
    rest = [int(row) not in select for row in table.rows]
    judged = make_table(table.classes[:, rest], table.scores[:, rest], sites=(1, 2, 3))
    wrong = walk(judged, [0.0, 0.0, 0.0]).wrong
    assert coverage.mean_rate == coverage.worst_rate == wrong / 160


@pytest.mark.parametrize(
    ("draws", "shares"), [(0, (0.2, 0.2)), (1, (0.5, 0.5)), (1, (0.0, 0.5)), (1, (0.5, 1.0)), (1, (0.001, 0.5))]
)
def test_a_resplit_needs_draws_and_rows_in_every_part(make_table, make_costs, draws, shares):
    table, costs = population(0, 100, make_table), make_costs([1.0] * 4, [0.05] * 3)
    with pytest.raises(gati_jax.InputError, match="draws, shares: expected"):
        resplit_coverage(table, costs, 0.1, DELTA, draws, 0, shares=shares)
