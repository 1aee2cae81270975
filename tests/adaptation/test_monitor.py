"""The monitor against what it promises: q, episodes, named exits, counters, versions, false alarms, drift."""

import math
import sys

import numpy as np
import pytest
from scipy.stats import beta, binom

import gati_jax
from gati_jax.adaptation import EXACT, NEAREST, Monitor, MonitorConfig, Observation
from gati_jax.adaptation.monitor import DriftDetector
from gati_jax.certification.betting import EProcess

DEPTH = 4
MISS = Observation(DEPTH, math.inf, 3, 1.0, 3)
QUIET = MonitorConfig(drift=False)


def hit(q, *, site=1, shadowed=False, agrees=True, score=0.5):
    return Observation(site, score, 7, q, (7 if agrees else 2) if shadowed else None)


class Scripted:
    """A change test that fires at the numbers it is scripted to."""

    def __init__(self, *fires):
        self.fires, self.taken = fires, []

    @property
    def drift_detected(self):
        return len(self.taken) - 1 in self.fires

    def update(self, x):
        self.taken.append(x)


def scripted(scores=(), exits=()):
    made = [Scripted(*scores), Scripted(*exits)]
    left = iter(made)
    return DriftDetector(DEPTH, lambda: next(left)), made


def test_quiet_until_a_shadow_disagrees_and_quiet_again_after():
    monitor = Monitor(QUIET, DEPTH)
    for observation in [MISS, hit(0.02), hit(0.02, shadowed=True), hit(0.02, site=EXACT)]:
        assert monitor.watch(observation) is None
        assert monitor.q == 0.02
    monitor.watch(hit(0.02, shadowed=True, agrees=False))
    for left in range(QUIET.hold, 0, -1):
        assert monitor.q == 1.0, left
        monitor.watch(MISS)
    assert monitor.q == 0.02


def test_attention_starts_again_with_every_disagreement():
    monitor = Monitor(MonitorConfig(drift=False, attention=5, epsilon=0.4), DEPTH)
    monitor.watch(hit(0.02, shadowed=True, agrees=False))
    for _ in range(4):
        monitor.watch(MISS)
    monitor.watch(hit(1.0, shadowed=True, agrees=False))
    for _ in range(5):
        assert monitor.q == 1.0
        monitor.watch(MISS)
    assert monitor.q == 0.02


@pytest.mark.parametrize("where", ["scores", "exits"])
def test_a_drift_raises_q(where):
    drift, (scores, exits) = scripted(**{where: (2,)})
    monitor = Monitor(MonitorConfig(), DEPTH, drift)
    for _ in range(2):
        monitor.watch(MISS)
        monitor.watch(hit(0.02, score=1e9))
    raised = monitor.q == 1.0
    assert raised == (where == "exits")
    monitor.watch(hit(0.02))
    assert monitor.q == 1.0
    assert monitor.report.drifts == 1
    assert scores.taken == [50.0, 50.0, 0.5]  # those of hits, bounded
    assert exits.taken == [1, 1 / 4, 1, 1 / 4, 1 / 4]


def test_the_e_value_is_that_of_the_bets():
    """Under its own q, and as in quiet while requests with an older q may be about."""
    config = MonitorConfig(drift=False, in_flight=3, attention=10, delta=1e-6)
    monitor, e_process = Monitor(config, DEPTH), EProcess(0.01)
    served = [hit(0.02, shadowed=True, agrees=False), hit(0.02), MISS, hit(0.02, shadowed=True, agrees=False)]
    served.append(hit(1.0, shadowed=True))
    for observation, probability in zip(served, [0.02, 0.02, 0.02, 0.02, 1.0], strict=True):
        seen = observation.base_class not in (None, observation.class_index)
        e_process.bet(1 / observation.q if seen else 0.0, probability)
        monitor.watch(observation)
    assert monitor.report.e_value == pytest.approx(e_process.total)
    assert monitor.report.estimate == pytest.approx((2 / 0.02) / 5)


def test_one_alarm_a_version_and_the_next_needs_more():
    monitor, alarms = Monitor(QUIET, DEPTH), []
    for _ in range(300):
        alarm = monitor.watch(hit(1.0, shadowed=True, agrees=False))
        if alarm:
            alarms.append(alarm)
    assert [a.version for a in alarms] == [1]
    assert monitor.report.alarmed
    assert alarms[0].e_value >= 1 / QUIET.level(1)
    monitor.next_version()
    assert monitor.report.e_value == pytest.approx(1)
    assert (monitor.version, monitor.report.requests, monitor.report.alarmed) == (2, 0, False)
    while not (alarm := monitor.watch(hit(1.0, shadowed=True, agrees=False))):
        pass
    assert alarm.version == 2
    assert alarm.e_value >= 1 / QUIET.level(2)


def test_all_versions_share_delta():
    levels = [QUIET.level(j) for j in range(1, 20_000)]
    assert 0.999 * QUIET.delta < sum(levels) < QUIET.delta


def test_an_alarm_names_what_cannot_be_cleared():
    """Site 0 has been shadowed long enough, site 2 disagrees, no request left at 3."""
    config = MonitorConfig(drift=False, epsilon=0.1, delta=0.05, attention=10**6)
    monitor = Monitor(config, DEPTH)
    monitor.watch(hit(0.02, site=2, shadowed=True, agrees=False))
    alarm = None
    for i in range(10_000):
        wrong = i > 600 and i % 3 == 0
        alarm = monitor.watch(hit(1.0, site=2 if wrong else 0, shadowed=True, agrees=not wrong))
        if alarm:
            break
    assert alarm is not None
    worst = beta.ppf(1 - 0.05 / DEPTH, 1, monitor.report.requests)
    assert 3 * worst < 0.1  # the other three, at their worst
    assert alarm.sites == (2,)


def test_an_alarm_names_what_disagreed_however_long_it_was_good():
    monitor, alarm = Monitor(MonitorConfig(drift=False, epsilon=0.1, attention=10**6), DEPTH), None
    monitor.watch(hit(0.02, site=0, shadowed=True, agrees=False))
    for i in range(3000):
        monitor.watch(hit(1.0, site=i % 4, shadowed=True))
    while not alarm:
        alarm = monitor.watch(hit(1.0, site=3, shadowed=True, agrees=False))
    assert alarm.sites == (0, 3)


def test_few_requests_clear_only_the_exact_cache():
    monitor, alarm = Monitor(QUIET, DEPTH), None
    while not alarm:
        monitor.watch(hit(1.0, site=EXACT))
        alarm = monitor.watch(hit(1.0, shadowed=True, agrees=False))
    assert alarm.sites == (NEAREST, 0, 1, 2, 3)


def test_an_alarm_names_the_exact_cache_if_it_disagrees():
    monitor, alarm = Monitor(QUIET, DEPTH), None
    while not alarm:
        alarm = monitor.watch(hit(1.0, site=EXACT, shadowed=True, agrees=False))
    assert EXACT in alarm.sites


def test_counters():
    monitor = Monitor(MonitorConfig(drift=False, attention=2), DEPTH)
    for observation in [MISS, hit(0.02), hit(0.02, site=0, shadowed=True), hit(0.02, shadowed=True, agrees=False)]:
        monitor.watch(observation)
    monitor.watch(hit(1.0, site=3, shadowed=True))
    report = monitor.report
    assert (report.requests, report.hits, report.disagreements) == (5, 4, 1)
    assert report.shadows == {0: 1, 1: 1, 3: 1}
    assert report.estimate == pytest.approx(50 / 5)
    assert 0.9 < report.upper <= 1


def test_the_bound_is_given_up_where_q_was_smaller_than_promised():
    monitor = Monitor(QUIET, DEPTH)
    for _ in range(5000):
        monitor.watch(MISS)
    assert monitor.report.upper < 0.1
    monitor.watch(hit(0.001, shadowed=True, agrees=False))
    assert monitor.report.upper == 1


@pytest.mark.parametrize("in_flight", [0, 20])
def test_false_alarms_at_exactly_epsilon(in_flight):
    """With requests in flight, each carries the q of when it came."""
    config = MonitorConfig(epsilon=0.05, delta=0.2, quiet_q=0.05, drift=False, in_flight=in_flight)
    alarms, streams = 0, 100
    for seed in range(streams):
        rng, monitor = np.random.default_rng(seed), Monitor(config, DEPTH)
        rows = zip(rng.random(800).tolist(), rng.random(800).tolist(), strict=True)
        qs = [monitor.q] * (in_flight + 1)
        for kind, coin in rows:
            q = qs.pop(0)
            observation = hit(q, shadowed=coin < q, agrees=kind > 0.05) if kind < 0.7 else MISS
            if monitor.watch(observation):
                alarms += 1
                break
            qs.append(monitor.q)
    assert alarms <= binom.isf(1e-6, streams, config.delta)


def test_a_jump_is_caught():
    caught = 0
    for seed in range(20):
        rng, monitor = (
            np.random.default_rng(seed),
            Monitor(MonitorConfig(drift=False, epsilon=0.05, quiet_q=0.05), DEPTH),
        )
        alarm = None
        for t in range(6000):
            risk = 0.01 if t < 3000 else 0.25
            q = monitor.q
            alarm = monitor.watch(hit(q, shadowed=rng.random() < q, agrees=rng.random() >= risk))
            if alarm:
                break
        caught += alarm is not None and monitor.watched > 3000
    assert caught >= 17


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": 0.0},
        {"epsilon": 0.6},
        {"delta": float("nan")},
        {"quiet_q": 0.0},
        {"attention": 0},
        {"in_flight": -1},
    ],
)
def test_bad_settings(wrong):
    with pytest.raises(gati_jax.InputError, match="expected"):
        MonitorConfig(**wrong)


def test_bad_depth():
    with pytest.raises(gati_jax.InputError, match="depth: expected"):
        Monitor(QUIET, 0)


# --- Drift ------------------------------------------------------------------------------------------------------------


def stream(seed, n, *, score=0.0, share=0.7):
    rng = np.random.default_rng(seed)
    for hits, value in zip((rng.random(n) < share).tolist(), rng.normal(score, 1, n).tolist(), strict=True):
        yield hit(0.02, score=value) if hits else MISS


@pytest.mark.parametrize("changed", [{"score": -0.7}, {"share": 0.4}])
def test_adwin_finds_a_change_of_scores_or_exits_and_hardly_any_before(changed):
    pytest.importorskip("river")
    drift = DriftDetector(DEPTH)
    before = sum([drift.update(observation) for observation in stream(0, 10_000)])
    after = sum([drift.update(observation) for observation in stream(1, 2000, **changed)])
    assert before <= 1
    assert after >= 1
    assert drift.count == before + after


def test_a_monitor_without_river_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "river.drift", None)
    with pytest.raises(gati_jax.InputError, match=r"river.*gati-jax\[adapt\].*drift=False"):
        Monitor(MonitorConfig(), DEPTH)
    Monitor(MonitorConfig(drift=False), DEPTH)
