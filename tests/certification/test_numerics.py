"""Numerics with certificates of their own: each walks the path by itself, and all share delta."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import binom

import gati_jax
from gati_jax import InputError, Ledger, Plan, ReplayTable
from gati_jax.certification import certify_numerics, certify_together

DIGEST = "ab" * 8


def table_of(answers, classes, scores) -> ReplayTable:
    n = len(answers)
    return ReplayTable(
        names=("a",), sites=(1,), depth=2, answers=np.asarray(answers, np.int32),
        classes=np.asarray([classes], np.int32), scores=np.asarray([scores], np.float32),
        rows=np.arange(1, n + 1, dtype=np.uint64),
    )  # fmt: skip


PATH = np.array([[np.inf], [3.0], [2.0], [1.0]], np.float32)
PLAN = Plan(
    names=("a",), sites=(1,), depth=2, path=PATH, disagreement=np.zeros(4), mean_ms=np.array([4.0, 3.0, 2.0, 1.0]), n=1,
    rows=np.array([10**9], np.uint64),
)  # fmt: skip


def drawn(seed: int, n: int = 400):
    """The reference, and two ways of other numerics, in which the base itself is sometimes wrong."""
    rng = np.random.default_rng(seed)
    answers, scores = rng.integers(0, 5, n), rng.uniform(0.5, 4, n)
    wrong = rng.random(n) < 0.1 / scores
    reference = table_of(answers, np.where(wrong, (answers + 1) % 5, answers), scores)
    ways = []
    for _ in range(2):
        base = np.where(rng.random(n) < 0.01, (answers + 2) % 5, answers)
        noisy = scores + rng.normal(scale=0.1, size=n)
        ways.append(table_of(base, reference.classes[0], noisy))
    return reference, ways


def step_by_hand(replays, answers, epsilon, level):
    """The last step before the first that fails, and how many rows disagree there."""
    found = (-1, 0)
    for step, (threshold,) in enumerate(PATH[1:], 1):
        wrong = np.zeros(len(answers), bool)
        for replay in replays:
            given = np.where(replay.scores[0] >= threshold, replay.classes[0], replay.answers)
            wrong |= given != answers
        if binom.cdf(wrong.sum(), len(answers), epsilon) > level:
            return found
        found = (step, int(wrong.sum()))
    return found


@pytest.mark.parametrize("epsilon", [0.04, 0.06, 0.08, 0.12])
@pytest.mark.parametrize("seed", range(3))
def test_every_numerics_walks_by_itself_at_its_share_of_delta(seed, epsilon):
    reference, ways = drawn(seed)
    plans = {"a": (PLAN, epsilon), "b": (PLAN, 2 * epsilon)}
    found = certify_numerics(plans, reference, {"bfloat16": (DIGEST, ways)}, 0.2, ledger=None)
    assert list(found) == ["reference", "bfloat16"]
    for numerics, replays in (("reference", [reference]), ("bfloat16", ways)):
        for name, (_, its) in plans.items():
            one = found[numerics][name]
            expected = step_by_hand(replays, reference.answers, its, 0.2 / 4)
            assert (one.step, one.disagreements) == expected
            assert (one.plans, one.numerics, one.name) == (4, numerics, name)
    assert found["reference"]["a"].arithmetics == ()
    assert found["bfloat16"]["a"].arithmetics == (DIGEST,)
    assert found["bfloat16"]["a"].accuracy_gap is None


def test_without_others_it_is_certify_together():
    reference, _ = drawn(0)
    plans = {"a": (PLAN, 0.1)}
    assert certify_numerics(plans, reference, {}, ledger=None)["reference"] == certify_together(
        plans, reference, ledger=None
    )


def test_other_numerics_are_another_look():
    reference, ways = drawn(0)
    wrong = [dataclasses.replace(ways[0], answers=(reference.answers + 1) % 5)]
    none = dataclasses.replace(reference, classes=(reference.classes + 1) % 5)
    ledger, plans = Ledger(), {"a": (PLAN, 0.1)}
    first = certify_numerics(plans, none, {"bfloat16": (DIGEST, wrong)}, ledger=ledger)
    assert not any(one.certified for by_plan in first.values() for one in by_plan.values())
    assert first["bfloat16"]["a"].looks == 1
    again = certify_numerics(plans, none, {"bfloat16": (DIGEST, wrong)}, ledger=ledger)
    assert again == first
    with pytest.warns(UserWarning, match="look 2"):
        assert certify_together(plans, none, ledger=ledger)["a"].looks == 2


REFUSED = {
    "the reference": ("reference", DIGEST, "ways", "numerics: expected others than the reference"),
    "no replays": ("bfloat16", DIGEST, "none", "arithmetics: expected replays of the table's rows in their order"),
    "no digest": ("bfloat16", "", "ways", "arithmetics: expected up to 16 digests"),
    "other rows": ("bfloat16", DIGEST, "others", "arithmetics: expected replays of the table's rows in their order"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_certified_is_refused_before_the_rows_are_opened(case):
    numerics, digest, which, message = REFUSED[case]
    reference, ways = drawn(0)
    replays = {"ways": ways, "none": [], "others": [dataclasses.replace(ways[0], rows=ways[0].rows + 1)]}[which]
    ledger = Ledger()
    with pytest.raises(InputError, match=message):
        gati_jax.certify_numerics({"a": (PLAN, 0.1)}, reference, {numerics: (digest, replays)}, ledger=ledger)
    assert ledger.read().looks == ()
