"""What the kill tests kill: saves of a bundle or of a version, struck before each of their steps.

Run as ``python -m tests.bundle.victim bundle PATH...`` (or ``version``). It forks before JAX starts its threads, so
Python and JAX are imported only once.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

import gati_jax
from gati_jax.bundle import Versions, save, versions
from tests.bundle.made import COSTS, in_memory, make

Patch = Callable[[object, str, object], None]


def save_bundle(path: Path) -> None:
    gati_jax.save_bundle(path, *make(9), costs=[COSTS])


def save_version(path: Path) -> None:
    Versions(path, keep=2, chain=make(77)[0]).save(in_memory(make(9)))


SAVES = {"bundle": save_bundle, "version": save_version}


def make_mortal(strike: Callable[[], None], patch: Patch) -> None:
    """Call ``strike`` before every step of a save that changes the disk: nothing changes between two steps."""

    def struck(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            strike()
            return function(*args, **kwargs)

        return call

    for owner, name in ((ocp, "save"), (save, "write_json"), (save, "digests"), (versions, "write_json")):
        patch(owner, name, struck(getattr(owner, name)))
    for owner, name in ((Path, "rename"), (Path, "replace"), (shutil, "rmtree")):
        patch(owner, name, struck(getattr(owner, name)))


class Countdown:
    """Strikes once, at the given moment; counts the moments."""

    def __init__(self, act: Callable[[], None], moment: int = 0):
        self.act, self.moment, self.seen = act, moment, 0

    def __call__(self) -> None:
        self.seen += 1
        if self.seen == self.moment:
            self.act()


def main(what: str, paths: list[str]) -> None:
    """Save over each of the paths, killed at the first moment, the second, and so on; print how each ended."""
    for moment, path in enumerate(paths, start=1):
        child = os.fork()
        if child == 0:
            make_mortal(Countdown(lambda: os.kill(os.getpid(), signal.SIGKILL), moment), setattr)
            SAVES[what](Path(path))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
