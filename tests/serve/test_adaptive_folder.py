"""The folder of an adaptive server: kills, full and slow disks, damage, a second server; and what "safe" means."""

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gati_jax import InputError
from gati_jax.adaptation import EXACT, NEAREST, Alarm, NearestCacheConfig, Recovery, served_by
from gati_jax.bundle import Versions, save_bundle
from gati_jax.bundle.record import certified_only
from serve import adaptive
from serve.adaptive.worker import Worker
from tests.adaptation import world
from tests.serve.adapted import DEPTH, PATIENCE, QUIET, bright_until, build, certified, ended, running

ROOT = Path(__file__).parents[2]
WITH_NEAREST = dataclasses.replace(QUIET, nearest=NearestCacheConfig(cells=4, capacity=50))


class Disk:
    """Every write of the process meets it: it may be full, broken or slow."""

    def __init__(self, fsync):
        self.error: OSError | None = None
        self.slow, self.entered, self.others = threading.Event(), threading.Event(), []
        self.slow.set()
        self._fsync = fsync

    def __call__(self, descriptor):
        self.others.append(threading.current_thread().name)
        self.entered.set()
        assert self.slow.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        self._fsync(descriptor)

    def fill(self):
        self.error = OSError(errno.ENOSPC, "No space left on device")

    def free(self):
        self.error = None


@pytest.fixture
def disk(monkeypatch):
    disk = Disk(os.fsync)
    monkeypatch.setattr("gati_jax.files.os.fsync", disk)
    return disk


def alarm(adapting, sites=tuple(range(DEPTH))):
    """Raise an alarm, as an observation of a served request does."""
    adapting._guarded(lambda: adapting.controller.on_alarm(Alarm(sites, 100.0, 1)), None)


def until(condition):
    patience = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.001)


def answers(one, images):
    """Ask, and wait until all is observed."""
    found = [future.result(PATIENCE) for future in one.submit(images, route=0)]
    until(lambda: not one.statistics().slots_in_use)
    one.engine.between_steps(lambda: None).result(PATIENCE)
    return found


def exits(one, images):
    return {answer.exit for answer in answers(one, images)}


def names(folder):
    return {path.name for path in folder.iterdir()}


# Kills


def test_an_alarm_outlives_a_kill_at_the_first_answer_that_says_safe(tmp_path):
    """A process of its own, which serves drifted images; and while it runs, no other may use its folder."""
    bundle, folder = world.bundle(), tmp_path / "adapt"
    save_bundle(tmp_path / "b", bundle.chain, bundle.caches, bundle.plan, bundle.certificate, costs=bundle.costs)
    command = [sys.executable, "-m", "tests.serve.adapted", str(folder), str(tmp_path / "b")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout
            assert child.stdout.readline() == "safe\n"
            with pytest.raises(InputError, match="--adapt-dir: expected a folder that no other server uses") as caught:
                build(folder)
            assert "\n" not in str(caught.value)
        finally:
            child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    parts = build(folder)
    assert (parts.adapting.state, parts.adapting.controller.monitor.version) == ("safe", 2)
    assert names(folder) == {"lock", "monitor.json"}


def test_what_killed_writes_have_left_is_deleted(tmp_path):
    ended(tmp_path)
    (tmp_path / "versions" / ".000001.saving-x").mkdir(parents=True)
    for name in (".monitor.json.x", ".versions.json.y"):
        (tmp_path / name).write_text("half")
    build(tmp_path)
    assert names(tmp_path) == {"lock", "monitor.json", "versions"}
    assert not list((tmp_path / "versions").iterdir())


# The disk


def test_no_request_waits_for_the_disk_and_no_answer_says_safe_before_it_is_saved(tmp_path, disk, monkeypatch):
    monkeypatch.setattr("serve.adaptive.engine._SAVING", PATIENCE)
    with running(build(tmp_path, capacity=64)) as one:
        disk.entered.clear()
        disk.slow.clear()
        one.engine.between_steps(lambda: alarm(one)).result(PATIENCE)
        assert disk.entered.wait(PATIENCE)
        futures = one.submit(world.images(16, 5), route=0)
        assert one.notes(0) == {"adaptation": "safe"}
        assert one.read(lambda controller: controller.monitor.version) == 2, "the lock is free"
        time.sleep(0.05)
        assert not any(future.done() for future in futures)
        disk.slow.set()
        assert {future.result(PATIENCE).exit for future in futures} == {DEPTH}
        assert '"closed": [\n' in (tmp_path / "monitor.json").read_text()
    assert set(disk.others) <= {"MainThread", "adaptation-state"}, "neither the engine nor the service"


def test_a_disk_that_hangs_holds_answers_up_for_a_while_only(tmp_path, disk, monkeypatch):
    monkeypatch.setattr("serve.adaptive.engine._SAVING", 0.01)
    with running(build(tmp_path, capacity=64)) as one:
        disk.slow.clear()
        one.engine.between_steps(lambda: alarm(one)).result(PATIENCE)
        assert exits(one, world.images(16, 5)) == {DEPTH}
        disk.slow.set()


def test_an_alarm_on_a_full_disk_outlives_the_server(tmp_path, disk, caplog):
    monitor, aside = tmp_path / "monitor.json", tmp_path / "monitor.unsaved.json"
    with running(build(tmp_path, capacity=64)) as one:
        disk.fill()
        alarm(one, (1,))
        assert exits(one, world.images(16, 5)) == {DEPTH}
        until(lambda: one.saver.failing)
        assert one.state == "safe"
    assert "cannot be saved" in caplog.text
    assert (aside.exists(), monitor.exists()) == (True, False)
    for _ in range(2):
        parts = build(tmp_path)
        assert (parts.adapting.state, parts.adapting.controller.monitor.version) == ("safe", 2)
        assert any("could not be written" in getattr(record, "why", "") for record in caplog.records)
    disk.free()
    for _ in range(2):
        parts = build(tmp_path)
        assert (parts.adapting.state, parts.adapting.controller.monitor.version) == ("safe", 2)
        assert (aside.exists(), monitor.exists()) == (False, True)


def test_what_cannot_be_saved_is_not_served_until_it_can(tmp_path, disk, monkeypatch):
    monkeypatch.setattr("serve.adaptive.worker._AGAIN", 0.01)
    disk.fill()
    with running(build(tmp_path, capacity=64)) as one:
        assert (one.state, one.saver.failing) == ("safe", True)
        assert exits(one, world.images(16, 5)) == {DEPTH}
        disk.free()
        until(lambda: one.state == "open")
        assert exits(one, world.images(16, 6)) != {DEPTH}
        disk.fill()
        one.adopt(one.controller.served, "again")
        assert exits(one, world.images(16, 7)) == {DEPTH}
        assert one.notes(0) == {"adaptation": "safe"}
        disk.free()
        until(lambda: one.state == "open")
        assert exits(one, world.images(16, 8)) != {DEPTH}


def test_a_full_disk_where_nothing_changes_pauses_trials_alone(tmp_path, disk, monkeypatch, caplog):
    monkeypatch.setattr("serve.adaptive.worker._AGAIN", 0.01)
    monkeypatch.setattr("serve.adaptive.worker._SAVE", 0.01)
    pieces, parts = [], build(tmp_path, capacity=64)
    worker = Worker(parts.worker.recovery, 0.9, parts.worker._allowed)
    monkeypatch.setattr(worker.recovery, "work", lambda _: pieces.append(1))
    with running(parts) as one:
        disk.fill()
        until(lambda: one.saver.failing)
        assert not worker._allowed()
        assert exits(one, world.images(16, 5)) != {DEPTH}
        worker.start()
        time.sleep(0.05)
        assert not pieces
        disk.free()
        until(lambda: pieces)
        assert worker.stop(PATIENCE)
    assert "trials go on" in caplog.text
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_full_disk_while_a_trial_begins_spends_no_number_and_ends_nothing(tmp_path, disk):
    """Neither the nearest cache's, whose number another thread stores, nor a plan's."""
    parts = build(tmp_path)
    level, recovery = parts.store.level, parts.worker.recovery
    assert isinstance(recovery, Recovery)
    assert level() is None, "its number is not stored yet"
    disk.fill()
    with pytest.raises(OSError, match="No space"):
        parts.adapting.save()
    assert level() is None
    alarm(parts.adapting)
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            recovery.work()
    disk.free()
    parts.adapting.save()
    assert level() is not None
    assert level() is None
    parts.adapting.save()
    assert recovery.work()
    assert recovery.trial
    assert recovery.trial.version == 3
    assert recovery.trial.plan is recovery.certified.plan


def test_a_full_tmpfs(tmp_path):
    """The same on a file system that is full indeed: alarm, end, start, space."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "x", folder], check=False).returncode:
        pytest.skip("no right to mount")
    try:
        with running(build(folder, capacity=64)) as one:
            with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
                while filler.write(bytes(4096)):
                    pass
            bright_until(one, lambda: one.notes(0) == {"adaptation": "safe"})
            until(lambda: one.saver.failing)
        assert build(folder).adapting.state == "safe"
        (folder / "filler").unlink()
        for _ in range(2):
            parts = build(folder)
            assert (parts.adapting.state, parts.adapting.controller.monitor.version) == ("safe", 2)
        assert names(folder) == {"lock", "monitor.json", "versions.json", "versions.copy.json"}
    finally:
        ended(folder)
        subprocess.run(["umount", folder], check=True)


# Folders that cannot be used


def a_file(path):
    path.write_text("x")
    return path


UNUSABLE = {
    "a file": a_file,
    "below a file": lambda path: a_file(path) / "adapt",
    "a device": lambda _: Path(os.devnull),
    "nowhere": lambda _: Path("/proc/adapt"),
    "a folder in place of the state": lambda path: (path / "monitor.json" / "x").mkdir(parents=True) or path,
    "a folder in place of the lock": lambda path: (path / "lock").mkdir(parents=True) or path,
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(tmp_path, kind):
    folder = UNUSABLE[kind](tmp_path / "x")
    with pytest.raises(InputError, match=r"^--adapt-dir: expected a folder that can be written, got ") as caught:
        build(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_served(tmp_path, disk, number):
    disk.error = OSError(number, os.strerror(number))
    with pytest.raises(InputError, match="--adapt-dir: expected a folder that can be written"):
        build(tmp_path)
    disk.free()
    assert build(tmp_path).adapting.state == "open", "and is not held"


def test_a_folder_has_one_server_until_that_has_stopped(tmp_path):
    def another():
        return adaptive.build(world.bundle(), tmp_path, capacity=8, config=QUIET)

    with running(build(tmp_path, capacity=64)), pytest.raises(InputError, match="no other server"):
        another()
    another().store.close()


# Damage

DAMAGES = {"empty": b"", "no JSON": b'{"history": [1', "not UTF-8": b"\xff" * 99, "another form": b'{"trials": -1}'}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("copy", [True, False], ids=["the copy whole", "the copy damaged"])
def test_damaged_versions_begin_closed_and_no_number_comes_again(tmp_path, caplog, damage, copy):
    saved = certified()
    versions = Versions(tmp_path, chain=saved.chain)
    number = versions.save(saved)
    assert build(tmp_path).adapting.state == "open"
    ended(tmp_path)
    trials = [versions.next_trial() for _ in range(3)]
    for name in ("versions.json", *(() if copy else ("versions.copy.json",))):
        (tmp_path / name).write_bytes(DAMAGES[damage])
    first, parts = build(tmp_path), build(tmp_path)
    assert first.adapting.state == parts.adapting.state == "safe"
    assert first.adapting.controller.monitor.version == parts.adapting.controller.monitor.version == 3
    recovery = parts.worker.recovery
    (line,) = [record for record in caplog.records if "begin closed" in record.getMessage()]
    assert "versions.json" in line.why
    assert isinstance(recovery, Recovery)
    assert recovery.work()
    assert recovery.trial
    later = recovery.trial.version
    assert trials[-1] < later < 10 if copy else later > 10**9
    ended(tmp_path)
    assert versions.save(saved) > number


@pytest.mark.parametrize("now", [None, 5.0], ids=["now", "a clock that has begun anew"])
def test_damage_of_both_files_begins_with_numbers_that_no_process_can_have_come_to(tmp_path, now, monkeypatch):
    if now is not None:
        monkeypatch.setattr("gati_jax.bundle.versions.time.time", lambda: now)
    build(tmp_path)
    for name in ("versions.json", "versions.copy.json", "monitor.json"):
        (tmp_path / name).write_bytes(b"")
    for _ in range(2):
        parts = build(tmp_path)
        assert (parts.adapting.state, parts.adapting.controller.monitor.version > 10**9) == ("safe", True)
        assert parts.adapting.controller.monitor.level > 0


def test_a_state_whose_alarm_closed_nothing_is_not_trusted(tmp_path):
    build(tmp_path)
    file = tmp_path / "monitor.json"
    file.write_text(file.read_text().replace('"alarmed": false', '"alarmed": true'))
    parts = build(tmp_path)
    assert (parts.adapting.state, parts.adapting.controller.monitor.version) == ("safe", 2)


# What is safe


@pytest.mark.parametrize("config", [QUIET, WITH_NEAREST], ids=["exact", "with nearest"])
def test_where_the_state_is_safe_no_stored_answer_is_given(tmp_path, config, monkeypatch):
    """Repeats, which the exact cache knew before, and near repeats; also of requests that were asked just before."""
    images = world.images(20, 5)
    with running(build(tmp_path, config=config, capacity=64)) as one:
        assert [exits(one, images) for _ in range(3)][-1] == {EXACT}
        ask = one._ask
        with monkeypatch.context() as patch:
            patch.setattr(one, "_ask", lambda images: (ask(images), alarm(one, (NEAREST, *range(DEPTH))))[0])
            assert exits(one, images) == {DEPTH}
        assert (one.state, one.notes(0)) == ("safe", {"adaptation": "safe"})
        given = one.cache_answers.copy()
        for _ in range(3):
            assert exits(one, images) == {DEPTH}
            assert exits(one, np.clip(images, 1, None)) == {DEPTH}
        assert one.cache_answers == given
        one.adopt(served_by(certified_only(world.bundle())), "certified by a trial")
        until(lambda: one.state == "open")
        assert [exits(one, images) for _ in range(3)][-1] == {EXACT}


def test_an_open_nearest_cache_is_no_safe_state(tmp_path):
    images = world.images(8, 5)
    config = dataclasses.replace(WITH_NEAREST, exact=None)
    with running(build(tmp_path, config=config, capacity=64)) as one:
        alarm(one)
        assert exits(one, images) == {DEPTH}
        assert one.state == "safe"
        one.read(lambda c: [setattr(c.trial, "state", "open"), setattr(c.input_cache, "threshold", -np.inf)])
        assert exits(one, images) == {NEAREST}
        assert (one.state, one.notes(0)) == ("part", {"adaptation": "2"})
        alarm(one, (NEAREST,))
        assert exits(one, images) == {DEPTH}
        assert (one.state, one.notes(0)) == ("safe", {"adaptation": "safe"})
