"""Attacks by rows that come in groups: many rows of few recordings certify no more than the recordings do."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gati_jax
from gati_jax import InputError, Ledger
from gati_jax.bundle.manifest import Certificates
from gati_jax.certification import GroupCounts, p_value, served_bound
from gati_jax.certification.betting import mean_p_value
from tests.planning.reference import OFF, make_plan, make_table

EPSILON, DELTA, GROUPS, ROWS = 0.1, 0.1, 60, 12
PLAN = make_plan([[OFF], [1.0]], depth=2)
NAMES = np.repeat(np.arange(GROUPS), ROWS)


def table(wrong):
    """All requests hit; those of ``wrong`` disagree."""
    return make_table([np.asarray(wrong)], np.ones((1, len(wrong))), depth=2)


def certify(wrong, **arguments):
    return gati_jax.certify(PLAN, table(wrong), EPSILON, DELTA, ledger=None, **arguments)


def test_groups_that_disagree_as_a_whole_are_certified_falsely_by_row_and_not_by_group():
    rng, false = np.random.default_rng(0), {"rows": 0, "mean": 0, "bad": 0}
    for _ in range(150):
        wrong = np.repeat(rng.random(GROUPS) < EPSILON, ROWS)
        false["rows"] += certify(wrong).certified
        false["mean"] += certify(wrong, groups=NAMES).certified
        false["bad"] += certify(wrong, groups=NAMES, group_tolerance=0.0).certified
    most = gati_jax.certification.largest_passing(150, DELTA, 0.999) + 1
    assert false["mean"] <= most
    assert false["bad"] <= most
    assert false["rows"] > most, "by row, the promise is broken"


def test_bad_groups_are_counted_exactly():
    for bad in range(8):
        wrong = (bad > NAMES) & (np.arange(len(NAMES)) % 4 == 0)  # a quarter of the rows of each
        certificate = certify(wrong, groups=NAMES.astype(str), group_tolerance=0.2)
        p = p_value(bad, GROUPS, EPSILON)
        assert certificate.certified == (p <= DELTA)
        assert certificate.groups == GroupCounts(n=GROUPS, bad=bad if p <= DELTA else 0, tolerance=0.2)
        assert certify(wrong, groups=NAMES, group_tolerance=0.25).certified, "a quarter is tolerated then"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.01, 0.5), st.floats(0, 1), st.randoms())
def test_the_p_value_is_one_over_a_fair_capital(losses, mean, expected, random):
    p = mean_p_value(np.array(losses), mean, expected)
    shuffled = random.sample(losses, len(losses))
    assert p == pytest.approx(mean_p_value(np.array(shuffled), mean, expected), rel=1e-9)
    capitals = []
    for kept in (min(expected / mean, 0.9), 0.1):
        stake = (1 - max(kept, 1e-9)) / (1 - mean)
        assert 0 <= (1 - mean) * (1 + stake * mean) + mean * (1 - stake * (1 - mean)) <= 1 + 1e-9  # the worst mean
        capitals.append(math.prod(1 + stake * (mean - loss) for loss in losses))
    assert p == pytest.approx(min(1.0, 2 / sum(capitals)), rel=1e-6)


def test_groups_that_are_alike_need_far_fewer_than_by_counting():
    wrong = np.tile(np.arange(100) < 5, GROUPS)  # 5 of 100 rows in every group
    assert certify(wrong, groups=np.repeat(np.arange(GROUPS), 100)).certified
    assert not certify(np.arange(GROUPS) < EPSILON * GROUPS / 2).certified  # a twentieth of as many rows


def test_another_grouping_of_the_same_rows_is_another_look_and_other_names_are_not():
    ledger, wrong = Ledger(), np.arange(len(NAMES)) % 3 == 0
    looks = []
    named = NAMES.astype(str).astype(object)  # a column of a data frame
    for groups, tolerance in (
        (NAMES, None),
        (-NAMES, None),
        (named, None),
        (NAMES // 2, None),
        (NAMES, 0.2),
        (None, None),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = gati_jax.certify(
                PLAN, table(wrong), EPSILON, DELTA, ledger=ledger, groups=groups, group_tolerance=tolerance
            )
        looks.append(one.looks)
    assert looks == [1, 1, 1, 2, 3, 4]


def test_rows_that_look_grouped_are_warned_of():
    rng = np.random.default_rng(2)
    sure = np.repeat(rng.normal(size=GROUPS), ROWS) + 0.5 * rng.normal(size=GROUPS * ROWS)

    def warned(scores, classes=None):
        n = len(scores)
        made = make_table([np.zeros(n, bool)], scores[None], depth=2)
        if classes is not None:
            made = dataclasses.replace(made, answers=classes, classes=classes[None])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gati_jax.certify(PLAN, made, EPSILON, DELTA, ledger=None)
        return any("groups" in str(one.message) for one in caught)

    assert warned(sure)
    assert not warned(rng.permutation(sure))
    by_class = np.sort(rng.integers(5, size=len(sure)))
    assert not warned(rng.normal(size=len(sure)) + 3 * by_class, by_class)  # sorted by class, which is no group


@pytest.mark.parametrize(
    ("tolerance", "told"),
    [
        (None, "with it 3.33% disagree in the mean over 60 groups, 10.00% is allowed; about "),
        (0.1, "with it 13.33% of 60 groups are bad, 10.00% is allowed; no number of groups would open it"),
    ],
)
def test_why_a_cache_stays_off_is_told_in_groups(tolerance, told):
    wrong = (NAMES < 8) & (np.arange(len(NAMES)) % 4 == 0)
    failed = gati_jax.certify(
        PLAN, table(wrong), EPSILON, 1e-6, ledger=Ledger(), reveal=True, groups=NAMES, group_tolerance=tolerance
    )
    assert told in failed.stays_off[0]


@pytest.mark.parametrize("epsilon", [0.0125, 0.0004, 0.123456])
def test_a_promise_is_not_rounded(epsilon):
    certificate = gati_jax.certify(PLAN, table([False] * 20_000), epsilon, DELTA, ledger=None)
    assert float(certificate.promise.split()[2].rstrip("%")) / 100 == pytest.approx(epsilon, rel=1e-9)


def test_what_a_certificate_by_group_promises():
    certificate = certify(np.zeros(len(NAMES), bool), groups=NAMES, group_tolerance=0.2)
    assert "groups" in certificate.promise
    assert certificate.mean_bound == pytest.approx(EPSILON + (1 - EPSILON) * 0.2)
    assert certificate.accuracy_gap is None  # its bound is for independent rows
    assert served_bound(certificate, "reference", None).epsilon == certificate.mean_bound
    assert served_bound(certificate, "fast", None).epsilon is None
    text = Certificates(certificates=(certificate,)).model_dump_json()
    assert Certificates.model_validate_json(text).certificates == (certificate,)
    with pytest.raises(InputError, match="expected them with a method by groups alone"):
        dataclasses.replace(certificate, groups=None)
    with pytest.raises(InputError, match="do not certify"):
        dataclasses.replace(certificate, groups=GroupCounts(n=GROUPS, bad=GROUPS, tolerance=0.2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": NAMES[1:]}, r"groups: expected a whole number or a name for each of 720 rows"),
        ({"groups": NAMES.astype(float)}, r"groups: .*float64"),
        ({"groups": [None] * len(NAMES)}, r"groups: .*object"),
        ({"groups": [("a",), ("b", 1)] * (len(NAMES) // 2)}, r"groups: .*names of several lengths"),
        ({"group_tolerance": 0.1}, r"group_tolerance: expected groups with it"),
        ({"groups": NAMES, "group_tolerance": 1.0}, r"group_tolerance: expected a share in \[0, 1\)"),
    ],
)
def test_impossible_groups_are_refused_before_the_look(arguments, message):
    ledger = Ledger()
    with pytest.raises(InputError, match=message):
        gati_jax.certify(PLAN, table(np.zeros(len(NAMES), bool)), EPSILON, DELTA, ledger=ledger, **arguments)
    assert not ledger.read().looks


def test_several_plans_of_groups_share_delta_in_one_look():
    wrong, level = NAMES < 1, DELTA / 2
    plans = {"5%": (PLAN, EPSILON / 2), "10%": (PLAN, EPSILON)}
    for tolerance in (None, 0.2):
        together = gati_jax.certify_together(
            plans, table(wrong), DELTA, ledger=None, groups=NAMES, group_tolerance=tolerance
        )
        for name, (_, epsilon) in plans.items():
            alone = gati_jax.certify(
                PLAN, table(wrong), epsilon, level, ledger=None, groups=NAMES, group_tolerance=tolerance
            )
            assert (together[name].step, together[name].method) == (alone.step, alone.method)
            assert together[name].level == level
    with pytest.raises(InputError, match="group_tolerance: expected groups with it"):
        gati_jax.certify_together(plans, table(wrong), DELTA, ledger=None, group_tolerance=0.1)


def test_a_group_is_wrong_where_another_arithmetic_is():
    right, elsewhere = table(np.zeros(len(NAMES), bool)), table(NAMES % 2 == 0)
    arguments = {"ledger": None, "groups": NAMES}
    plans, digest = {"default": (PLAN, EPSILON)}, "0" * 32
    assert gati_jax.certify_together(plans, right, DELTA, **arguments)["default"].certified
    both = {digest: [elsewhere]}
    assert not gati_jax.certify_together(plans, right, DELTA, **arguments, arithmetics=both)["default"].certified
