"""Fixed-sequence testing against a plain loop, for one plan and several, and what certificates say and refuse."""

import dataclasses
import functools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax.certification import tightest
from gati_jax.planning import ReplaySource
from tests.planning.reference import OFF, exact_cdf, make_plan, make_table, random_plan, random_tables, serve

certify = functools.partial(gati_jax.certify, ledger=None)
certify_conditional = functools.partial(gati_jax.certify_conditional, ledger=None)
certify_together = functools.partial(gati_jax.certify_together, ledger=None)
SEEDS = st.integers(0, 2**31)
ONE = make_plan([[OFF], [1.0]], depth=2)
"""The plan of one cache and one step."""


def one_cache(wrong, n, **options):
    """A table of n requests that all hit at 1.0, ``wrong`` of which disagree."""
    return make_table([np.arange(n) < wrong], np.ones((1, n)), depth=2, **options)


def most_passing(n, epsilon, delta):
    return max(k for k in range(n) if exact_cdf(k, n, epsilon) <= delta)


@settings(deadline=None, max_examples=50)
@given(st.data(), SEEDS)
def test_certified_step_is_the_last_before_the_first_failure(data, seed):
    candidates, n = data.draw(st.integers(1, 3)), data.draw(st.integers(5, 40))
    epsilon, delta = data.draw(st.sampled_from([0.1, 0.3, 0.6])), data.draw(st.sampled_from([0.05, 0.3, 0.6]))
    table, _ = random_tables(seed, candidates, n, agreement=0.9)
    plan = random_plan(np.random.default_rng(seed), table)
    step, wrong = -1, 0
    for i, thresholds in enumerate(plan.path):
        count = serve(table, thresholds).wrong
        if exact_cdf(count, n, epsilon) > delta:
            break
        if i > 0 and np.isfinite(thresholds).any():  # the bare base needs no certificate
            step, wrong = i, count
    certificate = certify(plan, table, epsilon, delta)
    assert (certificate.step, certificate.disagreements) == (step, wrong)
    assert certificate.certified == (step > 0)
    assert certificate.p_value == pytest.approx(float(exact_cdf(wrong, n, epsilon)))
    assert (certificate.n, certificate.plan_hash) == (n, plan.hash)
    assert (certificate.epsilon, certificate.delta) == (epsilon, delta)


@settings(deadline=None, max_examples=25)
@given(st.data(), SEEDS, st.integers(1, 4))
def test_each_of_several_plans_is_certified_as_alone_at_its_share_of_delta(data, seed, plans):
    rng = np.random.default_rng(seed)
    table, _ = random_tables(seed, 2, 60, agreement=0.95)
    delta = data.draw(st.sampled_from([0.1, 0.5]))
    named = {f"p{i}": (random_plan(rng, table), data.draw(st.sampled_from([0.1, 0.3]))) for i in range(plans)}
    together = certify_together(named, table, delta)
    assert list(together) == list(named)
    for name, (plan, epsilon) in named.items():
        alone, one = certify(plan, table, epsilon, delta / plans), together[name]
        assert (one.step, one.disagreements, one.p_value) == (alone.step, alone.disagreements, alone.p_value)
        assert (one.name, one.plans, one.looks, one.delta) == (name, plans, 1, delta)
        assert one.level == pytest.approx(delta / plans)
        assert one.stays_off == alone.stays_off


def test_a_later_step_does_not_make_up_for_a_failed_one():
    # On its own c1 disagrees on the first ten requests; the earlier c0 answers them right.
    n, wrong = 100, 10
    classes = np.zeros((2, n))
    classes[1, :wrong] = 1
    table = make_table(classes, np.ones((2, n)))
    rising, other_order = [[OFF, OFF], [OFF, 1.0], [1.0, 1.0]], [[OFF, OFF], [1.0, OFF], [1.0, 1.0]]
    assert certify(make_plan(rising), table, 0.05).step == -1
    assert certify(make_plan(other_order), table, 0.05).step == 2


def test_too_few_rows_certify_nothing():
    first = next(n for n in range(1, 200) if exact_cdf(0, n, 0.05) <= 0.05)
    assert not certify(ONE, one_cache(0, first - 1), 0.05).certified
    assert certify(ONE, one_cache(0, first), 0.05).step == 1


def test_an_empty_plan_certifies_nothing():
    certificate = certify(make_plan(np.zeros((1, 0)), depth=2), one_cache(0, 50), 0.1)
    assert (certificate.step, certificate.stays_off) == (-1, ())


def test_a_table_in_another_order_and_with_more_candidates_certifies_the_same():
    table, _ = random_tables(3, 3, 60, agreement=0.95)
    plan = make_plan([[OFF, OFF], [3, OFF], [2, 3]], sites=table.sites[:2], depth=table.depth)
    one = certify(plan, table, 0.2)
    assert one == certify(plan, table.take(["c2", "c1", "c0"]), 0.2)
    assert one.certified


def test_a_plan_shares_delta_with_those_certified_beside_it():
    table = one_cache(most_passing(100, 0.1, 0.1), 100)
    alone = certify(ONE, table, 0.1, 0.1)
    assert alone.certified
    assert certify_together({"default": (ONE, 0.1)}, table, 0.1) == {"default": alone}
    two = certify_together({"tight": (ONE, 0.1), "loose": (ONE, 0.2)}, table, 0.1)
    assert (two["tight"].certified, two["loose"].certified) == (False, True)
    with pytest.raises(gati_jax.InputError, match="do not certify step 1"):
        dataclasses.replace(alone, plans=2)  # nor can the same counts claim to have been certified beside another


def test_the_tightest_certified_plan_comes_first():
    epsilons = {"loosest": 0.4, "tight": 0.01, "loose": 0.3}
    table = one_cache(most_passing(100, 0.1, 0.1), 100)
    certificates = certify_together({name: (ONE, e) for name, e in epsilons.items()}, table, 0.1)
    assert tightest(certificates) == "loose"
    assert tightest({name: dataclasses.replace(c, step=-1) for name, c in certificates.items()}) == "tight"
    with pytest.raises(gati_jax.InputError, match="certificates: expected at least one"):
        tightest({})


def test_a_certificate_records_what_it_was_computed_from():
    table, moved = one_cache(0, 100), dataclasses.replace(ONE, rows=ONE.rows + np.uint64(1))
    one, again, other = (certify(ONE, one_cache(0, 100, first_row=row), 0.1) for row in (0, 0, 7))
    assert one.data_fingerprint == again.data_fingerprint != other.data_fingerprint
    assert moved.hash == ONE.hash
    assert one.select_fingerprint == other.select_fingerprint != certify(moved, table, 0.1).select_fingerprint
    assert certify(ONE, table, 0.1, base_saw_data=True).base_saw_data
    assert not one.base_saw_data


def with_duplicates(table, duplicates):
    """The same table, its first row so many times more."""
    rows = table.rows.copy()
    rows[1 : 1 + duplicates] = rows[0]
    return dataclasses.replace(table, rows=rows)


CERTIFIERS = {
    "alone": lambda table, **options: certify(ONE, table, 0.1, **options),
    "together": lambda table, **options: certify_together({"a": (ONE, 0.1)}, table, **options)["a"],
    "conditional": lambda table, **options: certify_conditional(ONE, table, 0.1, **options),
}


@pytest.mark.parametrize("duplicates", [3, 299])
@pytest.mark.parametrize("way", CERTIFIERS)
def test_rows_that_may_be_copies_are_refused_unless_they_are_known_to_be_draws(way, duplicates):
    table = with_duplicates(one_cache(0, 300), duplicates)
    if duplicates > 3:
        with pytest.raises(gati_jax.InputError, match="table: expected distinct rows, got 299 of 300 that repeat"):
            CERTIFIERS[way](table)
    else:
        with pytest.warns(UserWarning, match="3 of 300 certify rows repeat another"):
            assert CERTIFIERS[way](table).repeated == 3
    drawn = CERTIFIERS[way](table, duplicates=True)  # and no warning
    assert (drawn.certified, drawn.n, drawn.repeated) == (True, 300, duplicates)


def test_duplicates_count_as_often_as_they_came():
    # A request that the caches get wrong is 9 % of the traffic. Counted once it would be 1 of 274.
    assert not certify(ONE, with_duplicates(one_cache(27, 300), 26), 0.05, duplicates=True).certified


def fresh_rows(sentence):
    match = re.search(r"about (\d+) fresh certify rows, without any of these, would open it", sentence)
    assert match, sentence
    return int(match[1])


@pytest.mark.parametrize("wrong", range(3, 9))  # of 100 at 10 %: 4 and more fail
def test_stays_off_says_how_many_samples_suffice(wrong):
    n, epsilon, delta = 100, 0.1, 0.05
    certificate = certify(ONE, one_cache(wrong, n), epsilon, delta)
    if exact_cdf(wrong, n, epsilon) <= delta:
        assert certificate.stays_off == ()
        return
    (sentence,) = certificate.stays_off
    assert sentence.startswith(f"c0 stays off: with it {wrong:.2f}% of 100 disagree, 10.00% is allowed")
    larger = fresh_rows(sentence)
    assert exact_cdf(-(-wrong * larger // n), larger, epsilon) <= delta


@pytest.mark.parametrize(("wrong", "n", "epsilon"), [(10, 100, 0.1), (50, 2500, 1 - 0.98)])
def test_stays_off_says_that_no_number_of_samples_helps(wrong, n, epsilon):  # a rate on epsilon, or a hair below
    certificate = certify(ONE, one_cache(wrong, n), epsilon)
    assert not certificate.certified
    assert "no number of rows would open it" in certificate.stays_off[0]


def test_stays_off_names_the_caches_that_are_off_and_no_other():
    # c0 answers rightly; c1, opened on step 2, disagrees on 8 of those that c0 leaves to it; c2 opens on step 3.
    n = 100
    scores = np.stack([np.arange(n) < 50, np.arange(n) >= 50, np.arange(n) >= 99]).astype(float)
    classes = np.zeros((3, n))
    classes[1, 50:58] = 1
    plan = make_plan([[OFF, OFF, OFF], [1, OFF, OFF], [1, 1, OFF], [1, 1, 1]])
    certificate = certify(plan, make_table(classes, scores), 0.1)
    assert certificate.step == 1
    assert [sentence.split()[0] for sentence in certificate.stays_off] == ["c1", "c2"]


def test_stays_off_reckons_with_the_steps_before_the_opening_one():
    # c1 fails with 6 of 100 on step 1. c0 takes these requests over and answers them right, but its step comes second:
    # it opens when step 1 passes, for which one sample more is not enough.
    n, wrong, epsilon, delta = 100, 6, 0.1, 0.05
    classes = np.zeros((2, n))
    classes[1, :wrong] = 1
    plan = make_plan([[OFF, OFF], [OFF, 1], [1, 1]])
    certificate = certify(plan, make_table(classes, np.ones((2, n))), epsilon, delta)
    assert (certificate.step, len(certificate.stays_off)) == (-1, 2)
    for sentence in certificate.stays_off:
        larger = fresh_rows(sentence)
        assert exact_cdf(-(-wrong * larger // n), larger, epsilon) <= delta, sentence


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1.5, float("nan")])
def test_rates_outside_0_to_1_are_refused(value):
    table = one_cache(0, 50)
    with pytest.raises(gati_jax.InputError, match=f"epsilon: expected a number between 0 and 1, got {value}"):
        certify(ONE, table, value, 0.1)
    with pytest.raises(gati_jax.InputError, match=f"delta: expected a number between 0 and 1, got {value}"):
        certify(ONE, table, 0.1, value)
    with pytest.raises(gati_jax.InputError, match="epsilon: expected"):
        certify_together({"a": (ONE, 0.1), "b": (ONE, value)}, table)


@pytest.mark.parametrize("name", ["", "a b", "x" * 41, "a/b", "<b>", "a\n"])
def test_a_name_is_one_plain_word(name):
    with pytest.raises(gati_jax.InputError, match="name: expected"):
        certify_together({name: (ONE, 0.1)}, one_cache(0, 99))


def test_no_plans_are_refused():
    with pytest.raises(gati_jax.InputError, match="plans: expected at least one"):
        certify_together({}, one_cache(0, 9))


@pytest.mark.parametrize(("step", "disagreements"), [(0, 0), (1, 100), (2, 8)])
def test_a_certificate_that_its_own_counts_refute_is_refused(step, disagreements):
    with pytest.raises(gati_jax.InputError, match="do not certify step"):
        gati_jax.Certificate(
            epsilon=0.1, delta=0.05, step=step, n=100, disagreements=disagreements, p_value=0.0, plan_hash="",
            data_fingerprint="",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "table", "message"),
    [
        (ONE, one_cache(0, 0), "table: expected at least one request"),
        (make_plan([[OFF, OFF], [1, 1]]), one_cache(0, 50), "table: expected the candidates c1, got c0"),
        (ONE, dataclasses.replace(one_cache(0, 50), depth=9), "table: expected the plan's sites"),
        (ONE, dataclasses.replace(one_cache(0, 50), sites=(0,)), "table: expected the plan's sites"),
        (
            dataclasses.replace(ONE, rows=np.arange(100, dtype=np.uint64)),
            one_cache(0, 100, first_row=98),
            "certify and select disjoint, got 2 rows",
        ),
    ],
    ids=["no request", "a candidate missing", "another depth", "other sites", "rows of select"],
)
def test_a_table_that_the_plan_cannot_be_certified_on_is_refused(plan, table, message):
    with pytest.raises(gati_jax.InputError, match=message):
        certify(plan, table, 0.1)


def test_one_row_in_a_hundred_may_be_in_both_splits():
    plan = dataclasses.replace(ONE, rows=np.arange(100, dtype=np.uint64))
    assert certify(plan, one_cache(0, 100, first_row=99), 0.1).certified  # real data has as many duplicates


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (ReplaySource(base="y", candidates=(("c0", "1"),), dtype="uint8"), "the base"),
        (ReplaySource(base="x", candidates=(("c0", "2"),), dtype="uint8"), "c0"),
        (ReplaySource(base="x", candidates=(("c0", "1"),), dtype="float32"), "the images' dtype"),
        (ReplaySource(), "the base, the images' dtype, c0"),
    ],
)
def test_a_table_of_other_parameters_is_refused(other, named):
    mine = ReplaySource(base="x", candidates=(("c0", "1"),), dtype="uint8")
    plan, table = dataclasses.replace(ONE, source=mine), one_cache(0, 100)
    assert certify(plan, dataclasses.replace(table, source=mine), 0.1).certified
    with pytest.raises(gati_jax.InputError, match=f"table: expected the parameters and images of the plan.*: {named}$"):
        certify(plan, dataclasses.replace(table, source=other), 0.1)
