"""What cannot pay, and what a cache is worth alone, against plain counting."""

import dataclasses

import numpy as np
import pytest

from gati_jax.certification import largest_passing
from gati_jax.planning import rank, replay_plan, unpayable


def test_too_dear_and_too_large_are_named_with_their_reason(make_costs):
    costs = make_costs([1, 1, 2, 4], [0.5, 4.0, 0.1])
    sites, sizes = {"c0": 1, "c1": 3, "c2": 2}, {"c0": 10, "c1": 10, "c2": 5_000_000}
    reasons = unpayable(costs, sites, sizes, memory_bytes=1_000_000)
    assert set(reasons) == {"c1", "c2"}
    assert "4.000 ms" in reasons["c1"]
    assert "5.00 MB" in reasons["c2"]
    assert set(unpayable(costs, sites, sizes)) == {"c1"}


def test_a_candidate_over_the_budget_needs_no_costs(make_costs):
    assert set(unpayable(make_costs([1], []), {"huge": 0}, {"huge": 9}, memory_bytes=8)) == {"huge"}


@pytest.mark.parametrize("odd", [None, np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("seed", range(8))
def test_ranking_is_the_best_single_threshold_of_each(random_tables, seed, odd):
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
