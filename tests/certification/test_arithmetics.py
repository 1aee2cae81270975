"""Plans that are certified in further arithmetics at once: a row disagrees if it does in any of them."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax import InputError
from gati_jax.certification import served_bound
from tests.planning.reference import OFF, exact_cdf, make_plan, make_table, random_plan, random_tables, serve

certify_together = functools.partial(gati_jax.certify_together, ledger=None)
SEEDS = st.integers(0, 2**31)
ONE, N = make_plan([[OFF], [1.0]], depth=2), 100
RIGHT = make_table(np.zeros((1, N)), np.ones((1, N)), depth=2)
"""Every row leaves at the cache, and agrees."""


def otherwise(rng, table, share):
    """The same rows in an arithmetic that gives other scores, other classes, and other answers of the base."""
    answers, classes, scores = table.answers.copy(), table.classes.copy(), table.scores.copy()
    for column in (answers, *classes, *scores):
        column[rng.random(len(column)) < share] += 1
    return dataclasses.replace(table, answers=answers, classes=classes, scores=scores)


@settings(deadline=None, max_examples=25)
@given(st.data(), SEEDS, st.lists(st.integers(1, 3), min_size=1, max_size=2))
def test_a_row_that_disagrees_in_any_arithmetic_counts_once(data, seed, ways):
    rng, epsilon = np.random.default_rng(seed), data.draw(st.sampled_from([0.1, 0.3, 0.6]))
    table, _ = random_tables(seed, data.draw(st.integers(1, 3)), 40, agreement=0.95)
    plan, share = random_plan(rng, table), data.draw(st.sampled_from([0.0, 0.02, 0.1]))
    arithmetics = {f"p{i}": [otherwise(rng, table, share) for _ in range(count)] for i, count in enumerate(ways)}
    tables = [table, *(replay for replays in arithmetics.values() for replay in replays)]
    step, wrong = -1, 0
    for i, thresholds in enumerate(plan.path):
        served = [serve(replay, thresholds).classes for replay in tables]
        count = sum(any(classes[row] != table.answers[row] for classes in served) for row in range(len(table)))
        if i > 0 and exact_cdf(count, len(table), epsilon) > 0.3:
            break
        if i > 0 and np.isfinite(thresholds).any():
            step, wrong = i, count
    found = certify_together({"a": (plan, epsilon)}, table, 0.3, arithmetics=arithmetics)["a"]
    assert (found.step, found.disagreements) == (step, wrong)
    assert found.arithmetics == tuple(arithmetics)
    alone = certify_together({"a": (plan, epsilon)}, table, 0.3)["a"]
    assert alone.step >= found.step
    assert alone.arithmetics == ()


WRONG = {
    "at the cache": lambda table: dataclasses.replace(table, classes=table.classes + 1),
    "at the base": lambda table: dataclasses.replace(table, scores=table.scores - 1, answers=table.answers + 1),
}


@pytest.mark.parametrize("where", WRONG)
@pytest.mark.parametrize("way", [0, 1])
def test_what_is_right_in_the_reference_alone_is_not_certified(where, way):
    assert certify_together({"a": (ONE, 0.1)}, RIGHT)["a"].certified
    assert certify_together({"a": (ONE, 0.1)}, RIGHT, arithmetics={"p": [RIGHT, RIGHT]})["a"].certified
    ways = [RIGHT, RIGHT]
    ways[way] = WRONG[where](RIGHT)
    found = certify_together({"a": (ONE, 0.1)}, RIGHT, arithmetics={"p": ways})["a"]
    assert (found.step, found.arithmetics) == (-1, ("p",))
    assert served_bound(found, "fast", None, "p").epsilon is None


def test_an_answer_of_the_base_that_nobody_sees_does_not_count():
    """Every row leaves before it."""
    other = dataclasses.replace(RIGHT, answers=RIGHT.answers + 1)
    assert certify_together({"a": (ONE, 0.1)}, RIGHT, arithmetics={"p": [other]})["a"].disagreements == 0


REFUSED = {
    "other rows": ({"p": [dataclasses.replace(RIGHT, rows=RIGHT.rows + np.uint64(1))]}, "table's rows in their order"),
    "another order": ({"p": [RIGHT, dataclasses.replace(RIGHT, rows=RIGHT.rows[::-1])]}, "table's rows in their order"),
    "no replay": ({"p": [RIGHT], "q": []}, "got none or other rows"),
    "without a cache": ({"p": [RIGHT.take([])]}, "c0"),
    "other caches": ({"p": [dataclasses.replace(RIGHT, sites=(0,))]}, "expected the plan's sites"),
    "an empty name": ({"": [RIGHT]}, "arithmetics: expected up to 16 digests of programs, got ''"),
    "too many": ({f"p{i}": [RIGHT] for i in range(17)}, "arithmetics: expected up to 16 digests"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_is_refused_before_the_rows_are_opened(case, tmp_path):
    arithmetics, message = REFUSED[case]
    ledger = gati_jax.Ledger(tmp_path / "looks.json")
    with pytest.raises(InputError, match=message):
        gati_jax.certify_together({"a": (ONE, 0.1)}, RIGHT, ledger=ledger, arithmetics=arithmetics)
    assert ledger.read().looks == ()


def test_another_arithmetic_is_another_look_and_the_same_ones_are_the_same_look():
    """Else the plan could be certified in the one that happens to pass."""
    ledger, wrong = gati_jax.Ledger(), WRONG["at the cache"](RIGHT)
    certify = functools.partial(gati_jax.certify_together, {"a": (ONE, 0.1)}, RIGHT, ledger=ledger)
    assert not certify(arithmetics={"p": [wrong], "q": [RIGHT]})["a"].certified
    assert certify(arithmetics={"q": [RIGHT], "p": [wrong]})["a"].looks == 1  # the same again
    with pytest.warns(UserWarning, match="look 2 at this certify data"):
        second = certify(arithmetics={"q": [RIGHT]})["a"]
    assert (second.looks, second.certified) == (2, True)
    assert exact_cdf(0, N, 0.1) <= second.level < 0.05 / 4


def test_digests_in_a_certificate_are_checked():
    certificate = certify_together({"a": (ONE, 0.1)}, RIGHT)["a"]
    for digests in (("",), ("a b",), ("x" * 65,), ("p",) * 17):
        with pytest.raises(InputError, match="arithmetics: expected up to 16 digests"):
            dataclasses.replace(certificate, arithmetics=digests)
