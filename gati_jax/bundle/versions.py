"""Versions of a bundle on disk, and which of them is served.

    DIR/versions/000001/   a bundle folder each, complete before ``versions.json`` names it
    DIR/versions.json      {"history": [1, 2, 4], "newest": 4, "trials": 5}: the last of the history is current
    DIR/versions.copy.json the same, written first: what was counted is not lost with one damaged file
    DIR/lock               locked while a process writes; a server holds it as long as it runs

A version enters the history once its folder is whole, and is deleted once the history is without it; ``versions.json``
is written atomically. So the current version can always be loaded, wherever a save was killed; if its folder is damaged
from outside, or by a loss of power, the version before it takes its place. Numbers are never used twice. One process
may write at a time, and waits for the one that does; any number may read.
"""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

from pydantic import Field, model_validator

from gati_jax.errors import BundleError, InputError
from gati_jax.files import lock_file
from gati_jax.models import Chain
from gati_jax.options import Strict

from .load import load_bundle
from .manifest import read_json, write_json
from .record import Bundle
from .save import save_bundle, save_tuning

_log = logging.getLogger(__name__)
_KEEP = 5
_MAX_BYTES = 2**20
_DIGITS = 6  # of a version's folder
_UNKNOWN = 10**9  # of trials
_PATIENCE = 10.0  # seconds to wait for another process that writes

Number = Annotated[int, Field(ge=1, lt=10**6)]


class _Record(Strict):
    """``versions.json``."""

    history: Annotated[tuple[Number, ...], Field(max_length=1000)] = ()
    newest: Annotated[int, Field(ge=0, lt=10**6)] = 0
    trials: Annotated[int, Field(ge=0, lt=2**53)] = 0

    @model_validator(mode="after")
    def _rises(self) -> "_Record":
        if list(self.history) != sorted(set(self.history)) or any(n > self.newest for n in self.history):
            raise ValueError(f"history: expected rising numbers up to {self.newest}")
        return self


def unknown_trials() -> int:
    """Return a number of trials that no count has reached, and behind which no trial's level matters any more."""
    return max(int(time.time()), _UNKNOWN)  # the clock may have begun anew


class Loaded(NamedTuple):
    """A version in memory."""

    number: int
    bundle: Bundle


class Versions:
    """The versions of a bundle in one folder.

    Args:
        folder: Created when the first version is saved.
        keep: How many versions of the history to keep, the current one included.
        chain: The base's structure, for bundles of a user's own chain.

    Raises:
        InputError: ``keep`` is not 1 or more.
    """

    def __init__(self, folder: Path | str, *, keep: int = _KEEP, chain: Chain | None = None) -> None:
        """Check the arguments; nothing is read or written yet."""
        if keep < 1:
            raise InputError(f"keep: expected 1 or more, got {keep}")
        self.folder, self.keep, self._chain = Path(folder), keep, chain
        self._file, self._copy = self.folder / "versions.json", self.folder / "versions.copy.json"
        self._lock = threading.Lock()
        self._claimed: BinaryIO | None = None

    def claim(self) -> None:
        """Keep all other processes, and all other ``Versions``, from writing to the folder, until ``release``.

        What killed processes have left half-written is deleted.

        Raises:
            InputError: Another one writes to it, or has claimed it.
            OSError: The folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claimed = lock_file(self.folder / "lock")
        for stale in (*self.folder.glob(".*.json.*"), *self.folder.glob("versions/.*")):
            shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)

    def release(self) -> None:
        """Let others write to the folder again."""
        if self._claimed is not None:
            self._claimed.close()
            self._claimed = None

    @property
    def history(self) -> tuple[int, ...]:
        """The versions that may be served, the current one last."""
        return self._read().history

    @property
    def trials(self) -> int:
        """How many trials there have been."""
        return self._read().trials

    def path(self, number: int) -> Path:
        """Return a version's bundle folder."""
        return self.folder / "versions" / f"{number:0{_DIGITS}d}"

    def save(self, bundle: Bundle) -> int:
        """Save a bundle, its tunings included, as the current version; return its number.

        If this fails or is killed half-way, the version before it stays current.

        Raises:
            InputError: As ``save_bundle``.
        """
        with self._writing():
            number = self._read().newest + 1
        path = self.path(number)
        shutil.rmtree(path, ignore_errors=True)  # of a save that was killed
        save_bundle(
            path,
            bundle.chain,
            bundle.caches,
            bundle.plan,
            bundle.certificate,
            also=bundle.also,
            class_names=bundle.class_names,
            provenance=bundle.provenance,
            costs=bundle.costs,
        )
        for tuning in bundle.tunings:  # heads of the same shapes run as the old ones do
            save_tuning(path, tuning)
        with self._writing():  # a trial may have started meanwhile
            history = (*self.history, number)[-self.keep :]
            self._update(history=history, newest=number)
            self._prune(history)
        return number

    def load_current(self) -> Loaded:
        """Load the current version or, if its folder is damaged, the newest one before it that can be loaded.

        Raises:
            BundleError: No version can be loaded.
        """
        for number in reversed(self.history):
            try:
                return Loaded(number, load_bundle(self.path(number), chain=self._chain))
            except BundleError as error:
                _log.error("version %d cannot be loaded, the one before it takes its place: %s", number, error)
        raise BundleError(f"versions: expected a version in {self.folder} that can be loaded, got none")

    def next_trial(self) -> int:
        """Count a trial that starts now; return its number, from 1 on.

        The number is stored before the trial starts: the share of delta that a killed trial was given is spent.
        """
        with self._writing():
            trials = self._read().trials + 1
            self._update(trials=trials)
        return trials

    def withdraw(self, number: int) -> None:
        """Take a version out of the history, as after an alarm: the one before it becomes current."""
        with self._writing():
            self._update(history=tuple(n for n in self.history if n != number))

    def repair(self) -> None:
        """Replace a damaged ``versions.json`` by one without a history, in which no number comes a second time.

        Where its copy is damaged, too, trials are counted on from the seconds of the clock, which no count has reached:
        the level of later trials is far below what they need in other folders, and sound.
        """
        with self._writing():
            known = _Record(trials=unknown_trials())
            with contextlib.suppress(BundleError):
                known = read_json(self._copy, _Record, most_bytes=_MAX_BYTES)
            names = [path.name for path in (self.folder / "versions").glob("*")]
            newest = max([known.newest, *(int(name) for name in names if name.isdecimal() and len(name) == _DIGITS)])
            self._write(_Record(newest=newest, trials=known.trials))

    @contextlib.contextmanager
    def _writing(self) -> Generator[None]:
        """Keep others from writing between a read and a write."""
        with self._lock, contextlib.ExitStack() as stack:
            if self._claimed is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_file(self.folder / "lock", seconds=_PATIENCE))
            yield

    def _read(self) -> _Record:
        file = next((file for file in (self._file, self._copy) if file.exists()), None)
        return _Record() if file is None else read_json(file, _Record, most_bytes=_MAX_BYTES)

    def _update(self, **values: object) -> None:
        self._write(self._read().model_copy(update=values))

    def _write(self, record: _Record) -> None:
        write_json(self._copy, record)
        write_json(self._file, record)

    def _prune(self, history: tuple[int, ...]) -> None:
        """Delete versions that have left the history, and files of killed writes; readers hold versions in memory."""
        for path in (self.folder / "versions").iterdir():
            if path.name not in {self.path(number).name for number in history}:
                shutil.rmtree(path, ignore_errors=True)
        for stale in self.folder.glob(".versions.*"):
            stale.unlink(missing_ok=True)
