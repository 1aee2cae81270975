"""What is measured, and how often; never how long it takes."""

import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax.runtime import Cascade, Speed, measure_costs, measure_speed, predict_one, time_interleaved
from gati_jax.runtime.measure import spread


def test_programs_take_turns():
    calls = []
    programs = {name: lambda name=name: calls.append(name) or jnp.zeros(1) for name in "abc"}
    times = time_interleaved(programs, rounds=4)
    assert calls == list("abc") * 5  # one warm-up round
    assert list(times) == ["a", "b", "c"]
    for ms in times.values():
        assert ms.shape == (4,)
        assert (ms >= 0).all()


def test_spread_is_the_interquartile_range_over_the_median():
    assert spread(np.array([4.0, 1.0, 3.0, 2.0, 5.0])) == pytest.approx((4 - 2) / 3)
    assert spread(np.full(5, 2.0)) == 0


def test_costs_have_an_entry_for_every_block_and_candidate(chain, candidates):
    some = candidates.items[:2]
    costs = measure_costs(chain, some, rounds=3)
    assert len(costs.blocks_ms) == len(chain)
    assert min(costs.blocks_ms) >= 0
    assert set(costs.lookup_ms) == {c.name for c in some}
    assert min(costs.lookup_ms.values()) >= 0
    assert (costs.batch, costs.full_ms > 0, costs.spread >= 0) == (1, True, True)
    assert costs.device
    assert not set(costs.device) & set(" /")


def test_costs_without_candidates(chain):
    costs = measure_costs(chain, (), rounds=2)
    assert costs.lookup_ms == {}
    assert len(costs.blocks_ms) == len(chain)


def test_measured_costs_are_what_plan_takes(chain, candidates, splits):
    costs = measure_costs(chain, candidates, rounds=2)
    plan = gati_jax.plan(gati_jax.replay(chain, candidates, splits["select"]), costs, epsilon=0.1)
    assert set(plan.names) <= set(costs.lookup_ms)


def test_speed_by_arithmetic():
    # Three requests leave after 1 of 4 ms, one goes through: ideally (3 * 1 + 4) / 4 = 1.75 ms instead of 4.
    speed = Speed(full_ms=4.0, cascade_ms=2.0, exit_ms={1: 1.0, 3: 4.0}, exits=(1, 1, 3, 1), spread=0.1)
    assert speed.speedup == 2
    assert speed.ideal == pytest.approx(4 / 1.75)
    assert speed.conversion == pytest.approx(1.75 / 2)


def test_measured_speed_is_consistent(chain, candidates, splits):
    images = jnp.asarray(splits["test"][:4])
    first, third = candidates.items[0], candidates.items[2]
    score = predict_one(Cascade(chain, (first,), jnp.asarray([-jnp.inf])), images[1]).score
    cascade = Cascade(chain, (first, third), jnp.stack([score, jnp.float32(1.0)]))
    speed = measure_speed(cascade, images, rounds=2)
    assert speed.exits == tuple(int(predict_one(cascade, image).exit) for image in images)
    assert set(speed.exit_ms) == {1, 3, 5}
    assert speed.exit_ms[5] == speed.full_ms
    assert min(speed.full_ms, speed.cascade_ms, *speed.exit_ms.values()) > 0
    assert speed.speedup == pytest.approx(speed.full_ms / speed.cascade_ms)
    ideal = speed.full_ms / np.mean([speed.exit_ms[exit_] for exit_ in speed.exits])
    assert speed.ideal == pytest.approx(ideal)
    assert speed.conversion == pytest.approx(speed.speedup / ideal)
    assert speed.spread >= 0
