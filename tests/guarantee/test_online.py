"""Attacks on what an adapting server promises of its traffic, all of which fail.

1. The traffic is exactly as bad as it may be: alarms are false with probability delta, requests in flight or not.
2. The traffic jumps: it is caught.
3. Shadows are lost, or picked less often than was said: they count as disagreements, and the bound is given up.
4. The server is restarted: evidence goes on. (Its files: tests/serve/test_adaptive_restarts.py.)
"""

from itertools import repeat

import numpy as np
import pytest
from scipy.stats import binom

from gati_jax.adaptation import LOST, Monitor, MonitorConfig, MonitorState
from tests.adaptation.test_monitor import DEPTH, MISS, QUIET, first_alarm, hit, wrong


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
    def served(monitor, rng):
        for t in range(6000):
            q, risk = monitor.q, 0.01 if t < 3000 else 0.25
            yield hit(q, shadowed=rng.random() < q, agrees=rng.random() >= risk)

    caught = 0
    for seed in range(20):
        monitor = Monitor(MonitorConfig(drift=False, epsilon=0.05, quiet_q=0.05), DEPTH)
        alarm = first_alarm(monitor, served(monitor, np.random.default_rng(seed)))
        caught += alarm is not None and monitor.watched > 3000
    assert caught >= 17


def test_a_lost_shadow_is_as_one_that_disagreed():
    lost, told = Monitor(QUIET, DEPTH), Monitor(QUIET, DEPTH)
    for observation in [MISS, hit(0.02), wrong(0.02), MISS, wrong()]:
        told.watch(observation)
        lost.watch(observation._replace(base_class=LOST) if observation.base_class == 2 else observation)
    assert lost.report == told.report._replace(lost=2)


def test_the_bound_is_given_up_where_q_was_smaller_than_promised():
    monitor = Monitor(QUIET, DEPTH)
    assert first_alarm(monitor, repeat(MISS, 5000)) is None
    assert monitor.report.upper < 0.1
    monitor.watch(wrong(0.001))
    assert monitor.report.upper == 1


def resumed(monitor):
    """As after a restart: what was written down, read by another process."""
    other = Monitor(monitor.config, DEPTH)
    other.resume(MonitorState.model_validate_json(monitor.state.model_dump_json()))
    return other


def test_evidence_survives_a_restart():
    """One that is restarted all the time, and one that never is."""
    one = other = Monitor(MonitorConfig(drift=False, epsilon=0.1, attention=1, quiet_q=0.5), DEPTH)
    rng = np.random.default_rng(2)
    for _ in range(3):  # versions
        for kind, coin in rng.random((300, 2)):
            q, agrees = one.q, bool(kind > 0.1)
            observation = hit(q, shadowed=coin < q, agrees=agrees) if kind < 0.7 else MISS
            assert (one.watch(observation) is None) == (other.watch(observation) is None)
            if other.q == 0.5:  # it is quiet: q is no evidence, and starts low
                other = resumed(other)
        assert other.report == one.report
        for monitor in (one, other):
            monitor.next_version()


def test_a_monitor_that_is_restarted_often_alarms_as_if_it_were_not():
    config = MonitorConfig(drift=False, epsilon=0.01)
    monitor, count = Monitor(config, DEPTH), 0
    rng = np.random.default_rng(0)
    while not monitor.report.alarmed and count < 20_000:
        q = monitor.q
        monitor.watch(hit(q, shadowed=rng.random() < q, agrees=rng.random() > 0.1))
        count += 1
        if count % 20 == 0:
            monitor = resumed(monitor)
    assert count < 5000
