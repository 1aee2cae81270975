"""Versions on disk. Run as a script, this file is the victim of the kill test: see ``main``."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gati_jax import BundleError, InputError
from gati_jax.bundle import Versions, save, versions
from tests.bundle.made import answers, edit, in_memory, make

ROOT = Path(__file__).parents[2]


def store(path: Path, keep: int = 5) -> Versions:
    return Versions(path, keep=keep, chain=make(77)[0])


def current(path: Path) -> list[bytes]:
    return answers(store(path).load_current().bundle)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Versions 1 and 2, which no test changes."""
    path = tmp_path_factory.mktemp("versions") / "v"
    for seed in (1, 2):
        store(path).save(in_memory(make(seed)))
    return path


@pytest.fixture
def copy(two, tmp_path) -> Path:
    return shutil.copytree(two, tmp_path / "v")


def test_save_load_and_roll_back(copy):
    kept = store(copy)
    assert kept.history == (1, 2)
    assert current(copy) == answers(in_memory(make(2)))
    assert kept.rollback().number == 1
    assert current(copy) == answers(in_memory(make(1)))
    with pytest.raises(BundleError, match="one before the current"):
        kept.rollback()
    assert kept.save(in_memory(make(3))) == 3, "numbers are not used twice"
    assert kept.history == (1, 3)
    assert kept.rollback().number == 1, "what was rolled back is not rolled back to"


def test_old_versions_are_deleted(copy):
    kept = store(copy, keep=2)
    kept.save(in_memory(make(3)))
    assert kept.history == (2, 3)
    assert sorted(p.name for p in (copy / "versions").iterdir()) == ["000002", "000003"]


def test_trials_are_counted_across_processes(copy):
    assert [store(copy).next_trial() for _ in range(3)] == [1, 2, 3]
    store(copy).save(in_memory(make(3)))
    assert store(copy).next_trial() == 4


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


def make_mortal(strike: Callable[[], None], patch: Callable[[object, str, object], None]) -> None:
    """Call ``strike`` before and after every step that saving a version takes."""

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            strike()
            result = function(*args, **kwargs)
            strike()
            return result

        return call

    patch(save.ocp, "save", around(save.ocp.save))
    patch(save, "write_json", around(save.write_json))
    patch(Path, "rename", around(Path.rename))
    patch(Path, "replace", around(Path.replace))
    patch(shutil, "rmtree", around(shutil.rmtree))
    patch(versions.os, "fsync", around(os.fsync))


def test_a_save_killed_anywhere_leaves_a_version(two, tmp_path):
    strikes = 0

    def strike() -> None:
        nonlocal strikes
        strikes += 1

    with pytest.MonkeyPatch.context() as patch:
        make_mortal(strike, patch.setattr)
        store(shutil.copytree(two, tmp_path / "counted"), keep=2).save(in_memory(make(3)))
    assert strikes >= 16  # arrays, three files, the manifest, a rename; fsync, replace, pruning: before and after
    paths = [shutil.copytree(two, tmp_path / str(moment)) for moment in range(1, strikes + 1)]
    arguments = [sys.executable, "-m", "tests.adaptation.test_versions", *map(str, paths)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=240, cwd=ROOT)
    assert result.stdout.split() == [str(-signal.SIGKILL)] * strikes, result.stderr
    old, new = (answers(in_memory(make(seed))) for seed in (2, 3))
    found = [current(path) for path in paths]
    assert all(one in (old, new) for one in found)
    assert [one == new for one in found] == sorted(one == new for one in found), "old up to some moment, then new"
    assert (found[0], found[-1]) == (old, new)
    for path in paths[:: max(1, len(paths) // 4)]:
        number = store(path, keep=2).save(in_memory(make(4)))
        assert current(path) == answers(in_memory(make(4)))
        left = sorted(p.name for p in (path / "versions").iterdir())
        assert left[-1] == f"{number:06d}"
        assert len(left) == 2, "nothing is left of what was killed"
        assert not list(path.glob(".versions-*"))
        assert json.loads((path / "versions.json").read_text())["newest"] == number


def main(paths: list[str]) -> None:
    """Save into each of the stores, killed at the first moment, the second, and so on; print how each ended."""
    for moment, path in enumerate(paths, start=1):
        child = os.fork()
        if child == 0:
            left = moment

            def strike() -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            make_mortal(strike, setattr)
            store(Path(path), keep=2).save(in_memory(make(3)))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
