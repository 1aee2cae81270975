"""Several plans in one look: each pays for all, and each can be checked by itself."""

import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax import certify_together
from gati_jax.certification import tightest

OFF = np.inf


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 3))
def test_each_plan_is_certified_as_alone_at_its_share_of_delta(random_tables, make_plan, data, seed, plans, looks):
    rng = np.random.default_rng(seed)
    table, _ = random_tables(seed, 2, 60, agreement=0.95)
    delta = data.draw(st.sampled_from([0.1, 0.5]))
    named = {}
    for i in range(plans):
        path = rng.choice([0, 1, 2, 3, OFF], (4, 2))
        path[0] = OFF
        plan = make_plan(path, sites=table.sites, depth=table.depth)
        named[f"p{i}"] = (plan, data.draw(st.sampled_from([0.1, 0.3])))
    with pytest.warns() if looks > 1 else contextlib.nullcontext():
        together = certify_together(named, table, delta, looks=looks)
    assert list(together) == list(named)
    for name, (plan, epsilon) in named.items():
        alone = gati_jax.certify(plan, table, epsilon, delta / plans / looks)
        one = together[name]
        assert (one.step, one.disagreements, one.p_value) == (alone.step, alone.disagreements, alone.p_value)
        assert (one.name, one.plans, one.looks, one.delta) == (name, plans, looks, delta)
        assert one.level == pytest.approx(delta / plans / looks)
        assert one.stays_off == alone.stays_off


def passing(make_table, make_plan, exact_cdf, n=100, epsilon=0.1, delta=0.1):
    """A plan and a table that pass at delta but not at delta / 2."""
    wrong = max(k for k in range(n) if exact_cdf(k, n, epsilon) <= delta)
    assert exact_cdf(wrong, n, epsilon) > delta / 2
    return make_plan([[OFF], [1.0]], depth=2), make_table([np.arange(n) < wrong], np.ones((1, n)), depth=2)


def test_a_plan_pays_for_its_company(make_table, make_plan, exact_cdf):
    plan, table = passing(make_table, make_plan, exact_cdf)
    alone = gati_jax.certify(plan, table, 0.1, 0.1)
    assert alone.certified
    assert certify_together({"default": (plan, 0.1)}, table, 0.1) == {"default": alone}
    two = certify_together({"tight": (plan, 0.1), "loose": (plan, 0.2)}, table, 0.1)
    assert (two["tight"].certified, two["loose"].certified) == (False, True)
    with pytest.raises(gati_jax.InputError, match="do not certify step 1"):
        dataclasses.replace(alone, plans=2)  # nor can the same counts claim to have had company


def test_several_plans_are_one_look(make_table, make_plan, exact_cdf):
    plan, table = passing(make_table, make_plan, exact_cdf)
    with pytest.warns(UserWarning, match="look 2") as warned:
        certify_together({"a": (plan, 0.1), "b": (plan, 0.2), "c": (plan, 0.3)}, table, looks=2)
    assert len(warned) == 1


def test_the_tightest_certified_plan_comes_first(make_table, make_plan, exact_cdf):
    plan, table = passing(make_table, make_plan, exact_cdf)
    epsilons = {"loosest": 0.4, "tight": 0.01, "loose": 0.3}
    certificates = certify_together({name: (plan, e) for name, e in epsilons.items()}, table, 0.1)
    assert tightest(certificates) == "loose"
    assert tightest({name: dataclasses.replace(c, step=-1) for name, c in certificates.items()}) == "tight"
    with pytest.raises(gati_jax.InputError, match="certificates: expected at least one"):
        tightest({})


def test_no_plans_certify_nothing(make_table):
    with pytest.raises(gati_jax.InputError, match="plans: expected at least one"):
        certify_together({}, make_table(np.zeros((1, 9)), np.ones((1, 9))))


@pytest.mark.parametrize("name", ["", "a b", "x" * 41, "a/b", "<b>", "a\n"])
def test_a_name_is_one_plain_word(make_table, make_plan, name):
    table = make_table(np.zeros((1, 99)), np.ones((1, 99)), depth=2)
    plan = make_plan([[OFF], [1.0]], depth=2)
    with pytest.raises(gati_jax.InputError, match="name: expected"):
        certify_together({name: (plan, 0.1)}, table)
    with pytest.raises(gati_jax.InputError, match="name: expected"):
        gati_jax.certify_conditional(plan, table, 0.1, name=name)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, float("nan")])
def test_every_epsilon_is_checked(make_table, make_plan, epsilon):
    table = make_table(np.zeros((1, 99)), np.ones((1, 99)), depth=2)
    plan = make_plan([[OFF], [1.0]], depth=2)
    with pytest.raises(gati_jax.InputError, match="epsilon: expected"):
        certify_together({"a": (plan, 0.1), "b": (plan, epsilon)}, table)
