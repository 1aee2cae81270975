"""Policies beside one another: cases that a whole reproduction does not have, and steps by hand."""

import numpy as np
import pytest

import gati_jax
from gati_jax import CostTable, Plan
from gati_jax.profiling import Tile
from tests.fitting import tiny
from train.reproduce import evaluation, shared_threshold_plan
from train.reproduce.evaluation import OpenCaches, exit_times, paired_difference
from train.reproduce.policies import PlannedPolicy, last_step_on_test, logits_of, plan_policies, step_at_accuracy


@pytest.fixture(scope="module")
def explored():
    images, select = tiny.images()
    chain = tiny.chain()
    candidates = gati_jax.fit(chain, images, select=select, heads=[tiny.head(1, 2)], config=tiny.CONFIG)
    labels = np.zeros(len(select), np.int32)
    tables = {name: gati_jax.replay(chain, candidates, select, labels=labels) for name in ("select", "certify", "test")}
    costs = CostTable(device="cpu", batch=1, blocks_ms=(1.0,) * len(chain), lookup_ms={c.name: 0.1 for c in candidates})
    return chain, candidates, tables, costs, dict.fromkeys(tables, select)


@pytest.mark.parametrize("default_sites", [(), (2,), (1, 2)])
def test_every_policy_has_a_plan_whatever_the_default_plan_uses(explored, default_sites):
    chain, candidates, tables, costs, images = explored
    planned = plan_policies(
        candidates, tables, logits_of(chain, candidates, images), costs, default_sites=default_sites, epsilon=0.3
    )
    assert {one.name for one in planned} >= {"max probability (SDN)", "entropy (BranchyNet)", "patience (PABEE)"}
    assert all(set(one.plan.sites) in ({1, 2}, set(default_sites)) for one in planned)


def test_only_caches_that_are_on_are_timed(explored, monkeypatch):
    chain, candidates, tables, _, images = explored
    names = tuple(c.name for c in candidates)
    plan = Plan(
        names=names, sites=tables["test"].sites, depth=len(chain), n=4, rows=np.arange(4, dtype=np.uint64),
        path=np.array([[np.inf, np.inf], [np.inf, 0.5]]), disagreement=np.zeros(2), mean_ms=np.ones(2),
    )  # fmt: skip
    on = OpenCaches.of(plan, 1)
    assert (on.names, on.thresholds.tolist()) == (names[1:], [0.5])
    assert OpenCaches.of(plan, 0).names == ()
    timed = []

    def turns(programs, rounds):
        timed.extend(programs)
        sites = {name: int(name.rpartition(" ")[2]) for name in programs}
        exits = {name: int(calls[0]().exit) for name, calls in programs.items()}
        assert exits == {"base 0": len(chain), "ours 0": 2, "ours 1": len(chain)}
        return {
            name: np.tile([99.0, *[site + 1.0] * (len(programs[name]) - 1)], (rounds, 1))
            for name, site in sites.items()
        }

    monkeypatch.setattr(evaluation, "time_turns", turns)
    tile = Tile(size=1, milliseconds=1.0, options=(), algorithms={})
    ways = {"base": (), "ours": on.names}
    ms = exit_times(chain, candidates, ways, tile, images["test"][0], 3)
    assert {name: values.tolist() for name, values in ms.items()} == {"base": [1.0], "ours": [1.0, 2.0]}
    assert timed == ["base 0", "ours 0", "ours 1"]


def test_steps_at_an_accuracy_are_the_last_that_keep_it(explored):
    """On test exactly; on certify by one standard error of the difference, counted here row by row."""
    _, _, tables, costs, _ = explored
    plan = shared_threshold_plan(tables["select"], costs, epsilon=0.9)
    table = tables["test"]
    policy = PlannedPolicy(name="one", heads="", plan=plan, tables=tables)
    for share in (0.5, 0.9, 0.97, 1.0):
        exact, careful = [], []
        for step, thresholds in enumerate(plan.path):
            surplus = []
            for row, answer in enumerate(table.answers):
                hits = [i for i, t in enumerate(thresholds) if table.scores[i, row] >= t]
                given = table.classes[hits[0], row] if hits else answer
                surplus.append(float(given == table.labels[row]) - share * float(answer == table.labels[row]))
            if sum(surplus) >= -1e-9:
                exact.append(step)
            if np.mean(surplus) >= np.std(surplus) / np.sqrt(len(surplus)):
                careful.append(step)
        assert last_step_on_test(policy, share) == max(exact)
        assert step_at_accuracy(policy, share) == max(careful)  # step 0, the base itself, is always among them


def test_differences_come_with_a_paired_interval():
    rng = np.random.default_rng(0)
    first = rng.random(2000)
    found = paired_difference(first, first + 0.1 + 0.01 * rng.standard_normal(2000))
    assert found.low_ms < 0.1 < found.high_ms
    assert found.high_ms - found.low_ms < 0.002  # of the differences alone: unpaired, it would be 0.035
    assert not found.ties
    assert not paired_difference(first, first - 0.1).ties  # faster is no tie, either
    assert paired_difference(first, rng.permutation(first)).ties
    same = paired_difference(first, first)
    assert (same.mean_ms, same.low_ms, same.high_ms, same.ties) == (0, 0, 0, True)
