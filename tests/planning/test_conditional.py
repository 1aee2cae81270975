"""Certificates for every exit at once, against a plain walk; and paths that can be certified so."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax import certify_conditional
from gati_jax.planning import CONDITIONAL, ExitRate, conditional_plan

OFF = np.inf
SEEDS = st.integers(0, 2**31)


def by_exit(walk, table, thresholds):
    """For every open cache: its site, who left at or before it, and how many of them disagree, one by one."""
    served = walk(table, thresholds)
    found = []
    for cache, site in enumerate(table.sites):
        if thresholds[cache] == OFF:
            continue
        left = [r for r, exit_ in enumerate(served.exits) if exit_ <= cache]
        found.append((site, len(left), sum(served.classes[r] != table.answers[r] for r in left)))
    return found


@settings(deadline=None, max_examples=60)
@given(st.data(), SEEDS)
def test_the_certified_step_is_the_last_before_any_exit_fails(random_tables, make_plan, walk, exact_cdf, data, seed):
    candidates, n = data.draw(st.integers(1, 3)), data.draw(st.integers(5, 60))
    alpha, delta = data.draw(st.sampled_from([0.1, 0.3, 0.6])), data.draw(st.sampled_from([0.05, 0.3, 0.6]))
    plans = data.draw(st.integers(1, 2))
    rng = np.random.default_rng(seed)
    table, _ = random_tables(seed, candidates, n, agreement=0.95)
    path = rng.choice([0, 1, 2, 3, OFF], (4, candidates))
    path[0] = OFF
    plan = make_plan(path, sites=table.sites, depth=table.depth)
    step, exits = -1, []
    for i, thresholds in enumerate(path):
        found = by_exit(walk, table, thresholds)
        if any(exact_cdf(wrong, left, alpha) > delta / plans for _, left, wrong in found):
            break
        if found:  # the bare base needs no certificate
            step, exits = i, found
    certificate = certify_conditional(plan, table, alpha, delta, plans=plans)
    assert (certificate.step, certificate.method, certificate.epsilon) == (step, CONDITIONAL, alpha)
    assert [(e.site, e.n, e.disagreements) for e in certificate.exits] == exits
    for e in certificate.exits:
        assert e.p_value == pytest.approx(float(exact_cdf(e.disagreements, e.n, alpha)))
    if step > 0:
        assert certificate.p_value == max(e.p_value for e in certificate.exits)
        # What holds for those that leave early holds for all requests.
        assert exact_cdf(certificate.disagreements, n, alpha) <= delta / plans
    else:
        assert len(certificate.stays_off) == candidates


def test_a_path_that_closes_its_caches_again_ends_before(make_table, make_plan):
    table = make_table(np.zeros((1, 500)), np.ones((1, 500)))
    assert certify_conditional(make_plan([[OFF], [1.0], [OFF]]), table, 0.05).step == 1
    assert gati_jax.certify(make_plan([[OFF], [OFF], [OFF]]), table, 0.05).stays_off


def two_exits(make_table, early, late):
    """Tables in which ``early`` = (requests, wrong) leave at site 1 and ``late`` at site 2."""
    n = early[0] + late[0]
    at_first = np.arange(n) < early[0]
    wrong = np.where(at_first, np.arange(n) < early[1], np.arange(n) - early[0] < late[1])
    return make_table([wrong, wrong], [at_first, np.ones(n)], sites=(1, 2))


TWO = [[OFF, OFF], [OFF, 1.0], [1.0, 1.0]]


def test_an_easy_majority_does_not_hide_a_bad_exit(make_table, make_plan):
    table = two_exits(make_table, (100, 10), (2000, 0))  # 0.5 % of all, 10 % of the early ones
    plan = make_plan(TWO, sites=(1, 2))
    assert gati_jax.certify(plan, table, 0.05).step == 2
    certificate = certify_conditional(plan, table, 0.05)
    assert (certificate.step, [e.site for e in certificate.exits]) == (1, [2])
    (sentence,) = certificate.stays_off
    assert sentence.startswith("c0 stays off: of 100 that leave at or before site 1 10 disagree; it takes at least 59,")


@pytest.mark.parametrize(("left", "certified"), [(0, False), (1, False), (58, False), (59, True), (2000, True)])
def test_few_or_none_that_leave_prove_nothing(make_table, make_plan, exact_cdf, left, certified):
    assert (exact_cdf(0, left, 0.05) <= 0.05) == certified
    certificate = certify_conditional(make_plan(TWO, sites=(1, 2)), two_exits(make_table, (left, 0), (500, 0)), 0.05)
    assert certificate.step == (2 if certified else 1)
    if not certified:
        assert f"of {left} that leave at or before site 1 0 disagree" in certificate.stays_off[0]


def test_all_or_none_hit(make_table, make_plan):
    plan = make_plan(TWO, sites=(1, 2))
    everything = certify_conditional(plan, two_exits(make_table, (500, 0), (0, 0)), 0.05)
    assert [(e.site, e.n) for e in everything.exits] == [(1, 500), (2, 500)]
    nothing = make_table(np.zeros((2, 500)), np.full((2, 500), -9.0), sites=(1, 2))
    assert certify_conditional(plan, nothing, 0.05).step == -1
    unsure = make_table(np.zeros((2, 500)), np.full((2, 500), np.nan), sites=(1, 2))
    assert certify_conditional(plan, unsure, 0.05).step == -1  # no score is no hit


def test_caches_at_one_site_are_one_exit(make_table, make_plan):
    n = 400
    scores = np.stack([np.arange(n) < 200, np.arange(n) >= 200]).astype(float)
    table = make_table([np.arange(n) < 8, np.zeros(n)], scores, sites=(1, 1))
    certificate = certify_conditional(make_plan([[OFF, OFF], [1.0, 1.0]], sites=(1, 1)), table, 0.05)
    assert certificate.exits == (ExitRate(site=1, n=400, disagreements=8, p_value=certificate.p_value),)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, float("nan")])
def test_rates_outside_0_to_1_are_refused(make_table, make_plan, make_costs, alpha):
    table, plan = two_exits(make_table, (100, 0), (100, 0)), make_plan(TWO, sites=(1, 2))
    with pytest.raises(gati_jax.InputError, match="alpha: expected a number between 0 and 1"):
        certify_conditional(plan, table, alpha)
    with pytest.raises(gati_jax.InputError, match="alpha: expected a number between 0 and 1"):
        conditional_plan(plan, table, make_costs([1] * 4, [0, 0]), alpha)


def test_looks_and_plans_divide_delta(make_table, make_plan, exact_cdf):
    plan, table = make_plan(TWO, sites=(1, 2)), two_exits(make_table, (59, 0), (500, 0))
    assert exact_cdf(0, 59, 0.05) > 0.05 / 2
    with pytest.warns(UserWarning, match="look 2"):
        assert certify_conditional(plan, table, 0.05, looks=2).step == 1
    assert certify_conditional(plan, table, 0.05, plans=2, name="strict").step == 1
    with pytest.raises(gati_jax.InputError, match="plans: expected 1 or more"):
        certify_conditional(plan, table, 0.05, plans=0)


def rate(site, n, wrong):
    return ExitRate(site=site, n=n, disagreements=wrong, p_value=0.0)


FORGED = {
    "no exits": (),
    "an exit with too many": (rate(1, 200, 40), rate(2, 500, 40)),
    "an exit of nobody": (rate(1, 0, 0), rate(2, 500, 1)),
    "fewer at a later one": (rate(1, 600, 1), rate(2, 500, 1)),
    "less disagreement at a later one": (rate(1, 500, 2), rate(2, 600, 1)),
    "sites in another order": (rate(2, 200, 0), rate(1, 500, 1)),
    "a site twice": (rate(1, 200, 0), rate(1, 500, 1)),
    "more than there were": (rate(1, 200, 0), rate(2, 9999, 1)),
    "other disagreements than the certificate's": (rate(1, 200, 0), rate(2, 500, 0)),
}


@pytest.mark.parametrize("case", FORGED)
def test_exits_that_refute_their_certificate_cannot_be(make_table, make_plan, case):
    table = two_exits(make_table, (200, 0), (800, 1))
    certificate = certify_conditional(make_plan(TWO, sites=(1, 2)), table, 0.05)
    dataclasses.replace(certificate, exits=(rate(1, 200, 0), rate(2, 500, 1)))
    with pytest.raises(gati_jax.InputError, match="do not certify step 2"):
        dataclasses.replace(certificate, exits=FORGED[case])
    with pytest.raises((gati_jax.InputError, TypeError), match=r"method: expected|trust me"):
        dataclasses.replace(certificate, method="trust me")


@pytest.mark.parametrize(("n", "wrong", "site"), [(5, 6, 1), (5, -1, 1), (-1, -1, 1), (5, 1, -1), (2**60, 1, 1)])
def test_an_exit_has_counts(n, wrong, site):
    with pytest.raises(gati_jax.InputError, match="exits: expected counts"):
        rate(site, n, wrong)


@settings(deadline=None, max_examples=15)
@given(SEEDS, st.sampled_from([0.1, 0.3]), st.sampled_from([None, 50, 2000]))
def test_every_step_of_a_conditional_path_passes_where_it_was_laid(random_tables, walk, exact_cdf, seed, alpha, n):
    table, costs = random_tables(seed, 3, 200, levels=8, agreement=0.9)
    laid = conditional_plan(gati_jax.plan(table, costs, epsilon=0.9), table, costs, alpha, 0.1, n=n)
    kept = table.take(laid.names)
    assert (laid.sites, laid.n) == (kept.sites, 200)
    assert np.isfinite(laid.path).any(0).all()
    assert (np.diff(laid.mean_ms) < 0).all()
    for step in range(1, len(laid.path)):
        found = by_exit(walk, kept, laid.path[step])
        assert found
        for _, left, wrong in found:
            scaled = -(-wrong * (n or 200) // 200), left * (n or 200) // 200
            assert exact_cdf(*scaled, alpha) <= 0.4
        expected = walk(kept, laid.path[step], costs)
        assert laid.mean_ms[step] == pytest.approx(expected.mean_ms)
        assert laid.disagreement[step] == pytest.approx(expected.wrong / 200)


def sure_scores(rng, make_table, n, first_row):
    """Earlier caches are less sure; all are right more often where they are surer."""
    scores = 1.5 * rng.normal(size=(4, n)) + [[-1.0], [0.0], [1.0], [2.0]]
    wrong = rng.random((4, n)) < 1 / (1 + np.exp(1 + 1.5 * scores))
    return make_table(wrong, scores, sites=(1, 2, 4, 5), depth=6, first_row=first_row)


def test_a_conditional_path_saves_more_than_the_greedy_one(make_table, make_costs):
    costs, saved = make_costs([1.0] * 6, [0.1] * 4), []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        select, certify = (sure_scores(rng, make_table, 1500, first_row) for first_row in (0, 10**6))
        greedy = gati_jax.plan(select, costs, epsilon=0.03)
        laid = conditional_plan(greedy, select, costs, 0.03)
        steps = [max(0, certify_conditional(plan, certify, 0.03).step) for plan in (greedy, laid)]
        saved.append(greedy.mean_ms[steps[0]] - laid.mean_ms[steps[1]])
    assert np.mean(saved) > 0.1


@pytest.mark.parametrize("odd", [np.nan, -np.inf])
def test_the_lowest_score_may_be_a_threshold_of_a_conditional_path(make_table, make_plan, make_costs, odd):
    # More scores than thresholds are tried: the lowest that can hit is one of them all the same.
    scores = np.append(np.arange(1.0, 301), odd)
    table = make_table([np.zeros(301)], [scores], depth=2)
    laid = conditional_plan(make_plan([[OFF], [1.0]], depth=2), table, make_costs([1, 1], [0.1]), 0.05)
    assert laid.path[-1].tolist() == [1.0]


@pytest.mark.parametrize("classes", [np.ones((2, 50)), np.zeros((2, 50))])
def test_where_nothing_can_pass_the_path_is_the_bare_base(make_table, make_plan, make_costs, classes):
    table = make_table(classes, np.full((2, 50), np.nan) if not classes.any() else np.ones((2, 50)), sites=(1, 2))
    laid = conditional_plan(make_plan(TWO, sites=(1, 2)), table, make_costs([1] * 4, [0, 0]), 0.02)
    assert (laid.names, laid.path.shape, laid.mean_ms.tolist()) == ((), (1, 0), [4.0])


def test_a_path_is_laid_on_requests(make_table, make_plan, make_costs):
    plan, costs = make_plan(TWO, sites=(1, 2)), make_costs([1] * 4, [0, 0])
    empty = make_table(np.zeros((2, 0)), np.zeros((2, 0)), sites=(1, 2))
    with pytest.raises(gati_jax.InputError, match="table, n: expected at least one request"):
        conditional_plan(plan, empty, costs, 0.02)
    with pytest.raises(gati_jax.InputError, match="table, n: expected at least one request"):
        conditional_plan(plan, two_exits(make_table, (9, 0), (9, 0)), costs, 0.02, n=0)
