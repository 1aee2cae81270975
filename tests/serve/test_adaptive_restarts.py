"""Adaptation over restarts: what a server starts with, what outlives it, and the worker that keeps it."""

import dataclasses
import logging
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gati_jax import InputError
from gati_jax.adaptation import Alarm, MonitorConfig, Observation, Recovery, served_by
from gati_jax.bundle import Versions, save_bundle
from gati_jax.bundle.record import certified_only
from gati_jax.pytrees import tree_digest
from serve.adaptive.worker import Throttle, Worker
from tests.adaptation import world
from tests.serve.adapted import DEPTH, PATIENCE, QUIET, as_given, build, certified, ended, of, served


def test_without_versions_the_bundle_is_served_as_it_was_given(tmp_path):
    parts = build(tmp_path)
    assert parts.adapting.controller.served.thresholds.tolist() == as_given()
    assert [source.name for source in parts.sources] == ["default", "base"]
    assert parts.sources[0].epsilon == world.EPSILON
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "monitor.json"}, "it can be written"


def test_the_current_version_is_served(tmp_path):
    saved = certified()
    Versions(tmp_path, chain=saved.chain).save(saved)
    parts = build(tmp_path)
    assert served(tmp_path) == of(saved) != as_given()
    np.testing.assert_array_equal(parts.sources[0].cascade.thresholds, served_by(saved).thresholds)
    assert parts.adapting.controller.monitor.version == 2


def test_a_version_that_does_not_fit_is_not_served(tmp_path, caplog):
    other = certified()
    chain = dataclasses.replace(other.chain, params=[np.ones((), np.float32), *other.chain.params[1:]])
    moved = dataclasses.replace(other, chain=chain)
    source = dataclasses.replace(moved.plan.source, base=str(tree_digest(chain.params)), logits=(), sites=())
    plan = dataclasses.replace(moved.plan, source=source)
    certificate = dataclasses.replace(moved.certificate, plan_hash=plan.hash)
    Versions(tmp_path / "base", chain=chain).save(dataclasses.replace(moved, plan=plan, certificate=certificate))
    assert served(tmp_path / "base") == as_given()
    assert "a version is not served" in caplog.text
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "versions.json").write_text('{"history": [1], "newest": 1}')
    assert served(tmp_path / "damaged") == as_given()
    assert "served as it was given" in caplog.text


def test_a_promise_that_nothing_certifies_has_to_be_named(tmp_path):
    bundle = world.bundle()
    none = dataclasses.replace(bundle, certificate=dataclasses.replace(bundle.certificate, step=-1))
    with pytest.raises(InputError, match="--adapt-epsilon"):
        build(tmp_path, none, config=None)
    assert build(tmp_path, none, config=None, epsilon=0.1).adapting.state == "safe"


@pytest.mark.parametrize(("side", "rows"), [(224, (1716, 858)), (448, None)])
def test_bundles_of_large_images_are_served(tmp_path, caplog, side, rows):
    """The log keeps fewer requests, so that its images fit; where a refit finds too few, there are none."""
    caplog.set_level(logging.WARNING)
    small = world.bundle()
    spec = jax.ShapeDtypeStruct((side, side, 3), np.dtype("float32"))
    large = dataclasses.replace(small, chain=dataclasses.replace(small.chain, input_spec=spec))
    parts = build(tmp_path, large, config=None)
    assert parts.adapting.request_log.capacity == 512 * 2**20 // (side * side * 3)
    assert isinstance(parts.worker.recovery, Recovery)
    assert parts.worker.recovery.rows == rows
    said = [record.getMessage() for record in caplog.records if "no refits" in record.getMessage()]
    assert ["--adapt-without refit" in line for line in said] == [True] * (rows is None)
    caplog.clear()
    build(tmp_path, large, config=None, without=("refit",))
    assert "no refits" not in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
from gati_jax import load_bundle
from gati_jax.bundle import Versions, versions
from tests.adaptation.world import chain

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def save_half(path, *args, real=versions.save_bundle, **kwargs):
    real(path, *args, **kwargs)
    (path / "certificates.json").unlink()
    kill()

def update(folder, where):
    bundle = load_bundle(folder / "next", chain=chain())
    if where == "half":
        versions.save_bundle = save_half
    elif where == "saved":
        Versions._update = kill
    elif where == "entered":
        Versions._prune = kill
    Versions(folder / where, chain=chain()).save(bundle)

for where in sys.argv[2:]:  # one process each, which nothing but the fork slows down: JAX has not started here yet
    if not (child := os.fork()):
        update(Path(sys.argv[1]), where)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, where
"""


def test_a_server_killed_in_an_update_resumes_the_last_good_version(tmp_path):
    """Half a version written; written whole, but not entered; entered, but the old ones not deleted."""
    old, new = certified(step=1), certified()
    save_bundle(tmp_path / "next", new.chain, new.caches, new.plan, new.certificate, costs=new.costs)
    cases = {"half": old, "saved": old, "entered": new}
    for where in cases:
        Versions(tmp_path / where, chain=old.chain).save(old)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), *cases], check=True, cwd=root, env=environment)
    for where, expected in cases.items():
        assert served(tmp_path / where) == of(expected), where
        ended(tmp_path / where)
        kept = Versions(tmp_path / where, chain=new.chain)
        assert kept.save(new) == kept.load_current().number, where


# Restarts


def alarmed(parts):
    """Have every cache closed by an alarm."""
    parts.adapting.resume(lambda one: one.on_alarm(Alarm(tuple(range(DEPTH)), 100.0, one.monitor.version)))


def test_an_alarm_and_its_delta_outlive_the_server(tmp_path):
    for version in (2, 2, 2):
        parts = build(tmp_path)
        controller = parts.adapting.controller
        if version > controller.monitor.version:
            assert controller.served.is_open
            alarmed(parts)
        assert not controller.served.is_open
        assert (controller.monitor.version, controller.closed_at) == (version, 0)
    assert (tmp_path / "monitor.json").stat().st_size < 4096
    assert as_given() == of(certified_only(world.bundle()))


def test_evidence_outlives_the_server(tmp_path):
    miss = Observation(DEPTH, math.inf, 0, 1.0, 0)
    wrong = Observation(1, 2.0, 0, 1.0, 1)
    for number in range(20):
        parts = build(tmp_path)
        monitor = parts.adapting.controller.monitor
        assert (monitor.version, monitor.watched, monitor.report.disagreements) == (1, 50 * number, number)
        for observation in [miss] * 49 + [wrong]:
            monitor.watch(observation)
        parts.adapting.save()


def test_a_version_whose_alarm_has_fired_is_withdrawn(tmp_path):
    """Loaded at the start, closed by an alarm; the server ends before its worker has done anything, or after."""
    saved = certified()
    versions = Versions(tmp_path, chain=saved.chain)
    number = versions.save(saved)
    assert build(tmp_path).adapting.controller.served.is_open
    parts = build(tmp_path)
    assert parts.adapting.controller.served.is_open
    alarmed(parts)
    parts = build(tmp_path)
    assert (parts.adapting.state, versions.history) == ("safe", (number,))
    parts.worker.recovery.work()
    assert versions.history == ()
    parts = build(tmp_path)
    assert (parts.adapting.state, parts.adapting.controller.number) == ("safe", 0), "nor the bundle, before a trial"
    ended(tmp_path)
    versions.save(saved)  # as a trial does, the server being killed before it could serve it
    parts = build(tmp_path)
    assert parts.adapting.state == "safe", "an alarm may have come meanwhile"
    parts.worker.recovery.work()
    assert versions.history == ()


DAMAGES = {
    "empty": lambda _: b"", "no JSON": lambda text: text[:-9], "not UTF-8": lambda _: b"\xff" * 99,
    "large": lambda text: text + b" " * 2**21, "deep": lambda _: b"[" * 100_000,
    "another field": lambda text: text.replace(b'"number"', b'"nombre"'),
    "no number": lambda text: text.replace(b'"watched": 0', b'"watched": NaN'),
    "another bundle": lambda text: text.replace(b'"bundle": "', b'"bundle": "a'),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_trusted_begins_closed_and_with_fresh_numbers(tmp_path, caplog, damage):
    build(tmp_path).adapting.save()
    file = tmp_path / "monitor.json"
    text = file.read_bytes()
    file.write_bytes(DAMAGES[damage](text))
    assert file.read_bytes() != text
    parts = build(tmp_path)
    assert parts.adapting.state == "safe"
    assert parts.adapting.controller.monitor.version > 1
    (line,) = [record for record in caplog.records if "begin closed" in record.getMessage()]
    assert len(line.why) < 500
    assert "monitor.json" in line.why
    parts.adapting.save()
    assert build(tmp_path).adapting.state == "safe", "until a trial"


def test_another_promise_shares_delta_and_where_trials_came_before_a_missing_file_is_no_fresh_start(tmp_path):
    build(tmp_path).adapting.save()
    wide = dataclasses.replace(QUIET, monitor=MonitorConfig(epsilon=2 * world.EPSILON, drift=False))
    controller = build(tmp_path, config=wide).adapting.controller
    assert (controller.monitor.version, controller.served.is_open) == (2, True)
    (tmp_path / "monitor.json").unlink()
    controller = build(tmp_path).adapting.controller
    assert controller.monitor.version > DEPTH
    assert not controller.served.is_open


# The worker


@given(st.floats(0.01, 1), st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_work_takes_its_share_of_the_time(share, pieces):
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    throttle = Throttle(share, clock=lambda: now, sleep=sleep).start()
    for piece in pieces:
        now += piece
        throttle()
    assert throttle.worked == pytest.approx(sum(pieces))
    assert throttle.worked == pytest.approx(share * now)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_no_such_share(share):
    with pytest.raises(InputError, match="share"):
        Throttle(share)


class Job:
    """Work that can be counted; the first pieces fail."""

    def __init__(self, failing=0):
        self.failing, self.done, self.paused = failing, 0, threading.Event()

    def work(self, pause=None):
        if self.failing:
            self.failing -= 1
            raise RuntimeError("a bug")
        self.done += 1
        time.sleep(0.002)
        assert pause
        pause()
        self.paused.set()
        return True


def test_work_is_done_in_its_share_of_the_time():
    job = Job()
    worker = Worker(job, 0.5)
    began = time.monotonic()
    worker.start()
    assert job.paused.wait(PATIENCE)
    time.sleep(0.05)
    assert worker.stop(PATIENCE)
    assert 0 < worker.throttle.worked < 0.75 * (time.monotonic() - began)


def test_a_long_pause_ends_when_the_server_stops():
    assert Worker(Job(), 0.5).stop(0.1), "it never started"
    worker = Worker(job := Job(), 1e-6)  # sleeps for half an hour
    worker.start()
    while not job.done:
        time.sleep(0.001)
    assert worker.stop(PATIENCE)


def test_a_piece_that_fails_is_counted_and_tried_again(monkeypatch, caplog):
    monkeypatch.setattr("serve.adaptive.worker._RETRY", (0.001, 0.002))
    worker = Worker(job := Job(failing=3), 0.9)
    worker.start()
    assert job.paused.wait(PATIENCE)
    assert worker.stop(PATIENCE)
    assert worker.failures == 3
    assert "recovery failed" in caplog.text
