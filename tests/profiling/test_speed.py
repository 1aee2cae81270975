"""Ideal speed-ups and expected times, by arithmetic."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax import CostTable
from gati_jax.caches import Network
from gati_jax.models import ResNet
from gati_jax.profiling import Tile, TunedCascade, Tuning, device_name, expected_ms, measure_batches
from gati_jax.profiling import speed as speeds
from gati_jax.profiling.speed import path_ms
from gati_jax.runtime import Cascade
from gati_jax.runtime.batched import Schedule


@pytest.fixture(scope="module")
def cascade(chain, candidates):
    first, _, third, _ = sorted(candidates, key=lambda c: c.site)  # at sites 1 and 3 of 5
    return Cascade(chain, (first, third), jnp.asarray([1.0, 1.0]))


def table(cascade, block: float, lookup: float, batch: int = 1) -> CostTable:
    names = [cache.name for cache in cascade.caches]
    return CostTable(device="test", batch=batch, blocks_ms=(block,) * 5, lookup_ms=dict.fromkeys(names, lookup))


@settings(max_examples=30, deadline=None)
@given(
    exits=st.lists(st.sampled_from([1, 3, 5]), min_size=8, max_size=40),
    ms=st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)),
    batch=st.sampled_from([1, 4, 8]),
)
def test_expected_time_is_that_of_simulated_tiles(cascade, exits, ms, batch):
    costs = {4: table(cascade, ms[0], 0.5, 4), 1: table(cascade, ms[1], 0.25)}
    schedule = Schedule.of({4: 5 * ms[0], 1: 5 * ms[1]})
    costs = {size: costs[size] for size in schedule.sizes}
    total, groups = 0.0, len(exits) // batch
    for g in range(groups):
        alive = exits[batch * g : batch * g + batch]
        for site, blocks, looked in ((1, 1, True), (3, 2, True), (5, 2, False)):
            for size, count in zip(schedule.sizes, schedule.tiles(len(alive)), strict=True):
                cost = costs[size]
                total += count * (blocks * cost.blocks_ms[0] + looked * next(iter(cost.lookup_ms.values())))
            alive = [e for e in alive if e > site]
    assert expected_ms(cascade, costs, schedule, np.array(exits), batch) == pytest.approx(total / groups)
    with pytest.raises(gati_jax.InputError, match="at least one group of 50, got"):
        expected_ms(cascade, costs, schedule, np.array(exits), 50)


def test_a_network_s_time_is_part_of_what_is_ideal(cascade):
    small = Network(classes=10, network=ResNet(stages=(1,), widths=(4,)))
    first = dataclasses.replace(cascade.caches[0], site=0, predictor=small)
    with_network = Cascade(cascade.chain, (first, cascade.caches[1]), cascade.thresholds)
    costs = table(with_network, 1.0, 0.5)
    assert path_ms(with_network, costs) == {0: 0.5, 3: 3.5, 5: 5.5}
    assert path_ms(cascade, costs) == {1: 1.0, 3: 3.0, 5: 5.0}


def test_measured_batches_are_consistent(cascade, splits):
    tiles = tuple(
        Tile(size=s, milliseconds=1 + s / 4, options=(), algorithms={}, costs=table(cascade, 1.0, 0.1, s))
        for s in (1, 4)
    )
    tuned = TunedCascade(cascade, Tuning(device=device_name(), tiles=tiles))
    images = splits["test"][:21]
    speed = measure_batches(tuned, images, batch=8, rounds=2)
    assert (speed.batch, len(speed.exits)) == (8, 16)
    np.testing.assert_array_equal(speed.exits, tuned.predict(images[:16]).exit)
    assert speed.exit_ms == {site: pytest.approx(speed.full_ms * site / 5) for site in (1, 3, 5)}
    assert speed.ideal == pytest.approx(5 / np.mean(speed.exits))
    assert min(speed.full_ms, speed.cascade_ms) > 0
    with pytest.raises(gati_jax.InputError, match="at least one group of 32, got 21"):
        measure_batches(tuned, images, batch=32)


@pytest.mark.parametrize(("tuned_ms", "full"), [(3.0, "tuned"), (5.0, "reference")])
def test_batches_are_compared_with_the_faster_full_network(cascade, splits, monkeypatch, tuned_ms, full):
    made_up = {"cascade": 2.0, "tuned": tuned_ms, "reference": 4.0}

    def timed(programs, rounds, **_):
        return {name: np.full((rounds, len(calls)), made_up[name]) for name, calls in programs.items()}

    monkeypatch.setattr(speeds, "time_turns", timed)
    tile = Tile(size=1, milliseconds=1.0, options=(), algorithms={}, costs=table(cascade, 1.0, 0.1))
    tuned = TunedCascade(cascade, Tuning(device=device_name(), tiles=(tile,)))
    found = measure_batches(tuned, splits["test"][:2], batch=1, rounds=2)
    fastest = min(tuned_ms, 4.0)
    assert (found.full, found.full_ms, found.speedup) == (full, fastest, fastest / 2)
    assert found.conversion == pytest.approx(fastest / 2 / (5 / np.mean(found.exits)))


def test_the_interval_of_a_speed_up_is_that_of_its_requests_and_rounds():
    random = np.random.default_rng(0)
    cascade = random.choice([1.0, 4.0], (200, 1)) * np.ones((200, 5))  # requests differ, rounds do not
    full = np.full((200, 5), 4.0)
    low, high = speeds.speedup_interval(full, cascade)
    times = cascade[:, 0]
    error = times.std() / np.sqrt(200)  # of the mean time, by the central limit theorem
    assert (low, high) == pytest.approx(
        (4 / (times.mean() + 1.96 * error), 4 / (times.mean() - 1.96 * error)), rel=0.03
    )
    slow = full.copy()
    slow[:4] *= 50  # of 200 requests, four met a busy machine
    low, high = speeds.speedup_interval(slow, full)
    assert low < 1.5
    assert high > 2.5


def test_a_few_slow_runs_do_not_change_the_typical_speed_up(cascade, splits, monkeypatch):
    def timed(programs, *, rounds):
        calls.append(programs)
        ms = {name: np.full(rounds, 2.0 if name == "cascade" else 4.0) for name in programs}
        return {name: each * (100 if name == "cascade" and len(calls) == 2 else 1) for name, each in ms.items()}

    calls = []
    monkeypatch.setattr(speeds, "time_interleaved", timed)
    off = Cascade(cascade.chain, cascade.caches, jnp.full(len(cascade.caches), jnp.inf))
    found = speeds.measure_speed(off, splits["test"][:5], rounds=3)
    assert (found.speedup, found.typical) == pytest.approx((4 / ((4 * 2 + 200) / 5), 2.0))
    assert found.interval is not None
    assert found.interval[0] < 1 < found.interval[1]
    assert found.cascade_each_ms == (2.0,) * 3 + (200.0,) * 3 + (2.0,) * 9


def test_without_costs_there_is_no_ideal(cascade, splits):
    tile = Tile(size=1, milliseconds=1.0, options=(), algorithms={})
    tuned = TunedCascade(cascade, Tuning(device=device_name(), tiles=(tile,)))
    with pytest.raises(gati_jax.InputError, match=r"gati-jax tune --bundle"):
        measure_batches(tuned, splits["test"][:2], batch=1, rounds=1)
    (measured,) = tuned.measured(rounds=2).tiles
    assert measured.costs is not None
    assert (measured.costs.batch, len(measured.costs.blocks_ms)) == (1, 5)
    assert set(measured.costs.lookup_ms) == {cache.name for cache in cascade.caches}
