"""The cluster on paper: against queueing theory, the real scheduler, and counts that must add up."""

import json

import numpy as np
import pytest

from benchmarks import arrivals, cluster, one_controller
from benchmarks.cluster import Measured
from benchmarks.one_controller import Delay, Traffic
from benchmarks.replicas import ANSWERED, LOST, REFUSED, Cluster, Incident, Steps, simulate
from gati_jax import InputError
from gati_jax.adaptation import MonitorConfig, Trace, save_trace
from serve.engine.records import Job, Route
from serve.engine.scheduler import Scheduler

ONE = Steps(stage_ms={1: [1.0]}, leave=[1.0])
STAGES = Steps(stage_ms={1: [0.5, 1.0], 2: [0.7, 1.4], 4: [1.0, 2.2]}, leave=[0.6, 1.0])


def mean_ms(outcomes, at):
    return float(np.nanmean(outcomes.done - at)) * 1e3


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_replica_with_one_stage_is_a_queue_with_equal_services(load):
    """Pollaczek and Khinchin: the mean wait is load / (2 (1 - load)) services."""
    at = arrivals.poisson(load * 1000, 60, seed=1)
    expected = 1 + load / (2 * (1 - load))
    assert mean_ms(simulate(Cluster(replicas=1), ONE, at), at) == pytest.approx(expected, rel=0.05)


def test_a_proxy_is_such_a_queue_as_well_and_delays_add_up():
    at = arrivals.poisson(500, 60, seed=2)
    idle = Steps(stage_ms={1: [1e-6]}, leave=[1.0])
    found = simulate(Cluster(replicas=1, proxy_ms=1.0, network_ms=3.0), idle, at)
    assert mean_ms(found, at) == pytest.approx(1.5 + 3.0, rel=0.05)


def served_by_the_scheduler(steps, at, leaves):
    """Seconds until each of the requests is answered, by the scheduler of the server."""
    route = Route(
        name="r", sites=(0,), depth=1, epsilon=0.0, stage_ms={k: tuple(v) for k, v in steps.stage_ms.items()},
        leave=tuple(steps.leave),
    )  # fmt: skip
    scheduler, now, came, done = Scheduler([route], 256), 0.0, 0, np.full(len(at), np.nan)
    while came < len(at) or scheduler.waits:
        now = now if scheduler.waits else max(now, at[came])
        while came < len(at) and at[came] <= now:
            scheduler.admit([Job(image=np.zeros(1), route=0, arrived=at[came], mark=came)])
            came += 1
        step = scheduler.next_step(now)
        assert step is not None
        now += steps.stage_ms[step.bucket][step.stage] / 1e3
        marks = np.array([job.mark for job in step.jobs], np.int64)
        left = (leaves[marks] <= step.stage).tolist()
        done[marks[left]] = now
        scheduler.finish(step, left)
    return done


def test_a_replica_batches_as_the_servers_scheduler_does():
    at = arrivals.poisson(1100, 4, seed=3)
    leaves = np.random.default_rng(3).random(len(at)) >= STAGES.leave[0]
    expected = np.mean(served_by_the_scheduler(STAGES, at, leaves) - at) * 1e3
    assert mean_ms(simulate(Cluster(replicas=1), STAGES, at), at) == pytest.approx(expected, rel=0.1)


def test_the_shorter_of_two_queues_is_far_better_than_one_drawn_at_random():
    """Where each request goes to a replica at random, each replica is the queue with equal services above."""
    at = arrivals.poisson(9000, 3, seed=4)
    chosen = simulate(Cluster(replicas=10, any_node=True), ONE, at)
    assert 1 < mean_ms(chosen, at) < 0.5 * (1 + 0.9 / (2 * (1 - 0.9)))


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("kind", ["none", "lost", "away", "both"])
def test_what_becomes_of_requests(replicas, kind):
    at = arrivals.poisson(600 * replicas, 6, seed=5)
    found = simulate(Cluster(replicas=replicas, network_ms=10.0), ONE, at, Incident(kind, 2.0, 0.5, 1.4))
    status = np.bincount(found.status, minlength=3)
    assert status.sum() == len(at)
    assert (np.isfinite(found.done) == (found.status == ANSWERED)).all()
    lost = at[found.status == LOST]
    if kind == "lost":  # those that the replica had, and no others
        assert 1 <= len(lost) <= 30
        assert ((lost > 1.9) & (lost <= 2.0)).all()
    else:
        assert not len(lost)
    away_alone = replicas == 1 and kind in {"lost", "away"}  # all wait for it, and the door refuses what is too much
    assert (status[REFUSED] > 0) == away_alone
    calm = at < 1.9
    assert np.array_equal(found.done[calm], simulate(Cluster(replicas=replicas, network_ms=10.0), ONE, at).done[calm])


def test_alarms_come_later_in_requests_the_more_are_on_their_way():
    config = MonitorConfig(epsilon=0.02, delta=0.05, drift=False)
    traffic = {latency: Traffic(rate=10_000, latency=latency, hits=0.7, quiet=2000) for latency in (0.001, 0.5)}
    near, far = ([one_controller.delay(one, config, seed=seed) for seed in range(3)] for one in traffic.values())
    assert all(one.raised and not one.early for one in (*near, *far))
    assert np.median([one.requests for one in near]) < np.median([one.requests for one in far])
    calm = Traffic(rate=100, latency=0.01, hits=0.7, jump=0.3, most=5000)
    assert not one_controller.delay(calm, config, seed=0).raised


def test_the_command_reads_its_own_result_and_plays_a_trace(tmp_path, capsys):
    known = {"name": "p", "stage_ms": {"1": [0.5, 1.0]}, "leave": [0.6, 1.0], "epsilon": 0.02, "delta": 0.05}
    (tmp_path / "steps.json").write_text(json.dumps({"steps": known}))
    seconds = np.cumsum(np.random.default_rng(0).exponential(1.0, 50))
    save_trace(tmp_path / "t.safetensors", Trace(item=np.zeros(50, np.int32), seconds=seconds))
    words = ["--replicas", "1", "10", "--requests", "2000", "--streams", "1", "--rate", "400", "--per-node", "5"]
    out = tmp_path / "out.json"
    for source in (tmp_path / "steps.json", out):
        cluster.main(["--steps", str(source), "--trace", str(tmp_path / "t.safetensors"), *words, "--out", str(out)])
    first, second = json.loads(out.read_text())["rows"]
    assert (first["alarm"]["load"], second["alarm"]["requests"]) == (pytest.approx(0.4), None)  # 1 ms a request
    assert [run["sent"] for run in second["runs"]] == [2000] * 3
    assert second["runs"][0]["seconds"] == pytest.approx(2000 / 4000, rel=0.1)
    assert first["delta_alone"] == 0.05
    assert second["delta_alone"] == 0.5
    assert "closed after s" in capsys.readouterr().out
    with pytest.raises(InputError, match="--steps: expected the JSON of another run"):
        cluster.main(["--steps", str(tmp_path / "t.safetensors")])


@pytest.mark.parametrize(
    ("delays", "requests"),
    [
        ([Delay(7, raised=True, early=False), Delay(9, raised=True, early=False)], 8.0),
        ([Delay(7, raised=True, early=False), Delay(5, raised=True, early=True)], 7.0),
        ([Delay(7, raised=True, early=False), *[Delay(10**6, raised=False, early=False)] * 2], None),
        ([Delay(0, raised=True, early=True)] * 2, None),
    ],
    ids=["both", "one early", "most missed", "all early"],
)
def test_the_alarm_is_the_median_of_streams_that_had_one_after_the_jump(monkeypatch, delays, requests):
    """Streams without one counted as their length, and none at all as an alarm at once."""
    monkeypatch.setattr(one_controller, "delay", lambda *_, seed: delays[seed])
    steps = Measured(name="r", stage_ms={1: (1.0, 1.0)}, leave=(0.9, 1.0), epsilon=0.02, delta=0.05)
    arguments = cluster.parser().parse_args(["--steps", "s", "--streams", str(len(delays)), "--controller-us", "0"])
    found = cluster.watch(1, 100.0, 0.01, steps, arguments)
    assert (found.requests, found.seconds is None, found.wrong is None) == (requests, *[requests is None] * 2)
    assert (found.early, found.missed) == (sum(d.early for d in delays), sum(not d.raised for d in delays))
