"""Saves that are interrupted or killed. Run as a script, this file is the victim of the kill test: see ``main``."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gati_jax
from gati_jax.bundle import save
from gati_jax.bundle.manifest import previous
from tests.bundle.made import COSTS, answers, in_memory, load, make

ROOT = Path(__file__).parents[2]


def make_mortal(strike: Callable[[], None], patch: Callable[[object, str, object], None]) -> None:
    """Call ``strike`` before and after every step that saving takes."""

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            strike()
            result = function(*args, **kwargs)
            strike()
            return result

        return call

    patch(save.ocp, "save", around(save.ocp.save))
    patch(save, "write_json", around(save.write_json))
    patch(save, "digests", around(save.digests))
    patch(Path, "rename", around(Path.rename))
    patch(Path, "chmod", around(Path.chmod))
    patch(shutil, "rmtree", around(shutil.rmtree))


def count_strikes(path: Path) -> int:
    """Return how often a save over an existing bundle is struck at."""
    gati_jax.save_bundle(path, *make(1), costs=[COSTS])
    strikes = 0

    def strike() -> None:
        nonlocal strikes
        strikes += 1

    with pytest.MonkeyPatch.context() as patch:
        make_mortal(strike, patch.setattr)
        gati_jax.save_bundle(path, *make(9), costs=[COSTS])
    return strikes


def check_old_or_new(path: Path, moment: object) -> bool:
    """Check that one of the two bundles is there as a whole; tell whether it is the new one."""
    loaded = load(path)
    old, new = answers(in_memory(make(1))), answers(in_memory(make(9)))
    assert answers(loaded) in (old, new), moment
    assert loaded.costs == (COSTS,), moment
    return answers(loaded) == new


def test_a_save_that_fails_anywhere_leaves_a_bundle(saved, tmp_path):
    total = count_strikes(tmp_path / "counted")
    assert total >= 18  # arrays, four files, digests, chmod, two renames, rmtree: before and after
    new = []
    for moment in range(1, total + 1):
        path = shutil.copytree(saved, tmp_path / str(moment) / "b")
        left, error = moment, OSError("disk full") if moment % 2 else KeyboardInterrupt()

        def strike(error: BaseException = error) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise error

        with pytest.MonkeyPatch.context() as patch:
            make_mortal(strike, patch.setattr)
            with pytest.raises(type(error)):
                gati_jax.save_bundle(path, *make(9), costs=[COSTS])
        new.append(check_old_or_new(path, moment))
        gati_jax.save_bundle(path, *make(9), costs=[COSTS])
        assert check_old_or_new(path, f"saved again after {moment}")
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


def test_a_save_killed_anywhere_leaves_a_bundle(saved, tmp_path):
    total = count_strikes(tmp_path / "counted")
    moments = range(1, total + 1)
    paths = [shutil.copytree(saved, tmp_path / str(moment) / "b") for moment in moments]
    arguments = [sys.executable, "-m", "tests.bundle.test_interrupted", *map(str, paths)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
    assert result.stdout.split() == [str(-signal.SIGKILL)] * total, result.stderr
    new = [check_old_or_new(path, moment) for moment, path in zip(moments, paths, strict=True)]
    assert new == sorted(new)
    assert (new[0], new[-1]) == (False, True)
    aside = [path for path in paths if not path.exists()]
    assert aside  # some died between the two renames
    for path in aside:
        assert previous(path).is_dir()
        gati_jax.save_bundle(path, *make(9), costs=[COSTS])
        assert check_old_or_new(path, "saved again")
        assert not previous(path).exists()


def main(paths: list[str]) -> None:
    """Save over each of the bundles, killed at the first moment, the second, and so on; print how each ended.

    Forks before JAX starts its threads, so that Python and JAX are imported once.
    """
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
            gati_jax.save_bundle(Path(path), *make(9), costs=[COSTS])
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
