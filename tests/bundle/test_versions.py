"""Versions on disk: saved, withdrawn, deleted, counted; damaged and forged ones."""

import shutil
import threading
from pathlib import Path

import pytest

from gati_jax import BundleError, InputError
from gati_jax.bundle import Versions, versions
from tests.bundle.made import answers, edit, in_memory, make


def store(path: Path, keep: int = 5) -> Versions:
    return Versions(path, keep=keep, chain=make(77)[0])


def current(path: Path) -> list[bytes]:
    return answers(store(path).load_current().bundle)


@pytest.fixture
def copy(saved_versions, tmp_path) -> Path:
    return shutil.copytree(saved_versions, tmp_path / "v")


def test_save_load_and_withdraw(copy):
    kept = store(copy)
    assert kept.history == (1, 2)
    assert current(copy) == answers(in_memory(make(1)))
    kept.withdraw(2)
    assert kept.load_current().number == 1
    assert current(copy) == answers(in_memory(make(2)))
    assert kept.save(in_memory(make(3))) == 3, "numbers are not used twice"
    assert kept.history == (1, 3)
    kept.withdraw(3)
    assert kept.load_current().number == 1, "what was withdrawn does not come back"


def test_old_versions_are_deleted(copy):
    kept = store(copy, keep=2)
    kept.save(in_memory(make(3)))
    assert kept.history == (2, 3)
    assert sorted(p.name for p in (copy / "versions").iterdir()) == ["000002", "000003"]


def test_trials_are_counted_across_processes(copy):
    assert [store(copy).next_trial() for _ in range(3)] == [1, 2, 3]
    store(copy).save(in_memory(make(3)))
    assert store(copy).next_trial() == 4


def test_no_trial_number_is_given_twice_however_many_write(tmp_path, monkeypatch):
    """Each with its own open files, as processes have."""
    monkeypatch.setattr(versions, "_PATIENCE", 60.0)
    given: list[int] = []
    threads = [
        threading.Thread(target=lambda: given.extend(Versions(tmp_path).next_trial() for _ in range(10)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == list(range(1, 61))


def test_a_claimed_folder_is_written_by_one_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "_PATIENCE", 0.02)
    (tmp_path / "versions").mkdir()
    for name in (".monitor.json.x", ".versions.json.x", "versions/.000001.saving-x"):
        (tmp_path / name).write_text("of a killed process")
    one, other = Versions(tmp_path), Versions(tmp_path)
    one.claim()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["lock", "versions"]
    assert [one.next_trial(), one.next_trial()] == [1, 2]
    for write in (other.claim, other.next_trial, lambda: other.withdraw(1), lambda: other.save(in_memory(make(3)))):
        with pytest.raises(InputError, match="expected a folder that no other process uses"):
            write()
    assert other.trials == 2, "anybody may read"
    one.release()
    other.claim()
    assert other.next_trial() == 3
    other.release()


def test_a_repaired_record_has_no_history_and_goes_on_counting(copy):
    kept = store(copy)
    trials = [kept.next_trial() for _ in range(5)]
    (copy / "versions.json").write_text("")
    with pytest.raises(BundleError, match=r"versions\.json is damaged"):
        kept.next_trial()
    kept.repair()
    assert (kept.history, kept.trials) == ((), trials[-1])
    assert kept.save(in_memory(make(3))) == 3
    for name in ("versions.json", "versions.copy.json"):
        (copy / name).write_text("{")
    kept.repair()
    assert kept.next_trial() > 10**9, "more than there can have been"
    assert kept.save(in_memory(make(3))) == 4


def test_a_damaged_version_gives_way_to_the_one_before(copy, caplog):
    (copy / "versions" / "000002" / "plans.json").write_text("{}")
    assert store(copy).load_current().number == 1
    assert "version 2 cannot be loaded" in caplog.text
    shutil.rmtree(copy / "versions" / "000001")
    with pytest.raises(BundleError, match="expected a version"):
        store(copy).load_current()


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(history=[2, 1]),
        lambda r: r.update(history=[1, 3]),
        lambda r: r.update(history=[0]),
        lambda r: r.update(trials=-1),
        lambda r: r.update(surprise=1),
        lambda _: [],
    ],
)
def test_a_forged_record_is_refused(copy, change):
    edit(copy / "versions.json", change)
    with pytest.raises(BundleError, match=r"versions\.json is damaged"):
        store(copy).load_current()


def test_nothing_there(tmp_path):
    with pytest.raises(BundleError, match="expected a version"):
        store(tmp_path / "v").load_current()
    with pytest.raises(InputError, match="keep"):
        Versions(tmp_path, keep=0)
