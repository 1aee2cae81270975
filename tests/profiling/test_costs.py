"""What is measured, and how often; never how long it takes."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax.caches import Network
from gati_jax.models import ResNet
from gati_jax.profiling import (
    Speed,
    Tile,
    TunedCascade,
    Tuning,
    costs,
    device_name,
    measure_costs,
    measure_speed,
    speed,
    time_interleaved,
)
from gati_jax.profiling.costs import spread
from gati_jax.profiling.speed import FullNetwork
from gati_jax.runtime import Cascade, predict_one


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


@pytest.mark.parametrize("count", [0, 2])
def test_costs_have_an_entry_for_every_block_and_candidate(chain, candidates, count):
    some = candidates.items[:count]
    costs = measure_costs(chain, some, rounds=3)
    assert len(costs.blocks_ms) == len(chain)
    assert min(costs.blocks_ms) >= 0
    assert set(costs.lookup_ms) == {c.name for c in some}
    assert all(ms > 0 for ms in costs.lookup_ms.values())
    assert (costs.batch, costs.full_ms > 0, costs.spread >= 0) == (1, True, True)
    assert costs.device
    assert not set(costs.device) & set(" /")


@pytest.fixture
def made_up(monkeypatch):
    """Times by name, 1 ms for everything else; of a turn's calls the first takes a second, and does not count."""
    known = {}

    def interleaved(programs, *, rounds, **_):
        return {name: np.full(rounds, known.get(name, 1.0)) for name in programs}

    def turns(programs, rounds, **_):
        calls = {name: [1000.0, *[known.get(name, 1.0)] * (len(calls) - 1)] for name, calls in programs.items()}
        return {name: np.tile(ms, (rounds, 1)) for name, ms in calls.items()}

    monkeypatch.setattr(costs, "time_interleaved", interleaved)
    monkeypatch.setattr(costs, "time_turns", turns)
    return known


def test_a_prefix_that_is_dearer_than_a_longer_one_is_told(chain, made_up):
    made_up |= {str(site): float(site) for site in range(1, len(chain) + 1)}
    assert costs.unsteady(measure_costs(chain, (), rounds=2)) == ""
    made_up["1"] = 2.5  # and 2 blocks take 2 ms
    assert costs.unsteady(measure_costs(chain, (), rounds=2)) == "the base up to block 1 took no less time than with it"


@pytest.mark.parametrize(("cascade", "added"), [(5.0, 1.0), (4.5, 0.5), (4.1, 0.2), (3.0, 0.2)])
def test_no_lookup_is_free(chain, candidates, made_up, cascade, added):
    """What all add is shared out by their times alone, 0.5 and 1.5 ms; noise takes away all but a tenth of these."""
    one, two = sorted(candidates, key=lambda c: c.site)[:2]
    made_up |= {"0": 4.0, "1": cascade, one.name: 0.5, two.name: 1.5}
    costs = measure_costs(chain, (one, two), rounds=3)
    assert costs.lookup_ms == {one.name: pytest.approx(added / 4), two.name: pytest.approx(3 * added / 4)}


def test_a_predictor_costs_the_same_under_every_selector(chain, candidates, made_up):
    """And is timed once; another predictor at its site is timed in a cascade of its own."""
    one = candidates.items[0]
    again = dataclasses.replace(one, name="again")
    other = dataclasses.replace(one, name="other", params=jax.tree.map(lambda leaf: leaf + 1, one.params))
    made_up |= {"0": 4.0, "1": 4.5, "2": 4.75}
    costs = measure_costs(chain, (one, again, other), rounds=3)
    assert costs.lookup_ms == {one.name: 0.5, "again": 0.5, "other": 0.75}


def test_a_small_network_is_timed_alone(chain, candidates, made_up):
    """It is long enough; a difference of two longer times would be noise."""
    head = candidates.items[0]
    small = dataclasses.replace(head, name="small", predictor=Network(10, ResNet(stages=(1,), widths=(4,))))
    made_up |= {"0": 4.0, "1": 4.5, "small": 2.5}
    assert measure_costs(chain, (small, head), rounds=3).lookup_ms == {"small": 2.5, head.name: 0.5}


@pytest.mark.usefixtures("made_up")
def test_a_measurement_says_how_long_it_will_be(chain, candidates, caplog):
    with caplog.at_level(logging.INFO, logger="gati_jax"):
        measure_costs(chain, (c for c in candidates.items[:2]), rounds=7, batch=3, sites=(2, 4))
    assert "measuring 3 spans and 2 lookups on XLA in batches of 3, 7 rounds" in caplog.text


@pytest.mark.parametrize(("each", "says"), [([1.0, 1.0, 1.02, 1.04], False), ([1.0, 1.0, 1.2, 1.4], True)])
def test_times_that_spread_are_warned_of(chain, monkeypatch, caplog, each, says):
    monkeypatch.setattr(costs, "time_interleaved", lambda programs, **_: dict.fromkeys(programs, np.array(each)))
    monkeypatch.setattr(costs, "time_turns", lambda programs, *_, **__: {n: np.ones((2, 4)) for n in programs})
    with caplog.at_level(logging.WARNING, logger="gati_jax"):
        found = measure_costs(chain, (), rounds=2)
    assert (found.spread > 0.1) == says
    assert ("costs: the base's times spread by" in caplog.text) == says


@pytest.mark.parametrize("terminal", [True, False])
def test_a_measurement_shows_its_progress_on_a_terminal_only(chain, candidates, capsys, monkeypatch, terminal):
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    measure_costs(chain, candidates.items[:1], rounds=2, sites=())
    shown = capsys.readouterr().err
    for text in ("compiling", "1/1", "measuring", "2/2"):  # the whole base, then in two rounds
        assert (text in shown) == terminal
    measure_costs(chain, candidates.items[:1], rounds=2, sites=(), progress=False)
    assert capsys.readouterr().err == ""


def test_measured_costs_are_what_plan_takes(chain, candidates, splits):
    costs = measure_costs(chain, candidates, rounds=2)
    plan = gati_jax.plan(gati_jax.replay(chain, candidates, splits["select"]), costs, epsilon=0.1)
    assert set(plan.names) <= set(costs.lookup_ms)


@pytest.mark.parametrize(("tuned_ms", "full"), [(2.0, "tuned"), (6.0, "reference"), (None, "reference")])
def test_a_speed_up_is_over_the_fastest_full_network(chain, candidates, splits, monkeypatch, tuned_ms, full):
    """The reference network takes 4 ms, its first block and the cascade 1; the ideal speed-up does not change."""
    cascade = Cascade(chain, candidates.items[:1], jnp.asarray([0.0]))
    made_up = {"cascade": 1.0, "1": 1.0, "5": 4.0, "tuned": tuned_ms}
    timed = lambda programs, *, rounds: {name: np.full(rounds, made_up[name]) for name in programs}  # noqa: E731
    monkeypatch.setattr(speed, "time_interleaved", timed)
    tile = Tile(size=1, milliseconds=1.0, options=(), algorithms={})
    tuned = TunedCascade(cascade, Tuning(device=device_name(), tiles=(tile,)))
    ways: dict[FullNetwork, TunedCascade] = {"tuned": tuned} if tuned_ms else {}
    found = measure_speed(cascade, splits["test"][:3], full=ways, rounds=2)
    fastest = min(4.0, tuned_ms or 4.0)
    assert (found.full, found.full_ms, found.speedup) == (full, fastest, fastest)
    assert found.exit_ms == {1: pytest.approx(fastest / 4), 5: pytest.approx(fastest)}
    ideal = 1 / np.mean([{1: 0.25, 5: 1.0}[exit_] for exit_ in found.exits])
    assert (found.ideal, found.conversion) == (pytest.approx(ideal), pytest.approx(fastest / ideal))


def test_measured_speed_is_consistent(chain, candidates, splits):
    images = jnp.asarray(splits["test"][:4])
    first, third = candidates.items[0], candidates.items[2]
    score = predict_one(Cascade(chain, (first,), jnp.asarray([-jnp.inf])), images[1]).score
    cascade = Cascade(chain, (first, third), jnp.stack([score, jnp.float32(1.0)]))
    found = measure_speed(cascade, images, rounds=2)
    assert found.exits == tuple(int(predict_one(cascade, image).exit) for image in images)
    assert set(found.exit_ms) == {1, 3, 5}
    assert found.exit_ms[5] == found.full_ms
    assert min(found.full_ms, found.cascade_ms, *found.exit_ms.values()) > 0
    assert found.spread >= 0


def test_speed_by_arithmetic():
    # Three requests leave after 1 of 4 ms, one goes through: ideally (3 * 1 + 4) / 4 = 1.75 ms instead of 4.
    found = Speed(full_ms=4.0, cascade_ms=2.0, exit_ms={1: 1.0, 3: 4.0}, exits=(1, 1, 3, 1), spread=0.1)
    assert found.speedup == 2
    assert found.ideal == pytest.approx(4 / 1.75)
    assert found.conversion == pytest.approx(1.75 / 2)
