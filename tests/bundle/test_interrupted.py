"""Saves that fail or are killed at any step: the old bundle or version is there, or the new one, as a whole."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import gati_jax
from gati_jax.bundle import Versions, save
from gati_jax.files import previous
from tests.bundle.made import COSTS, answers, in_memory, load, make
from tests.bundle.victim import SAVES, Countdown, make_mortal, save_bundle, save_version

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def old(saved, saved_versions) -> dict[str, Path]:
    return {"bundle": saved, "version": saved_versions}


def moments_of(what: str, path: Path) -> int:
    """How many steps a save over ``path`` takes."""
    count = Countdown(lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        make_mortal(count, patch.setattr)
        SAVES[what](path)
    return count.seen


def is_new(what: str, path: Path) -> bool:
    """Check that the old one or the new one is there as a whole; return which."""
    loaded = load(path) if what == "bundle" else Versions(path, chain=make(77)[0]).load_current().bundle
    before, after = answers(in_memory(make(1))), answers(in_memory(make(9)))
    assert answers(loaded) in (before, after)
    assert what == "version" or loaded.costs == (COSTS,)
    return answers(loaded) == after


def test_a_save_that_fails_anywhere_leaves_a_bundle(saved, tmp_path):
    total = moments_of("bundle", shutil.copytree(saved, tmp_path / "counted"))
    assert total >= 9  # arrays, four files, digests, two renames, rmtree
    new = []
    for moment in range(1, total + 1):
        path = shutil.copytree(saved, tmp_path / str(moment) / "b")
        error = OSError("disk full") if moment % 2 else KeyboardInterrupt()

        def fail(error: BaseException = error) -> None:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            make_mortal(Countdown(fail, moment), patch.setattr)
            with pytest.raises(type(error)):
                save_bundle(path)
        new.append(is_new("bundle", path))
        save_bundle(path)
        assert is_new("bundle", path), f"saved again after {moment}"
        assert [p.name for p in path.parent.iterdir()] == ["b"], moment
    assert new == sorted(new)  # old up to some moment, new from there on
    assert new[0] is False


def test_a_first_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(save, "digests", fail)
    with pytest.raises(OSError, match="full"):
        gati_jax.save_bundle(tmp_path / "b", *make(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", SAVES)
def test_a_save_killed_anywhere_leaves_the_old_or_the_new(old, tmp_path, what):
    total = moments_of(what, shutil.copytree(old[what], tmp_path / "counted"))
    paths = [shutil.copytree(old[what], tmp_path / str(moment) / "x") for moment in range(1, total + 1)]
    arguments = [sys.executable, "-m", "tests.bundle.victim", what, *map(str, paths)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=240, cwd=ROOT)
    assert result.stdout.split() == [str(-signal.SIGKILL)] * total, result.stderr
    new = [is_new(what, path) for path in paths]
    assert new == sorted(new)
    assert (new[0], new[-1]) == (False, True)
    if what == "bundle":
        aside = [path for path in paths if not path.exists()]
        assert aside  # some died between the two renames
        for path in aside:
            assert previous(path).is_dir()
            save_bundle(path)
            assert is_new(what, path)
            assert not previous(path).exists()
        return
    for path in paths[:: max(1, total // 4)]:
        save_version(path)
        assert is_new(what, path)
        newest = json.loads((path / "versions.json").read_text())["newest"]
        left = sorted(p.name for p in (path / "versions").iterdir())
        assert (left[-1], len(left)) == (f"{newest:06d}", 2), "nothing is left of what was killed"
        assert not list(path.glob(".versions*"))
