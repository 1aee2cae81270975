"""The monitor against what it promises: q, episodes, named exits, counters, versions, false alarms, drift."""

import json
import math
import sys
from itertools import chain, cycle, repeat

import numpy as np
import pytest

import gati_jax
from gati_jax.adaptation import EXACT, NEAREST, Monitor, MonitorConfig, MonitorState, Observation
from gati_jax.adaptation.monitor import DriftDetector
from gati_jax.certification import trial_level
from gati_jax.certification.betting import Count, EProcess, upper_bound

DEPTH = 4
MISS = Observation(DEPTH, math.inf, 3, 1.0, 3)
QUIET = MonitorConfig(drift=False)
LONG = MonitorConfig(drift=False, epsilon=0.1, attention=10**6)


def hit(q, *, site=1, shadowed=False, agrees=True, score=0.5):
    return Observation(site, score, 7, q, (7 if agrees else 2) if shadowed else None)


def wrong(q=1.0, site=1):
    return hit(q, site=site, shadowed=True, agrees=False)


def first_alarm(monitor, observations):
    return next(filter(None, map(monitor.watch, observations)), None)


@pytest.mark.parametrize("config", [QUIET, MonitorConfig(drift=False, attention=5, epsilon=0.4)])
def test_every_disagreement_raises_q_until_attention_has_passed(config):
    monitor = Monitor(config, DEPTH)
    for observation in [MISS, hit(0.02), hit(0.02, shadowed=True), hit(0.02, site=EXACT)]:
        assert monitor.watch(observation) is None
        assert monitor.q == 0.02
    for observation in [wrong(0.02), MISS, MISS, MISS, MISS, wrong()]:
        monitor.watch(observation)
    for left in range(config.hold, 0, -1):
        assert monitor.q == 1.0, left
        monitor.watch(MISS)
    assert monitor.q == 0.02


@pytest.mark.parametrize("where", ["scores", "exits"])
def test_a_drift_raises_q(where):
    """Change tests, made for scores and for exits in this order, of which one fires at its third number."""
    taken = {"scores": [], "exits": []}
    left = iter(taken)

    def make():
        name = next(left)
        return lambda x: taken[name].append(x) or (name == where and len(taken[name]) == 3)

    monitor = Monitor(MonitorConfig(), DEPTH, DriftDetector(DEPTH, make))
    for _ in range(2):
        monitor.watch(MISS)
        monitor.watch(hit(0.02, score=1e9))
    raised = monitor.q == 1.0
    assert raised == (where == "exits")
    monitor.watch(hit(0.02))
    assert monitor.q == 1.0
    assert monitor.report.drifts == 1
    assert taken == {"scores": [50.0, 50.0, 0.5], "exits": [1, 1 / 4, 1, 1 / 4, 1 / 4]}, "scores of hits, bounded"


def test_the_e_value_is_that_of_the_bets():
    """Under its own q, and as in quiet while requests with an older q may be about."""
    config = MonitorConfig(drift=False, in_flight=3, attention=10, delta=1e-6)
    monitor, e_process = Monitor(config, DEPTH), EProcess(0.01)
    served = [wrong(0.02), hit(0.02), MISS, wrong(0.02), hit(1.0, shadowed=True)]
    for observation, probability in zip(served, [0.02, 0.02, 0.02, 0.02, 1.0], strict=True):
        seen = observation.base_class not in (None, observation.class_index)
        e_process.bet(1 / observation.q if seen else 0.0, probability)
        monitor.watch(observation)
    assert monitor.report.e_value == pytest.approx(e_process.total)
    assert monitor.report.estimate == pytest.approx((2 / 0.02) / 5)


def test_one_alarm_a_version_and_the_next_needs_more():
    monitor = Monitor(QUIET, DEPTH)
    for version in (1, 2):
        report = monitor.report
        assert (report.version, report.requests, report.alarmed) == (version, 0, False)
        assert report.e_value == pytest.approx(1)
        (alarm,) = filter(None, map(monitor.watch, repeat(wrong(), 300)))
        assert alarm.version == version
        assert alarm.e_value >= 1 / trial_level(QUIET.delta, version)
        assert monitor.report.alarmed
        monitor.next_version()


@pytest.mark.parametrize(
    ("config", "served", "sites"),
    [
        # Site 0 has been shadowed long enough, site 2 disagrees, no request left elsewhere.
        (LONG, chain([wrong(0.02, 2)], repeat(hit(1.0, site=0, shadowed=True), 600),
                     cycle([wrong(site=2), *[hit(1.0, site=0, shadowed=True)] * 2])), (2,)),
        # Those that disagreed, however long they were good.
        (LONG, chain([wrong(0.02, 0)], (hit(1.0, site=i % 4, shadowed=True) for i in range(3000)),
                     repeat(wrong(site=3))), (0, 3)),
        # Few requests clear only the exact cache, unless it disagrees.
        (QUIET, cycle([hit(1.0, site=EXACT), wrong()]), (NEAREST, 0, 1, 2, 3)),
        (QUIET, repeat(wrong(site=EXACT)), (NEAREST, EXACT, 0, 1, 2, 3)),
    ],
)  # fmt: skip
def test_an_alarm_names_what_cannot_be_cleared(config, served, sites):
    alarm = first_alarm(Monitor(config, DEPTH), served)
    assert alarm is not None
    assert alarm.sites == sites


def test_counters():
    monitor = Monitor(MonitorConfig(drift=False, attention=2), DEPTH)
    for observation in [MISS, hit(0.02), hit(0.02, site=0, shadowed=True), wrong(0.02)]:
        monitor.watch(observation)
    monitor.watch(hit(1.0, site=3, shadowed=True))
    report = monitor.report
    assert (report.requests, report.hits, report.disagreements) == (5, 4, 1)
    assert report.shadows == {0: 1, 1: 1, 3: 1}
    assert report.estimate == pytest.approx(50 / 5)
    assert 0.9 < report.upper <= 1


def test_the_bound_shares_delta_with_those_of_other_versions():
    monitor = Monitor(QUIET, DEPTH)
    for version in (1, 2, 3):
        assert first_alarm(monitor, repeat(MISS, 2000)) is None
        counts = {QUIET.quiet_q: Count(2000, 0)}
        assert monitor.report.upper == pytest.approx(upper_bound(counts, trial_level(QUIET.delta, version)))
        monitor.next_version()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0}, {"version": 2**53}, {"playing": [1.0]}, {"playing": [math.nan] * 5}, {"playing": [-1.0] * 5},
        {"restarts": [0] * 5}, {"counts": [[0.5, 1, 2]]}, {"counts": [[0.0, 2, 1]]}, {"counts": [[0.5, 2, 1]] * 1000},
        {"shadows": {str(i): 1 for i in range(10_000)}}, {"watched": -1}, {"more": 1},
    ],
)  # fmt: skip
def test_a_state_that_no_monitor_can_have_is_refused(change):
    state = json.loads(Monitor(QUIET, DEPTH).state.model_dump_json())
    MonitorState.model_validate_json(json.dumps(state))
    with pytest.raises(ValueError, match=next(iter(change))):
        MonitorState.model_validate_json(json.dumps(state | change))


@pytest.mark.parametrize("changed", [{"score": -0.7}, {"share": 0.4}])
def test_adwin_finds_a_change_of_scores_or_exits_and_hardly_any_before(changed):
    pytest.importorskip("river")
    drift = DriftDetector(DEPTH)

    def drifts(seed, n, *, score=0.0, share=0.7):
        rng = np.random.default_rng(seed)
        rows = zip((rng.random(n) < share).tolist(), rng.normal(score, 1, n).tolist(), strict=True)
        return sum([drift.update(hit(0.02, score=value) if hits else MISS) for hits, value in rows])

    before, after = drifts(0, 10_000), drifts(1, 2000, **changed)
    assert before <= 1 <= after
    assert drift.count == before + after


def test_what_a_monitor_needs_is_named(monkeypatch):
    with pytest.raises(gati_jax.InputError, match="depth: expected"):
        Monitor(QUIET, 0)
    monkeypatch.setitem(sys.modules, "river.drift", None)
    with pytest.raises(gati_jax.InputError, match=r"river.*gati-jax\[adapt\].*drift=False"):
        Monitor(MonitorConfig(), DEPTH)
    Monitor(QUIET, DEPTH)
