"""Certificates for every exit at once, against a plain walk along the path."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax.certification import CONDITIONAL, ExitRate
from tests.planning.reference import OFF, exact_cdf, make_plan, make_table, random_plan, random_tables, serve

certify_conditional = functools.partial(gati_jax.certify_conditional, ledger=None)


def by_exit(table, thresholds):
    """For every open cache its site, and the requests that left at or before it, all and disagreeing, one by one."""
    served = serve(table, thresholds)
    found = []
    for cache, site in enumerate(table.sites):
        if thresholds[cache] == OFF:
            continue
        left = [r for r, exit_ in enumerate(served.exits) if exit_ <= cache]
        found.append((site, len(left), sum(served.classes[r] != table.answers[r] for r in left)))
    return found


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(0, 2**31))
def test_the_certified_step_is_the_last_before_any_exit_fails(data, seed):
    candidates, n = data.draw(st.integers(1, 3)), data.draw(st.integers(5, 60))
    alpha, delta = data.draw(st.sampled_from([0.1, 0.3, 0.6])), data.draw(st.sampled_from([0.05, 0.3, 0.6]))
    rng = np.random.default_rng(seed)
    table, _ = random_tables(seed, candidates, n, agreement=0.95)
    plan = random_plan(rng, table)
    step, exits = -1, []
    for i, thresholds in enumerate(plan.path):
        found = by_exit(table, thresholds)
        if any(exact_cdf(wrong, left, alpha) > delta for _, left, wrong in found):
            break
        if found:  # the bare base needs no certificate
            step, exits = i, found
    certificate = certify_conditional(plan, table, alpha, delta)
    assert (certificate.step, certificate.method, certificate.epsilon) == (step, CONDITIONAL, alpha)
    assert [(e.site, e.n, e.disagreements) for e in certificate.exits] == exits
    for e in certificate.exits:
        assert e.p_value == pytest.approx(float(exact_cdf(e.disagreements, e.n, alpha)))
    if step > 0:
        assert certificate.p_value == max(e.p_value for e in certificate.exits)
        # What holds for those that leave early holds for all requests.
        assert exact_cdf(certificate.disagreements, n, alpha) <= delta
    else:
        assert len(certificate.stays_off) == candidates


def test_a_path_that_closes_its_caches_again_ends_before():
    table = make_table(np.zeros((1, 500)), np.ones((1, 500)))
    assert certify_conditional(make_plan([[OFF], [1.0], [OFF]]), table, 0.05).step == 1
    assert gati_jax.certify(make_plan([[OFF], [OFF], [OFF]]), table, 0.05, ledger=None).stays_off


def two_exits(early, late):
    """Tables in which ``early`` = (requests, wrong) leave at site 1 and ``late`` at site 2."""
    n = early[0] + late[0]
    at_first = np.arange(n) < early[0]
    wrong = np.where(at_first, np.arange(n) < early[1], np.arange(n) - early[0] < late[1])
    return make_table([wrong, wrong], [at_first, np.ones(n)], sites=(1, 2))


TWO = [[OFF, OFF], [OFF, 1.0], [1.0, 1.0]]


def test_an_easy_majority_does_not_hide_a_bad_exit():
    table = two_exits((100, 10), (2000, 0))  # 0.5 % of all, 10 % of the early ones
    plan = make_plan(TWO)
    assert gati_jax.certify(plan, table, 0.05, ledger=None).step == 2
    certificate = certify_conditional(plan, table, 0.05)
    assert (certificate.step, [e.site for e in certificate.exits]) == (1, [2])
    (sentence,) = certificate.stays_off
    assert sentence.startswith("c0 stays off: of 100 that leave at or before site 1 10 disagree; it takes at least 59,")


@pytest.mark.parametrize(("left", "certified"), [(0, False), (1, False), (58, False), (59, True), (2000, True)])
def test_few_or_none_that_leave_prove_nothing(left, certified):
    assert (exact_cdf(0, left, 0.05) <= 0.05) == certified
    certificate = certify_conditional(make_plan(TWO), two_exits((left, 0), (500, 0)), 0.05)
    assert certificate.step == (2 if certified else 1)
    if not certified:
        assert f"of {left} that leave at or before site 1 0 disagree" in certificate.stays_off[0]


def test_all_or_none_hit():
    plan = make_plan(TWO)
    everything = certify_conditional(plan, two_exits((500, 0), (0, 0)), 0.05)
    assert [(e.site, e.n) for e in everything.exits] == [(1, 500), (2, 500)]
    nothing = make_table(np.zeros((2, 500)), np.full((2, 500), -9.0), sites=(1, 2))
    assert certify_conditional(plan, nothing, 0.05).step == -1
    unsure = make_table(np.zeros((2, 500)), np.full((2, 500), np.nan), sites=(1, 2))
    assert certify_conditional(plan, unsure, 0.05).step == -1  # no score is no hit


def test_caches_at_one_site_are_one_exit():
    n = 400
    scores = np.stack([np.arange(n) < 200, np.arange(n) >= 200]).astype(float)
    table = make_table([np.arange(n) < 8, np.zeros(n)], scores, sites=(1, 1))
    certificate = certify_conditional(make_plan([[OFF, OFF], [1.0, 1.0]], sites=(1, 1)), table, 0.05)
    assert certificate.exits == (ExitRate(site=1, n=400, disagreements=8, p_value=certificate.p_value),)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, float("nan")])
def test_rates_outside_0_to_1_are_refused(alpha):
    with pytest.raises(gati_jax.InputError, match="alpha: expected a number between 0 and 1"):
        certify_conditional(make_plan(TWO), two_exits((100, 0), (100, 0)), alpha)


def rate(site, n, wrong):
    return ExitRate(site=site, n=n, disagreements=wrong, p_value=0.0)


FORGED = {
    "no exits": (),
    "an exit with too many": (rate(1, 200, 40), rate(2, 500, 40)),
    "an exit of no request": (rate(1, 0, 0), rate(2, 500, 1)),
    "fewer at a later one": (rate(1, 600, 1), rate(2, 500, 1)),
    "less disagreement at a later one": (rate(1, 500, 2), rate(2, 600, 1)),
    "sites in another order": (rate(2, 200, 0), rate(1, 500, 1)),
    "a site twice": (rate(1, 200, 0), rate(1, 500, 1)),
    "more than there were": (rate(1, 200, 0), rate(2, 9999, 1)),
    "other disagreements than the certificate's": (rate(1, 200, 0), rate(2, 500, 0)),
}


@pytest.mark.parametrize("case", FORGED)
def test_exits_that_refute_their_certificate_cannot_be(case):
    table = two_exits((200, 0), (800, 1))
    certificate = certify_conditional(make_plan(TWO), table, 0.05)
    dataclasses.replace(certificate, exits=(rate(1, 200, 0), rate(2, 500, 1)))
    with pytest.raises(gati_jax.InputError, match="do not certify step 2"):
        dataclasses.replace(certificate, exits=FORGED[case])
    with pytest.raises((gati_jax.InputError, TypeError), match=r"method: expected|trust me"):
        dataclasses.replace(certificate, method="trust me")


@pytest.mark.parametrize(("n", "wrong", "site"), [(5, 6, 1), (5, -1, 1), (-1, -1, 1), (5, 1, -1), (2**60, 1, 1)])
def test_an_exit_has_counts(n, wrong, site):
    with pytest.raises(gati_jax.InputError, match="exits: expected counts"):
        rate(site, n, wrong)
