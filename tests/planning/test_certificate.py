"""Fixed-sequence testing against a plain loop, and what a certificate tells and refuses."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax.planning import Origin

OFF = np.inf
SEEDS = st.integers(0, 2**31)


def one_cache(make_table, wrong, n, **options):
    """A table of n requests that all hit at 1.0, ``wrong`` of which disagree."""
    return make_table([np.arange(n) < wrong], np.ones((1, n)), depth=2, **options)


@settings(deadline=None, max_examples=60)
@given(st.data(), SEEDS)
def test_certified_step_is_the_last_before_the_first_failure(random_tables, make_plan, walk, exact_cdf, data, seed):
    candidates, n = data.draw(st.integers(1, 3)), data.draw(st.integers(5, 40))
    epsilon, delta = data.draw(st.sampled_from([0.1, 0.3, 0.6])), data.draw(st.sampled_from([0.05, 0.3, 0.6]))
    rng = np.random.default_rng(seed)
    table, _ = random_tables(seed, candidates, n, agreement=0.9)
    path = rng.choice([0, 1, 2, 3, OFF], (4, candidates))
    path[0] = OFF
    plan = make_plan(path, sites=table.sites, depth=table.depth)
    step, wrong = -1, 0
    for i, thresholds in enumerate(path):
        count = walk(table, thresholds).wrong
        if exact_cdf(count, n, epsilon) > delta:
            break
        if i > 0 and np.isfinite(thresholds).any():  # the bare base needs no certificate
            step, wrong = i, count
    certificate = gati_jax.certify(plan, table, epsilon, delta)
    assert (certificate.step, certificate.disagreements) == (step, wrong)
    assert certificate.certified == (step > 0)
    assert certificate.p_value == pytest.approx(float(exact_cdf(wrong, n, epsilon)))
    assert (certificate.n, certificate.plan_hash) == (n, plan.hash)
    assert (certificate.epsilon, certificate.delta) == (epsilon, delta)


def test_a_later_step_does_not_make_up_for_a_failed_one(make_table, make_plan):
    # At 1.0 the first ten requests disagree; at 0.0 an earlier cache answers them right.
    n, wrong = 100, 10
    classes = np.zeros((2, n))
    classes[1, :wrong] = 1
    table = make_table(classes, np.ones((2, n)), sites=(1, 2))
    rising, other_order = [[OFF, OFF], [OFF, 1.0], [1.0, 1.0]], [[OFF, OFF], [1.0, OFF], [1.0, 1.0]]
    assert gati_jax.certify(make_plan(rising, sites=(1, 2)), table, 0.05).step == -1
    assert gati_jax.certify(make_plan(other_order, sites=(1, 2)), table, 0.05).step == 2


def test_too_few_rows_certify_nothing(make_table, make_plan, exact_cdf):
    plan = make_plan([[OFF], [1.0]], depth=2)
    first = next(n for n in range(1, 200) if exact_cdf(0, n, 0.05) <= 0.05)
    assert not gati_jax.certify(plan, one_cache(make_table, 0, first - 1), 0.05).certified
    assert gati_jax.certify(plan, one_cache(make_table, 0, first), 0.05).step == 1


def test_a_table_in_another_order_and_with_more_candidates_certifies_the_same(random_tables, make_plan):
    table, _ = random_tables(3, 3, 60, agreement=0.95)
    plan = make_plan([[OFF, OFF], [3, OFF], [2, 3]], sites=table.sites[:2], depth=table.depth)
    one = gati_jax.certify(plan, table, 0.2)
    assert one == gati_jax.certify(plan, table.take(["c2", "c1", "c0"]), 0.2)
    assert one.certified


def test_certify_refuses_rows_that_the_plan_was_composed_on(make_table, make_plan):
    plan = make_plan([[OFF], [1.0]], depth=2, first_row=0)  # rows 0 .. 99
    with pytest.raises(gati_jax.InputError, match="certify and select disjoint, got 2 rows"):
        gati_jax.certify(plan, one_cache(make_table, 0, 100, first_row=98), 0.1)
    # A duplicate in a hundred is what real data has.
    assert gati_jax.certify(plan, one_cache(make_table, 0, 100, first_row=99), 0.1).certified


def test_a_second_look_warns_and_pays(make_table, make_plan, exact_cdf):
    n, epsilon, delta = 100, 0.1, 0.1
    wrong = max(k for k in range(n) if exact_cdf(k, n, epsilon) <= delta)
    assert exact_cdf(wrong, n, epsilon) > delta / 2  # passes the first look only
    plan, table = make_plan([[OFF], [1.0]], depth=2), one_cache(make_table, wrong, n)
    assert gati_jax.certify(plan, table, epsilon, delta).certified
    with pytest.warns(UserWarning, match="look 2 at this certify data"):
        certificate = gati_jax.certify(plan, table, epsilon, delta, looks=2)
    assert (certificate.certified, certificate.looks, certificate.delta) == (False, 2, delta)


def test_looks_divide_delta(make_table, make_plan, exact_cdf):
    n, epsilon, delta, looks = 100, 0.2, 0.3, 4
    allowed = max(k for k in range(n) if exact_cdf(k, n, epsilon) <= delta / looks)
    plan = make_plan([[OFF], [1.0]], depth=2)
    with pytest.warns(UserWarning, match="look 4"):
        assert gati_jax.certify(plan, one_cache(make_table, allowed, n), epsilon, delta, looks=looks).certified
    with pytest.warns(UserWarning, match="look 4"):
        assert not gati_jax.certify(plan, one_cache(make_table, allowed + 1, n), epsilon, delta, looks=looks).certified


def test_that_the_base_saw_the_data_is_said(make_table, make_plan):
    plan, table = make_plan([[OFF], [1.0]], depth=2), one_cache(make_table, 0, 100)
    assert gati_jax.certify(plan, table, 0.1, base_saw_data=True).base_saw_data
    assert not gati_jax.certify(plan, table, 0.1).base_saw_data


def test_the_fingerprint_tells_data_apart(make_table, make_plan):
    plan = make_plan([[OFF], [1.0]], depth=2)
    prints = [
        gati_jax.certify(plan, one_cache(make_table, 0, 100, first_row=row), 0.1).data_fingerprint for row in (0, 0, 7)
    ]
    assert prints[0] == prints[1] != prints[2]


def with_repeats(table, repeats):
    """The same table, its first row so many times more."""
    rows = table.rows.copy()
    rows[1 : 1 + repeats] = rows[0]
    return dataclasses.replace(table, rows=rows)


def certifiers(plan, table):
    """Every way to certify a plan."""
    return (
        lambda **said: gati_jax.certify(plan, table, 0.1, **said),
        lambda **said: gati_jax.certify_together({"default": (plan, 0.1)}, table, **said)["default"],
        lambda **said: gati_jax.certify_conditional(plan, table, 0.1, **said),
    )


@pytest.mark.parametrize("repeats", [3, 299])
def test_rows_that_may_be_copies_certify_nothing_unless_they_are_said_to_be_draws(make_table, make_plan, repeats):
    plan, table = make_plan([[OFF], [1.0]], depth=2), with_repeats(one_cache(make_table, 0, 300), repeats)
    for certify in certifiers(plan, table):
        if repeats > 3:
            with pytest.raises(gati_jax.InputError, match="table: expected distinct rows, got 299 of 300 that repeat"):
                certify()
        else:
            with pytest.warns(UserWarning, match="3 of 300 certify rows repeat another"):
                assert certify().repeated == 3
        drawn = certify(repeats=True)  # and no warning
        assert (drawn.certified, drawn.n, drawn.repeated) == (True, 300, repeats)


def test_what_traffic_repeats_counts_as_often_as_it_came(make_table, make_plan):
    # A request that the caches get wrong is 9 % of the traffic. Counted once it would be 1 of 274.
    plan, table = make_plan([[OFF], [1.0]], depth=2), with_repeats(one_cache(make_table, 27, 300), 26)
    assert not gati_jax.certify(plan, table, 0.05, repeats=True).certified


def test_a_plan_remembers_as_many_rows_as_it_was_composed_on(make_plan):
    plan = make_plan([[OFF], [1.0]], depth=2)
    for rows in (plan.rows[:0], plan.rows[1:], plan.rows[None]):
        with pytest.raises(Exception, match="rows"):  # beartype may be the first to see the last
            dataclasses.replace(plan, rows=rows)
    with pytest.raises(gati_jax.InputError, match="rows: expected the digests of n = 100 requests"):
        dataclasses.replace(plan, rows=plan.rows[:0])


def test_a_certificate_names_the_rows_that_its_plan_was_composed_on(make_table, make_plan):
    plan, table = make_plan([[OFF], [1.0]], depth=2), one_cache(make_table, 0, 100)
    other = dataclasses.replace(plan, rows=plan.rows + np.uint64(1))
    assert other.hash == plan.hash
    prints = [gati_jax.certify(p, table, 0.1).select_fingerprint for p in (plan, plan, other)]
    assert prints[0] == prints[1] != prints[2]


def more_samples(sentence):
    match = re.search(r"about (\d+) more certify samples would open it", sentence)
    assert match, sentence
    return int(match[1])


@pytest.mark.parametrize("wrong", range(3, 9))  # of 100 at 10 %: 4 and more fail
def test_stays_off_says_how_many_samples_suffice(make_table, make_plan, exact_cdf, wrong):
    n, epsilon, delta = 100, 0.1, 0.05
    certificate = gati_jax.certify(make_plan([[OFF], [1.0]], depth=2), one_cache(make_table, wrong, n), epsilon, delta)
    if exact_cdf(wrong, n, epsilon) <= delta:
        assert certificate.stays_off == ()
        return
    (sentence,) = certificate.stays_off
    assert sentence.startswith(f"c0 stays off: with it {wrong:.2f}% of 100 disagree, 10.00% is allowed")
    larger = n + more_samples(sentence)
    assert exact_cdf(-(-wrong * larger // n), larger, epsilon) <= delta


def test_stays_off_counts_samples_at_what_a_second_look_costs(make_table, make_plan, exact_cdf):
    n, wrong, epsilon, delta = 100, 5, 0.1, 0.1
    with pytest.warns(UserWarning, match="look 2"):
        certificate = gati_jax.certify(
            make_plan([[OFF], [1.0]], depth=2), one_cache(make_table, wrong, n), epsilon, delta, looks=2
        )
    larger = n + more_samples(certificate.stays_off[0])
    assert exact_cdf(-(-wrong * larger // n), larger, epsilon) <= delta / 2


def test_stays_off_admits_that_no_number_of_samples_helps(make_table, make_plan):
    certificate = gati_jax.certify(make_plan([[OFF], [1.0]], depth=2), one_cache(make_table, 10, 100), 0.1)
    assert "no number of samples would open it" in certificate.stays_off[0]


def test_stays_off_names_the_caches_that_are_off_and_no_other(make_table, make_plan):
    # c0 answers rightly; c1, opened on step 2, disagrees on 8 of those that c0 leaves to it; c2 opens on step 3.
    n = 100
    scores = np.stack([np.arange(n) < 50, np.arange(n) >= 50, np.arange(n) >= 99]).astype(float)
    classes = np.zeros((3, n))
    classes[1, 50:58] = 1
    plan = make_plan([[OFF, OFF, OFF], [1, OFF, OFF], [1, 1, OFF], [1, 1, 1]])
    certificate = gati_jax.certify(plan, make_table(classes, scores), 0.1)
    assert certificate.step == 1
    assert [sentence.split()[0] for sentence in certificate.stays_off] == ["c1", "c2"]


def test_stays_off_reckons_with_the_steps_before_the_opening_one(make_table, make_plan, exact_cdf):
    # c1 fails with 6 of 100 on step 1. c0 takes these requests over and answers them right, but its step comes second:
    # it opens when step 1 passes, for which one sample more is not enough.
    n, wrong, epsilon, delta = 100, 6, 0.1, 0.05
    classes = np.zeros((2, n))
    classes[1, :wrong] = 1
    plan = make_plan([[OFF, OFF], [OFF, 1], [1, 1]], sites=(1, 2))
    certificate = gati_jax.certify(plan, make_table(classes, np.ones((2, n)), sites=(1, 2)), epsilon, delta)
    assert certificate.step == -1
    for sentence in certificate.stays_off:
        larger = n + more_samples(sentence)
        assert exact_cdf(-(-wrong * larger // n), larger, epsilon) <= delta, sentence


@pytest.mark.parametrize("name", ["epsilon", "delta"])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1.5, float("nan")])
def test_certify_refuses_rates_outside_0_to_1(make_table, make_plan, name, value):
    plan, table = make_plan([[OFF], [1.0]], depth=2), one_cache(make_table, 0, 50)
    epsilon, delta = (value, 0.1) if name == "epsilon" else (0.1, value)
    with pytest.raises(gati_jax.InputError, match=f"{name}: expected a number between 0 and 1, got {value}"):
        gati_jax.certify(plan, table, epsilon, delta)


@pytest.mark.parametrize("looks", [0, -1])
def test_certify_refuses_a_look_before_the_first(make_table, make_plan, looks):
    with pytest.raises(gati_jax.InputError, match="looks: expected"):
        gati_jax.certify(make_plan([[OFF], [1.0]], depth=2), one_cache(make_table, 0, 50), 0.1, looks=looks)


def test_certify_refuses_a_table_without_the_plans_candidates(make_table, make_plan):
    with pytest.raises(gati_jax.InputError, match="table: expected the candidates c1, got c0"):
        gati_jax.certify(make_plan([[OFF, OFF], [1.0, 1.0]]), one_cache(make_table, 0, 50), 0.1)


def test_an_empty_plan_certifies_nothing(make_table, make_plan):
    certificate = gati_jax.certify(make_plan(np.zeros((1, 0)), depth=2), one_cache(make_table, 0, 50), 0.1)
    assert (certificate.step, certificate.stays_off) == (-1, ())


@pytest.mark.parametrize(("step", "disagreements"), [(0, 0), (1, 100), (2, 8)])
def test_a_certificate_that_its_own_counts_refute_cannot_be(step, disagreements):
    with pytest.raises(gati_jax.InputError, match="do not certify step"):
        gati_jax.Certificate(
            epsilon=0.1,
            delta=0.05,
            step=step,
            n=100,
            disagreements=disagreements,
            p_value=0.0,
            plan_hash="",
            data_fingerprint="",
        )


def test_an_empty_table_certifies_nothing(make_table, make_plan):
    with pytest.raises(gati_jax.InputError, match="table: expected at least one request"):
        gati_jax.certify(make_plan([[OFF], [1.0]]), one_cache(make_table, 0, 0), 0.1)


@pytest.mark.parametrize("change", [{"depth": 9}, {"sites": (0,)}])
def test_a_table_of_another_base_is_refused(make_table, make_plan, change):
    table = dataclasses.replace(one_cache(make_table, 0, 100), **change)
    with pytest.raises(gati_jax.InputError, match="table: expected the plan's sites"):
        gati_jax.certify(make_plan([[OFF], [1.0]], depth=2), table, 0.1)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (Origin(base="y", candidates=(("c0", "1"),), dtype="uint8"), "the base"),
        (Origin(base="x", candidates=(("c0", "2"),), dtype="uint8"), "c0"),
        (Origin(base="x", candidates=(("c0", "1"),), dtype="float32"), "the images' dtype"),
        (Origin(), "the base, the images' dtype, c0"),
    ],
)
def test_a_table_of_other_parameters_is_refused(make_table, make_plan, other, named):
    mine = Origin(base="x", candidates=(("c0", "1"),), dtype="uint8")
    plan = dataclasses.replace(make_plan([[OFF], [1.0]], depth=2), origin=mine)
    table = one_cache(make_table, 0, 100)
    assert gati_jax.certify(plan, dataclasses.replace(table, origin=mine), 0.1).certified
    with pytest.raises(gati_jax.InputError, match=f"table: expected the parameters and images of the plan.*: {named}$"):
        gati_jax.certify(plan, dataclasses.replace(table, origin=other), 0.1)


def test_a_rate_a_hair_below_epsilon_needs_more_samples_than_anybody_has(make_table, make_plan):
    epsilon = 1 - 0.98  # 0.020000000000000018
    certificate = gati_jax.certify(make_plan([[OFF], [1.0]], depth=2), one_cache(make_table, 50, 2500), epsilon)
    assert not certificate.certified
    assert "no number of samples would open it" in certificate.stays_off[0]
