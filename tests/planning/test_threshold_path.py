"""Plans and their paths against the per-request loop and against brute force over all threshold vectors."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax.certification import largest_passing
from gati_jax.planning import ReplaySource, ReplayTable, threshold_path
from tests.planning.reference import OFF, make_costs, make_plan, make_table, random_tables, serve

SEEDS = st.integers(0, 2**31)
SMALL = settings(deadline=None, max_examples=12)
EPSILONS = st.sampled_from([0.05, 0.2, 0.35, 0.5])


def brute_force(table, costs, epsilon):
    """The least mean time of all threshold vectors that disagree on at most epsilon of requests."""
    levels = [[*np.unique(scores), OFF] for scores in table.scores]
    outcomes = [serve(table, thresholds, costs) for thresholds in itertools.product(*levels)]
    return min(o.mean_ms for o in outcomes if o.wrong / len(table) <= epsilon)


@SMALL
@given(SEEDS, st.integers(1, 3), st.integers(1, 9), EPSILONS)
def test_every_step_reports_what_the_loop_finds_and_none_beats_brute_force(seed, candidates, n, epsilon):
    table, costs = random_tables(seed, candidates, n)
    plan = gati_jax.plan(table, costs, epsilon=epsilon, delta=0.5)
    kept = table.take(plan.names)
    assert plan.path.shape == (len(plan.mean_ms), len(plan.names))
    for thresholds, disagreement, mean_ms in zip(plan.path, plan.disagreement, plan.mean_ms, strict=True):
        expected = serve(kept, thresholds, costs)
        assert disagreement == pytest.approx(expected.wrong / n)
        assert mean_ms == pytest.approx(expected.mean_ms)
    assert brute_force(table, costs, epsilon) - 1e-9 <= plan.mean_ms.min() <= costs.full_ms + 1e-9


@SMALL
@given(SEEDS, st.integers(1, 3), st.integers(20, 60), EPSILONS)
def test_no_step_can_be_split(seed, candidates, n, epsilon):
    """Whatever lies between two steps is slower than the first of them, or wrong as often as the second."""
    table, costs = random_tables(seed, candidates, n, levels=50)
    plan = gati_jax.plan(table, costs, epsilon=epsilon, delta=0.5)
    kept = table.take(plan.names)
    for before, after in itertools.pairwise(plan.path):
        (cache,) = np.flatnonzero(before != after)
        first, second = (serve(kept, thresholds, costs) for thresholds in (before, after))
        scores = np.unique(kept.scores[cache])
        for score in scores[(after[cache] < scores) & (scores < before[cache])]:
            halfway = after.copy()
            halfway[cache] = score
            found = serve(kept, halfway, costs)
            assert found.mean_ms >= first.mean_ms - 1e-9 or not first.wrong <= found.wrong < second.wrong


@SMALL
@given(SEEDS, st.integers(1, 4), st.integers(1, 100), EPSILONS)
def test_path_begins_with_the_bare_base_and_only_ever_opens(seed, candidates, n, epsilon):
    table, costs = random_tables(seed, candidates, n, levels=50)
    plan = gati_jax.plan(table, costs, epsilon=epsilon, delta=0.5)
    assert np.isposinf(plan.path[0]).all()
    assert plan.disagreement[0] == 0
    assert (plan.disagreement <= epsilon).all()
    pairs = list(itertools.pairwise(plan.path))
    assert all(((after <= before).all() and (after < before).any()) for before, after in pairs)
    assert (np.diff(plan.mean_ms) < 0).all()
    assert np.isfinite(plan.path[-1]).all()  # a cache that never opens is no part of the plan
    assert list(plan.sites) == sorted(plan.sites)


@SMALL
@given(SEEDS, st.integers(1, 12), EPSILONS)
def test_alone_a_candidate_ends_where_brute_force_does(seed, n, epsilon):
    table, costs = random_tables(seed, 1, n)
    delta = 1e-9  # no count passes: caches are chosen by what they save without a disagreement
    assert largest_passing(n, epsilon, delta) == -1
    plan = gati_jax.plan(table, costs, epsilon=epsilon, delta=delta)
    if plan.names:
        assert plan.mean_ms[-1] == pytest.approx(brute_force(table, costs, epsilon))
    else:
        assert brute_force(table, costs, 0.0) == pytest.approx(costs.full_ms)


@pytest.mark.parametrize("certain", [70, 101, 133])
def test_the_one_threshold_between_two_scores_is_found(certain):
    # 200 requests are more than there may be thresholds, but two scores are two thresholds.
    n = 200
    sure = np.arange(n) < certain
    table, costs = make_table([~sure], [sure], depth=2), make_costs([1, 1], [0.1])
    plan = gati_jax.plan(table, costs, epsilon=0.05)
    assert plan.mean_ms[-1] == pytest.approx(brute_force(table, costs, 0.05))


def test_requests_are_counted_jointly():
    # Both caches know the same half: the later one adds nothing to the earlier.
    half = [[1, 1, 1, 1, 0, 0, 0, 0]] * 2
    wrong = [[0, 0, 0, 0, 1, 1, 1, 1]] * 2
    plan = gati_jax.plan(make_table(wrong, half, depth=4), make_costs([1] * 4, [0.1, 0.1]), epsilon=0.1)
    assert plan.names == ("c0",)
    assert plan.mean_ms[-1] == pytest.approx((1.1 + 4.1) / 2)


@SMALL
@given(SEEDS, st.integers(0, 3), EPSILONS)
def test_max_sites_is_respected(seed, max_sites, epsilon):
    table, costs = random_tables(seed, 4, 40, levels=20)
    plan = gati_jax.plan(table, costs, epsilon=epsilon, delta=0.5, max_sites=max_sites)
    assert len(plan.names) <= max_sites


def test_max_sites_keeps_the_cache_that_saves_most():
    # c0 at site 1 knows half of the requests and saves 3 blocks of each; c1 at site 3 the other half, and 1 block.
    table = make_table([[0] * 4 + [1] * 4, [1] * 4 + [0] * 4], [[1] * 4 + [0] * 4, [0] * 4 + [1] * 4], sites=(1, 3))
    costs = make_costs([1] * 4, [0.1, 0.1])
    assert gati_jax.plan(table, costs, epsilon=0.1).names == ("c0", "c1")
    assert gati_jax.plan(table, costs, epsilon=0.1, max_sites=1).names == ("c0",)


@SMALL
@given(SEEDS, st.integers(1, 30))
def test_a_lookup_that_takes_as_long_as_all_blocks_behind_it_is_never_chosen(seed, n):
    table, costs = random_tables(seed, 3, n)
    slow = seed % 3
    lookups = [costs.lookup_ms[name] for name in table.names]
    lookups[slow] = sum(costs.blocks_ms[table.sites[slow] :])
    plan = gati_jax.plan(table, make_costs(costs.blocks_ms, lookups), epsilon=0.5, delta=0.5)
    assert f"c{slow}" not in plan.names


def test_the_plan_is_empty_where_no_cache_saves_time():
    table, costs = make_table([[0] * 5] * 2, [[1.0] * 5] * 2, depth=3), make_costs([1, 1, 1], [2, 1])
    plan = gati_jax.plan(table, costs, epsilon=0.1)
    assert (plan.names, plan.sites, plan.path.shape) == ((), (), (1, 0))
    assert (plan.mean_ms.tolist(), plan.disagreement.tolist()) == ([3.0], [0.0])
    assert plan.thresholds(-1).shape == (0,)


@SMALL
@given(SEEDS)
def test_the_order_of_candidates_does_not_matter(seed):
    table, costs = random_tables(seed, 3, 24, levels=1000)
    shuffled = table.take(np.random.default_rng(seed).permutation(table.names).tolist())
    # Where a search that runs out of time ends depends on the machine, so these have no limit.
    one, other = (gati_jax.plan(t, costs, epsilon=0.2, delta=0.5, seconds=np.inf) for t in (table, shuffled))
    assert one.hash == other.hash


def test_a_plan_has_one_cache_at_a_site():
    # Each head knows another half of the requests, so both together are the fastest on paper; a cascade's sites rise.
    halves = np.repeat([[1, 0], [0, 1]], 10, axis=1)
    table = make_table(1 - halves, halves, sites=(1, 1), depth=5)
    plan = gati_jax.plan(table, make_costs([1] * 5, [0.1, 0.1]), epsilon=0.1)
    assert plan.sites == (1,)


def test_planning_on_double_precision_scores_ends(monkeypatch):
    # 0.1 as float32 lies above the double: a threshold must not be lowered to where it already is, for ever. The last
    # place where the walk goes on is counted, not timed.
    one = np.zeros(4, int)
    table = ReplayTable(
        names=("c0",), sites=(1,), depth=2, answers=one, classes=one[None], scores=np.array([[0.1, 0.2, 0.3, 0.7]]),
        rows=np.arange(4, dtype=np.uint64),
    )  # fmt: skip
    lowered = 0

    def counted(*args):
        nonlocal lowered
        lowered += 1
        assert lowered <= 100
        return best_move(*args)

    best_move = threshold_path._best_move
    monkeypatch.setattr(threshold_path, "_best_move", counted)
    assert gati_jax.plan(table, make_costs([1, 1], [0.1]), epsilon=0.1).mean_ms[-1] == pytest.approx(1.1)
    assert lowered


@pytest.mark.parametrize("odd", [np.nan, -OFF])
def test_the_lowest_threshold_is_the_lowest_score_that_can_hit(odd):
    table = make_table([[0] * 4], [[3, 2, 1, odd]], depth=2)
    plan = gati_jax.plan(table, make_costs([1, 1], [0.1]), epsilon=0.1)
    assert plan.path[-1].tolist() == [1.0]


def test_the_hash_changes_with_every_threshold():
    path = np.array([[OFF, OFF], [2.0, OFF], [2.0, 1.0]], np.float32)
    plan = make_plan(path)
    hashes = {plan.hash}
    for index in np.ndindex(path.shape):
        if index[0] == 0:
            continue  # the bare base
        changed = path.copy()
        changed[index] = np.nextafter(np.float32(min(changed[index], 9.0)), np.float32(-9))
        hashes.add(dataclasses.replace(plan, path=changed).hash)
    for change in ({"names": ("c0", "c2")}, {"sites": (1, 3)}, {"depth": 9}):
        hashes.add(dataclasses.replace(plan, **change).hash)
    assert len(hashes) == 1 + path[1:].size + 3
    assert dataclasses.replace(plan, path=path.copy()).hash == plan.hash


def test_thresholds_of_no_step_are_off():
    plan = make_plan([[OFF, OFF], [2.0, OFF]])
    assert plan.thresholds(1).tolist() == [2.0, OFF]
    assert plan.thresholds(-1).tolist() == [OFF, OFF]


def test_the_hash_of_a_stored_plan_stays():
    # Written down with the first format: certificates of older bundles name their plans by it.
    source = ReplaySource(base="x", candidates=(("a", "1"), ("b", "2")), dtype="uint8")
    plan = dataclasses.replace(make_plan([[OFF, OFF], [1.5, OFF]], depth=4), names=("a", "b"), source=source)
    assert plan.hash == "60d8f6061accb8ec6ea8b5f87a4fb354aef3604dde001d3484843cfb0f6b1eb5"


def test_a_plan_holds_as_many_digests_as_it_was_composed_on():
    plan = make_plan([[OFF], [1.0]])
    for rows in (plan.rows[:0], plan.rows[1:], plan.rows[None]):
        with pytest.raises(Exception, match="rows"):  # beartype may be the first to see the last
            dataclasses.replace(plan, rows=rows)
    with pytest.raises(gati_jax.InputError, match="rows: expected the digests of n = 100 requests"):
        dataclasses.replace(plan, rows=plan.rows[:0])


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_plan_refuses_rates_outside_0_to_1(value):
    table, costs = random_tables(0, 2, 10)
    with pytest.raises(gati_jax.InputError, match=f"epsilon: expected a number between 0 and 1, got {value}"):
        gati_jax.plan(table, costs, epsilon=value)
    with pytest.raises(gati_jax.InputError, match=f"delta: expected a number between 0 and 1, got {value}"):
        gati_jax.plan(table, costs, epsilon=0.1, delta=value)


def test_plan_refuses_costs_of_another_base():
    table, costs = random_tables(0, 2, 10)
    with pytest.raises(gati_jax.InputError, match="costs: expected times of 3 blocks"):
        gati_jax.plan(table, make_costs([1] * 4, [0, 0]), epsilon=0.1)
    with pytest.raises(gati_jax.InputError, match="costs: expected times of"):
        gati_jax.plan(table, make_costs(costs.blocks_ms, [0]), epsilon=0.1)


def test_plan_refuses_no_requests():
    with pytest.raises(gati_jax.InputError, match="table: expected"):
        gati_jax.plan(make_table(np.zeros((1, 0)), np.zeros((1, 0))), make_costs([1] * 4, [0]), epsilon=0.1)
