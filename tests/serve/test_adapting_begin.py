"""Where adaptation begins: what a folder of versions leads to, kills included; and the background's thread."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gati_jax import InputError
from gati_jax.adaptation import ControllerConfig, MonitorConfig
from gati_jax.adaptation.controller import standing
from gati_jax.bundle import Versions
from gati_jax.bundle.record import certified_only
from gati_jax.pytrees import tree_digest
from serve import adaptive
from serve.adaptive.worker import Worker
from serve.metrics import Metrics
from serve.protocol.model import Tally
from tests.adaptation import world

PATIENCE = 60
KEEPER = ControllerConfig(monitor=MonitorConfig(epsilon=world.EPSILON, stir=False), repeats=None, points=None)


def begin(folder, bundle=None, **options):
    told = adaptive.AdaptiveOptions(folder=folder, **{"keeper": KEEPER, **options})
    return adaptive.build(bundle or world.bundle(), told, capacity=8, observer=Metrics(Tally()))


def certified(*, step=None, epsilon=world.EPSILON):
    """The home plan, certified at an earlier step: other thresholds than those that the bundle came with."""
    home = certified_only(world.bundle())
    step = len(home.plan.path) - 2 if step is None else step
    certificate = dataclasses.replace(home.certificate, step=step, plan_hash=home.plan.hash, epsilon=epsilon)
    return dataclasses.replace(home, certificate=certificate)


def thresholds(begun):
    return begun.adapting.keeper.served.thresholds.tolist()


def given():
    return standing(certified_only(world.bundle())).thresholds.tolist()


def test_without_versions_the_bundle_is_served_as_it_was_given(tmp_path):
    begun = begin(tmp_path)
    assert thresholds(begun) == given()
    assert [source.name for source in begun.sources] == ["default", "base"]
    assert begun.sources[0].epsilon == world.EPSILON
    assert not list(tmp_path.iterdir())


def test_the_current_version_is_served(tmp_path):
    saved = certified()
    Versions(tmp_path, chain=saved.chain).save(saved)
    begun = begin(tmp_path)
    assert thresholds(begun) == standing(saved).thresholds.tolist() != given()
    np.testing.assert_array_equal(begun.sources[0].cascade.thresholds, standing(saved).thresholds)
    assert begun.adapting.keeper.monitor.version == 2


def test_a_version_that_does_not_fit_is_left_alone(tmp_path, caplog):
    other = certified()
    chain = dataclasses.replace(other.chain, params=[np.ones((), np.float32), *other.chain.params[1:]])
    moved = dataclasses.replace(other, chain=chain)
    source = dataclasses.replace(moved.plan.source, base=str(tree_digest(chain.params)))
    plan = dataclasses.replace(moved.plan, source=source)
    certificate = dataclasses.replace(moved.certificate, plan_hash=plan.hash)
    Versions(tmp_path / "base", chain=chain).save(dataclasses.replace(moved, plan=plan, certificate=certificate))
    assert thresholds(begin(tmp_path / "base")) == given()
    assert "a version is left alone" in caplog.text
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "versions.json").write_text('{"history": [1], "newest": 1}')
    assert thresholds(begin(tmp_path / "damaged")) == given()
    assert "served as it was given" in caplog.text


def test_a_promise_that_nothing_certifies_has_to_be_named(tmp_path):
    bundle = world.bundle()
    none = dataclasses.replace(bundle, certificate=dataclasses.replace(bundle.certificate, step=-1))
    with pytest.raises(InputError, match="--adapt-epsilon"):
        begin(tmp_path, none, keeper=None)
    assert begin(tmp_path, none, keeper=None, epsilon=0.1).adapting.state == "safe"


KILLED = """
import os, signal, sys
from pathlib import Path
from gati_jax.adaptation import Versions, versions
from tests.serve.test_adapting_begin import certified
folder, where = Path(sys.argv[1]), sys.argv[2]
kept = Versions(folder, chain=certified().chain)
kept.save(certified(step=1))
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
real = versions.save_bundle
def save_half(path, *args, **kwargs):
    real(path, *args, **kwargs)
    (path / "certificates.json").unlink()
    kill()
if where == "half":
    versions.save_bundle = save_half
elif where == "saved":
    versions.Versions._write = kill
elif where == "entered":
    versions.Versions._prune = kill
kept.save(certified())
"""


@pytest.mark.parametrize(("where", "step"), [("half", 1), ("saved", 1), ("entered", None)])
def test_whoever_is_killed_in_an_update_goes_on_with_the_last_good_version(tmp_path, where, step):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), where],
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == -signal.SIGKILL
    begun = begin(tmp_path)
    assert thresholds(begun) == standing(certified(step=step)).thresholds.tolist()
    saved = certified()
    Versions(tmp_path, chain=saved.chain).save(saved)
    assert thresholds(begin(tmp_path)) == standing(saved).thresholds.tolist()


# The background's thread


class Job:
    """Work that can be counted; the first pieces fail."""

    def __init__(self, failing=0, pieces=10**9):
        self.failing, self.pieces, self.done, self.paused = failing, pieces, 0, threading.Event()

    def work(self, pause=None):
        if self.failing:
            self.failing -= 1
            raise RuntimeError("a bug")
        if self.done >= self.pieces:
            return False
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
    assert 0 < worker.seconds < 0.75 * (time.monotonic() - began)
    assert worker.longest > 0


def test_a_piece_that_rests_long_is_ended_when_the_server_stops():
    worker = Worker(job := Job(), 1e-6)  # rests for half an hour
    worker.start()
    while not job.done:
        time.sleep(0.001)
    assert worker.stop(PATIENCE)


def test_what_fails_is_counted_and_tried_again(monkeypatch, caplog):
    monkeypatch.setattr("serve.adaptive.worker._AGAIN", (0.001, 0.002))
    worker = Worker(job := Job(failing=3), 0.9)
    worker.start()
    assert job.paused.wait(PATIENCE)
    assert worker.stop(PATIENCE)
    assert worker.failures == 3
    assert "background failed" in caplog.text


def test_a_worker_that_never_started_is_stopped():
    assert Worker(Job(), 0.5).stop(0.1)
