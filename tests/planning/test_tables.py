"""Replayed cascades against a per-request loop, and what the tables refuse."""

import dataclasses
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax.planning import CostTable, ReplayTable, cascade_ms, replay_plan
from tests.planning.reference import make_costs, make_table, random_tables, serve

SEEDS = st.integers(0, 2**31)
SMALL = settings(deadline=None, max_examples=60)


def draw_thresholds(seed, candidates):
    """Between, at, below and above the scores 0 .. 3, and off."""
    return np.random.default_rng(seed).choice([-1, 0, 0.5, 1, 2, 3, 4, np.inf], candidates).astype(np.float32)


@SMALL
@given(SEEDS, st.integers(0, 4), st.integers(1, 20))
def test_replay_plan_is_the_loop(seed, candidates, n):
    table, costs = random_tables(seed, candidates, n)
    thresholds = draw_thresholds(seed, candidates)
    expected, outcome = serve(table, thresholds, costs), replay_plan(table, thresholds)
    assert outcome.exits.tolist() == expected.exits
    assert outcome.classes.tolist() == expected.classes
    assert outcome.disagrees.tolist() == [c != a for c, a in zip(expected.classes, table.answers, strict=True)]
    assert outcome.disagreement == pytest.approx(expected.wrong / n)


@SMALL
@given(SEEDS, st.integers(0, 4), st.integers(1, 20))
def test_cascade_ms_is_the_loop(seed, candidates, n):
    table, costs = random_tables(seed, candidates, n)
    thresholds = draw_thresholds(seed, candidates)
    assert cascade_ms(table, thresholds, costs) == pytest.approx(serve(table, thresholds, costs).mean_ms)


def test_a_threshold_below_every_score_costs_its_lookup():
    table, costs = make_table([[0, 0]], [[1.0, 2.0]], depth=2), make_costs([1, 1], [0.5])
    always = np.array([-np.inf], np.float32)
    assert replay_plan(table, always).exits.tolist() == [0, 0]
    assert serve(table, always, costs).mean_ms == 1.5
    assert cascade_ms(table, always, costs) == pytest.approx(1.5)


@pytest.mark.parametrize("score", [np.nan, -np.inf])
def test_a_score_that_says_nothing_never_hits(score):
    table = make_table([[0, 0]], [[score, 1.0]], depth=2)
    assert replay_plan(table, np.array([-5.0], np.float32)).exits.tolist() == [1, 0]


@SMALL
@given(SEEDS, st.integers(1, 4), st.integers(1, 20))
def test_an_infinite_score_hits_whatever_is_on_and_nothing_that_is_off(seed, candidates, n):
    rng = np.random.default_rng(seed)
    scores = rng.choice([np.nan, -np.inf, 0, 1, np.inf], (candidates, n))
    table = make_table(rng.integers(2, size=(candidates, n)), scores, depth=candidates + 1)
    thresholds = rng.choice([0.0, 0.5, float(np.finfo(np.float32).max), np.inf], candidates).astype(np.float32)
    outcome = replay_plan(table, thresholds)
    for request, exit_ in enumerate(outcome.exits):
        hits = [c for c in range(candidates) if thresholds[c] < np.inf and scores[c, request] >= thresholds[c]]
        assert exit_ == min(hits, default=candidates)
    assert outcome.classes.tolist() == serve(table, thresholds).classes


@pytest.mark.parametrize(("double", "single"), [(1e300, 3.4028235e38), (-1e300, -3.4028235e38), (0.1, 0.1)])
def test_scores_of_double_precision_stay_finite(double, single):
    one = np.zeros(1, int)
    table = ReplayTable(
        names=("c",), sites=(1,), depth=2, answers=one, classes=one[None], scores=np.array([[double]]),
        rows=one.astype(np.uint64),
    )  # fmt: skip
    assert (table.scores.dtype, table.scores.item()) == (np.float32, np.float32(single))


@SMALL
@given(SEEDS, st.integers(1, 4), st.integers(1, 10))
def test_take_keeps_columns_together(seed, candidates, n):
    table, _ = random_tables(seed, candidates, n)
    names = np.random.default_rng(seed).permutation(table.names)[: 1 + seed % candidates].tolist()
    taken = table.take(names)
    assert taken.names == tuple(names)
    for i, name in enumerate(names):
        j = table.names.index(name)
        assert taken.sites[i] == table.sites[j]
        np.testing.assert_array_equal(taken.classes[i], table.classes[j])
        np.testing.assert_array_equal(taken.scores[i], table.scores[j])
        np.testing.assert_array_equal(taken.agrees[i], table.classes[j] == table.answers)


def test_take_names_the_missing_candidate():
    with pytest.raises(gati_jax.InputError, match=r"table: expected the candidates c9, got c0"):
        make_table([[0]], [[1.0]]).take(["c0", "c9"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("c0", "c0")}, "names: expected .* no name twice"),
        ({"sites": (1,)}, "names: expected a site for each"),
        ({"names": ("c0", "c1", "c2"), "sites": (1, 2, 3)}, r"expected shape .* = \[3, 2\], got \[2, 2\]"),
    ],
    ids=["name twice", "too few sites", "too many names"],
)
def test_replay_table_refuses(change, message):
    table = make_table([[0, 1], [0, 0]], [[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(gati_jax.InputError, match=message):
        dataclasses.replace(table, **change)


@pytest.mark.parametrize("field", ["scores", "classes", "rows", "labels"])
def test_replay_table_refuses_columns_of_another_length(field):
    # In a process of its own: here, beartype would step in before the library's own check.
    script = f"""
        import numpy as np
        from gati_jax.planning import ReplayTable
        from gati_jax.errors import InputError
        table = dict(names=("c",), sites=(1,), depth=2, answers=np.zeros(3, int), classes=np.zeros((1, 3), int),
                     scores=np.zeros((1, 3), np.float32), rows=np.arange(3, dtype=np.uint64), labels=np.zeros(3, int))
        ReplayTable(**table)
        try:
            ReplayTable(**table | {{"{field}": table["{field}"][..., :2]}})
        except InputError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{field}: expected")


def test_planning_never_knows_jax():
    script = "import sys, gati_jax.planning; print(sorted({'jax', 'flax', 'optax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("blocks_ms", "lookup_ms"),
    [((), {}), ((1.0, -0.1), {}), ((1.0,), {"c": -1e-9}), ((1.0, np.nan), {"c": 0.1}), ((1.0,), {"c": np.nan})],
    ids=["no blocks", "negative block", "negative lookup", "NaN block", "NaN lookup"],
)
def test_cost_table_refuses(blocks_ms, lookup_ms):
    with pytest.raises(gati_jax.InputError, match="costs: expected non-negative milliseconds"):
        CostTable(device="made-up", batch=1, blocks_ms=blocks_ms, lookup_ms=lookup_ms)


def test_cost_table_sums_blocks():
    costs = CostTable(device="made-up", batch=1, blocks_ms=(1.0, 2.0, 4.0), lookup_ms={})
    assert [costs.until(site) for site in range(4)] == [0, 1, 3, 7]
    assert costs.full_ms == 7
