"""Composition against brute force over every choice of candidates and thresholds; pruning and ranking before it."""

import dataclasses
import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax.certification import largest_passing
from gati_jax.planning import (
    Budget,
    ReplayTable,
    branch_and_bound,
    cascade_ms,
    compose,
    compose_plan,
    prunable,
    rank,
    replay_plan,
)
from gati_jax.planning.local_search import first_search, polish
from gati_jax.planning.problem import evaluate, read_problem, used, within
from tests.planning.reference import make_costs, make_table, random_tables, serve

SEEDS = st.integers(0, 2**31)
SMALL = settings(deadline=None, max_examples=12)


@pytest.fixture(scope="module", autouse=True)
def short_ascent():
    """Fewer steps at the root, of which such small problems need few: the rest is left to the nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(branch_and_bound, "ROOT_STEPS", 100)
        yield


def draw_problem(seed, candidates, n, *, levels=4, extremes=()):
    """Candidates that share sites, ties among scores, costs in eighths of a millisecond, bytes in tens."""
    rng = np.random.default_rng(seed)
    depth = int(rng.integers(2, 5))
    sites = rng.integers(depth, size=candidates).tolist()
    right = rng.random((candidates, n)) < rng.choice([0.5, 0.8, 0.95])
    scores = rng.integers(levels, size=(candidates, n)) + right * rng.integers(2)
    if extremes:
        scores = np.where(rng.random(scores.shape) < 0.3, rng.choice(extremes, scores.shape), scores)
    table = make_table(~right, scores, sites=sites or None, depth=depth)
    costs = make_costs(rng.integers(0, 9, depth) / 8, rng.integers(5, size=candidates) / 8)
    return table, costs, {name: 10 * int(rng.integers(1, 5)) for name in table.names}


def every_choice(table):
    """For each site one of its candidates at one of its finite scores, or none."""
    at = [[c for c, s in enumerate(table.sites) if s == site] for site in sorted(set(table.sites))]
    scores = [np.unique(row[np.isfinite(row)]) for row in table.scores]
    options = [[None, *((c, t) for c in here for t in scores[c])] for here in at]
    return itertools.product(*options)


def best_by_brute_force(table, costs, memory, budget):
    best = np.inf
    for choice in every_choice(table):
        chosen = [option for option in choice if option is not None]
        names = [table.names[c] for c, _ in chosen]
        worst = costs.full_ms + sum(costs.lookup_ms[name] for name in names)
        if budget.sites is not None and len(names) > budget.sites:
            continue
        if budget.memory_bytes is not None and sum(memory[name] for name in names) > budget.memory_bytes:
            continue
        if budget.worst_ms is not None and worst > budget.worst_ms + 1e-9:
            continue
        served = serve(table.take(names), [t for _, t in chosen], costs)
        if served.wrong <= budget.disagreements:
            best = min(best, served.mean_ms)
    return best


def draw_budget(data, costs):
    return Budget(
        disagreements=data.draw(st.integers(0, 5)),
        memory_bytes=data.draw(st.sampled_from([None, 0, 30, 50, 70])),
        worst_ms=data.draw(st.sampled_from([None, *(costs.full_ms + ms for ms in (0.0, 0.25, 0.5, 1.0))])),
        sites=data.draw(st.sampled_from([None, 0, 1, 2])),
    )


@settings(deadline=None, max_examples=40)
@given(st.data(), SEEDS, st.integers(0, 4), st.integers(1, 10), st.sampled_from([(), (np.inf, -np.inf, np.nan)]))
def test_it_is_as_fast_as_brute_force(data, seed, candidates, n, extremes):
    table, costs, memory = draw_problem(seed, candidates, n, extremes=extremes)
    budget = draw_budget(data, costs)
    best = best_by_brute_force(table, costs, memory, budget)
    found = compose(table, costs, budget, bytes=memory)
    assert found.mean_ms == pytest.approx(best)
    assert (found.proved, found.gap) == (True, 0.0)
    assert found.bound_ms == pytest.approx(found.mean_ms)
    assert serve(table.take(found.names), found.thresholds, costs).mean_ms == pytest.approx(found.mean_ms)
    hasty = compose(table, costs, budget, bytes=memory, seconds=0.0)  # without time the bound still holds
    assert hasty.bound_ms - 1e-9 <= best <= hasty.mean_ms + 1e-9
    assert hasty.mean_ms * (1 - hasty.gap) <= best + 1e-9
    assert hasty.proved == (hasty.gap == 0)


@SMALL
@given(st.data(), SEEDS, st.integers(1, 6), st.integers(20, 50))
def test_budgets_hold_when_replayed(data, seed, candidates, n):
    table, costs, memory = draw_problem(seed, candidates, n, levels=40)
    budget = draw_budget(data, costs)
    found = compose(table, costs, budget, bytes=memory, seconds=5.0)
    served = serve(table.take(found.names), found.thresholds, costs)
    assert served.mean_ms == pytest.approx(found.mean_ms)
    assert served.wrong == found.disagreements <= budget.disagreements
    assert list(found.sites) == sorted(set(found.sites))
    assert [table.sites[table.names.index(name)] for name in found.names] == list(found.sites)
    assert found.memory_bytes == sum(memory[name] for name in found.names)
    assert budget.memory_bytes is None or found.memory_bytes <= budget.memory_bytes
    assert budget.sites is None or len(found.names) <= budget.sites
    worst = costs.full_ms + sum(costs.lookup_ms[name] for name in found.names)
    assert budget.worst_ms is None or not found.names or worst <= budget.worst_ms + 1e-9
    assert set(found.refused) == set(table.names) - set(found.names)
    assert all(found.refused.values())


def test_where_no_change_of_one_site_helps_an_exchange_of_two_finds_the_best():
    # There is room for one cache. c0 knows the first two requests, c1, one block later, the other eight.
    first = np.arange(10) < 2
    table = make_table([~first, first], [first, ~first], sites=(1, 2), depth=9)
    costs, budget = make_costs([1] * 9, [0.1, 0.1]), Budget(disagreements=0, sites=1)
    problem = read_problem(table, costs, disagreements=0, limits=(None, None, 1), memory={})
    stuck = ((0, 0), None)
    for other in ((None, None), ((0, 1), None), ((0, 0), (1, 0)), ((0, 0), (1, 1))):
        ms, wrong = evaluate(problem, other)
        assert ms > evaluate(problem, stuck)[0] or wrong or not within(used(problem, other), problem.limits)
    found = polish(problem, stuck)
    assert found.choice == (None, (1, 0))
    assert found.ms / 10 == pytest.approx(best_by_brute_force(table, costs, {}, budget))
    assert compose(table, costs, budget, seconds=0.0).names == ("c1",)


@SMALL
@given(st.data(), SEEDS, st.integers(2, 6), st.integers(10, 40))
def test_no_exchange_of_two_sites_improves_what_the_search_returns(data, seed, candidates, n):
    """From wherever it starts: the start itself, one site changed, or one closed and another changed."""
    table, costs, memory = draw_problem(seed, candidates, n, levels=6)
    table = table.take([table.names[i] for i in np.argsort(table.sites, kind="stable")])
    most, sites = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 3))
    sizes = {name: float(size) for name, size in memory.items()}
    problem = read_problem(table, costs, disagreements=most, limits=(60, None, sites), memory=sizes)
    options = [
        [None, *((c, t) for c in problem.at(s).tolist() for t in range(len(problem.thresholds[c])))]
        for s in range(problem.sites)
    ]

    def neighbours(choice):
        for closed in range(problem.sites):
            for site, here in enumerate(options):
                for option in here:
                    yield tuple(option if s == site else None if s == closed else o for s, o in enumerate(choice))
                    yield tuple(option if s == site else o for s, o in enumerate(choice))

    start = tuple(data.draw(st.sampled_from(here)) for here in options)
    if not within(used(problem, start), problem.limits) or evaluate(problem, start)[1] > most:
        start = (None,) * problem.sites
    for found in (polish(problem, start), first_search(problem)[0]):
        ms, wrong = evaluate(problem, found.choice)
        assert ms == pytest.approx(found.ms)
        assert wrong <= most
        assert within(used(problem, found.choice), problem.limits)
        for other in neighbours(found.choice):
            other_ms, other_wrong = evaluate(problem, other)
            allowed = other_wrong <= most and within(used(problem, other), problem.limits)
            assert not allowed or other_ms >= ms - 1e-8 * max(1.0, ms)
    assert polish(problem, start).ms <= evaluate(problem, start)[0] + 1e-9


@SMALL
@given(SEEDS, st.integers(1, 4), st.integers(20, 40), st.sampled_from([0.1, 0.3, 0.5]))
def test_a_plan_leads_through_the_composition(seed, candidates, n, epsilon):
    table, costs, _ = draw_problem(seed, candidates, n, levels=20)
    plan, composition = compose_plan(table, costs, epsilon=epsilon, delta=0.5)
    target = max(0, largest_passing(n, epsilon, 0.5))
    upto = [i for i, share in enumerate(plan.disagreement) if share <= (target + 0.5) / n]
    assert plan.mean_ms[upto].min() <= composition.mean_ms + 1e-9
    assert set(plan.names) <= set(composition.names)
    for thresholds, ms in zip(plan.path, plan.mean_ms, strict=True):
        assert serve(table.take(plan.names), thresholds, costs).mean_ms == pytest.approx(ms)


def impatient(asked):
    """Return a clock by which the local search has no time of a second, and the exact one has it ``asked`` times."""
    times = itertools.chain([0.0], itertools.repeat(0.5, asked), itertools.repeat(2.0))
    return lambda: next(times)


def draw_spread(seed):
    """Three sites with two candidates each and many more scores than a grid of 4 thresholds has."""
    rng, n = np.random.default_rng(seed), 60
    wrong = rng.random((6, n)) > 0.75
    scores = rng.normal(size=(6, n)) + 0.8 * ~wrong
    table = make_table(wrong, scores, sites=(1, 1, 2, 2, 3, 3), depth=4)
    return table, make_costs(rng.random(4) + 0.3, 0.2 * rng.random(6))


def best_of_grid(table, costs, grid, most):
    """The least mean time of all choices of these thresholds."""
    best = np.inf
    options = [[None, *((c, t) for c in (2 * s, 2 * s + 1) for t in grid[c])] for s in range(3)]
    for choice in itertools.product(*options):
        chosen = [option for option in choice if option is not None]
        part = table.take([table.names[c] for c, _ in chosen])
        thresholds = np.array([t for _, t in chosen], np.float32)
        if replay_plan(part, thresholds).disagrees.sum() <= most:
            best = min(best, cascade_ms(part, thresholds, costs))
    return best


@pytest.mark.parametrize("asked", [20, 10**9])
@pytest.mark.parametrize("seed", [0, 12, 23, 52])  # in all but the first, polishing leaves the grid
def test_the_choice_is_on_the_grid_that_its_bound_speaks_of(monkeypatch, seed, asked):
    table, costs = draw_spread(seed)
    grids, answers = [], []

    def seen(problem, *args, **kwargs):
        result = branch_and_bound.solve(problem, *args, **kwargs)
        grids.append(problem.thresholds)
        answers.append(result)
        return result

    monkeypatch.setattr(sys.modules["gati_jax.planning.compose"], "solve", seen)
    found = compose(table, costs, Budget(disagreements=6), seconds=1.0, thresholds=4, clock=impatient(asked))
    for name, threshold in zip(found.names, found.thresholds, strict=True):
        assert np.float32(threshold) in grids[-1][table.names.index(name)]
    best = best_of_grid(table, costs, grids[-1], 6)
    assert found.bound_ms - 1e-9 <= best <= found.mean_ms + 1e-9
    assert found.proved == (found.gap == 0)
    assert found.proved or asked < 10**9
    assert best == pytest.approx(found.mean_ms) or not found.proved
    assert found.nodes == sum(answer.nodes for answer in answers)


@pytest.mark.parametrize("seed", range(2))
def test_progress_closes_in_on_what_is_found(seed):
    table, costs = draw_spread(seed)
    steps = []
    found = compose(
        table, costs, Budget(disagreements=6), seconds=1.0, thresholds=4, clock=impatient(10**9),
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert steps
    nodes, best, bounds = zip(*steps, strict=True)
    assert list(nodes) == sorted(nodes)
    assert nodes[-1] == found.nodes
    assert list(best) == sorted(best, reverse=True)
    assert best[-1] >= found.mean_ms - 1e-9
    assert all(bound <= ms + 1e-9 for ms, bound in zip(best, bounds, strict=True))


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("lookup", [0.0, 0.5, 9.0])
@pytest.mark.parametrize("blocks", [[0, 0], [1, 2]])
def test_one_candidate_and_all_its_answers_alike(wrong, lookup, blocks):
    table, costs = make_table([[wrong] * 6], [[1.0] * 6], depth=2), make_costs(blocks, [lookup])
    budget = Budget(disagreements=5)
    found = compose(table, costs, budget)
    assert found.mean_ms == pytest.approx(best_by_brute_force(table, costs, {}, budget))
    assert found.proved


@pytest.mark.parametrize("score", [np.nan, -np.inf])
def test_scores_that_never_hit_are_no_options(score):
    table, costs = make_table([[0] * 4], [[score] * 4], depth=2), make_costs([1, 1], [0.1])
    found = compose(table, costs, Budget(disagreements=4))
    assert (found.names, found.refused) == ((), {"c0": "it answers nothing"})


def test_reasons_name_what_stands_in_the_way():
    # c1 answers all at site 1; c0 there knows half; c2 is too late; c3's lookup takes longer than the block behind it.
    sure = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    table = make_table(1 - np.array(sure), sure, sites=(1, 1, 2, 3), depth=4)
    costs = make_costs([1, 1, 1, 1], [0.1, 0.1, 0.1, 1.5])
    found = compose(table, costs, Budget(disagreements=0))
    assert found.names == ("c1",)
    assert found.refused["c0"] == "c1 at the same site saves 1.500 ms more"
    assert found.refused["c2"] == "would cost 0.000 ms more than it saves beside the others"
    assert found.refused["c3"] == "its lookup takes 1.500 ms, all blocks behind it 1.000 ms"
    sizes = {"c0": 10, "c1": 20, "c2": 10, "c3": 1}
    small = compose(table, costs, Budget(disagreements=0, memory_bytes=15), bytes=sizes)
    assert small.names == ("c2",)
    assert small.refused["c1"] == "over the budget by itself: 20 bytes of memory, 15 allowed"
    assert small.refused["c0"] == "no room beside the others: 20 bytes of memory, 15 allowed"


def test_jointly_harmless_thresholds_are_found():
    # c1 alone is wrong about the first four; c0 answers just these, rightly, before it.
    first = (np.arange(20) < 4).astype(float)
    table = make_table([1 - first, first], [first, np.ones(20)], sites=(1, 2), depth=9)
    found = compose(table, make_costs([1] * 9, [0.1, 0.1]), Budget(disagreements=0))
    assert (found.names, found.disagreements) == (("c0", "c1"), 0)
    assert found.mean_ms == pytest.approx((4 * 1.1 + 16 * 2.2) / 20)


@pytest.mark.parametrize(
    ("name", "value"), [("disagreements", -1), ("memory_bytes", -1), ("worst_ms", -1.0), ("sites", -1)]
)
def test_budget_refuses_negative_numbers(name, value):
    with pytest.raises(gati_jax.InputError, match=f"{name}: expected 0 or more, got -1"):
        Budget(**{"disagreements": 0} | {name: value})


def test_a_memory_budget_needs_the_bytes_of_every_candidate():
    table, costs = make_table([[0], [0]], [[1.0], [1.0]]), make_costs([1] * 4, [0, 0])
    with pytest.raises(gati_jax.InputError, match="bytes: expected those of every candidate, got none of c1"):
        compose(table, costs, Budget(disagreements=0, memory_bytes=9), bytes={"c0": 1})


def test_the_base_itself_must_be_within_the_worst_time():
    table, costs = make_table([[0]], [[1.0]]), make_costs([1] * 4, [0])
    with pytest.raises(gati_jax.InputError, match=r"worst_ms: expected at least the base's own 4\.0 ms, got 3\.9"):
        compose(table, costs, Budget(disagreements=0, worst_ms=3.9))


def test_no_candidates():
    table = ReplayTable(
        names=(), sites=(), depth=2, answers=np.zeros(3, int), classes=np.zeros((0, 3), int),
        scores=np.zeros((0, 3), np.float32), rows=np.arange(3, dtype=np.uint64),
    )  # fmt: skip
    found = compose(table, make_costs([1, 2], []), Budget(disagreements=0))
    assert (found.names, found.mean_ms, found.proved) == ((), 3.0, True)


def test_prunable_names_what_cannot_save_time_or_is_too_large():
    costs = make_costs([1, 1, 2, 4], [0.5, 4.0, 0.1])
    sites, sizes = {"c0": 1, "c1": 3, "c2": 2}, {"c0": 10, "c1": 10, "c2": 5_000_000}
    reasons = prunable(costs, sites, sizes, memory_bytes=1_000_000)
    assert set(reasons) == {"c1", "c2"}
    assert "4.000 ms" in reasons["c1"]
    assert "5.00 MB" in reasons["c2"]
    assert set(prunable(costs, sites, sizes)) == {"c1"}
    # A candidate over the budget needs no measured times.
    assert set(prunable(make_costs([1], []), {"huge": 0}, {"huge": 9}, memory_bytes=8)) == {"huge"}


@pytest.mark.parametrize("odd", [None, np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("seed", range(3))
def test_ranking_is_the_best_single_threshold_of_each(seed, odd):
    table, costs = random_tables(seed, 3, 80, levels=6, agreement=0.95)
    if odd is not None:
        some = np.random.default_rng(seed).random(table.scores.shape) < 0.3
        table = dataclasses.replace(table, scores=np.where(some, odd, table.scores))
    epsilon, delta = 0.2, 0.1
    target = largest_passing(len(table), epsilon, delta)
    ranked = rank(table, costs, epsilon=epsilon, delta=delta)
    assert [r.saved for r in ranked] == sorted((r.saved for r in ranked), reverse=True)
    for row in ranked:
        one = table.take([row.name])
        hits = 0.0
        for threshold in np.unique(one.scores[np.isfinite(one.scores)]):
            outcome = replay_plan(one, np.array([threshold], np.float32))
            if outcome.disagrees.sum() <= target:
                hits = max(hits, float((outcome.exits == 0).mean()))
        assert row.hits == pytest.approx(hits)
        saved = hits * (costs.full_ms - costs.until(row.site)) - costs.lookup_ms[row.name]
        assert row.saved == pytest.approx(saved / costs.full_ms)
