"""Versions of a bundle on disk, and which of them is served.

    DIR/versions/000001/   a bundle folder each, complete before ``versions.json`` names it
    DIR/versions.json      {"history": [1, 2, 4], "newest": 4, "trials": 5}: the last of the history is current

A version enters the history once its folder is whole, and is deleted once the history is without it; ``versions.json``
is written atomically. So the current version can always be loaded, wherever a save was killed; if its folder is damaged
from outside, or by a loss of power, the version before it takes its place. Numbers are never used twice. One process
may write at a time; any number may read.
"""

import logging
import shutil
import threading
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from gati_jax.errors import BundleError, InputError
from gati_jax.models import Chain
from gati_jax.options import Strict

from .load import load_bundle
from .manifest import read_json, write_json
from .record import Bundle
from .save import save_bundle, save_tuning

_log = logging.getLogger(__name__)
_KEEP = 5
_MAX_BYTES = 2**20

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
        self._file, self._lock = self.folder / "versions.json", threading.Lock()

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
        return self.folder / "versions" / f"{number:06d}"

    def save(self, bundle: Bundle) -> int:
        """Save a bundle, its tunings included, as the current version; return its number.

        If this fails or is killed half-way, the version before it stays current.

        Raises:
            InputError: As ``save_bundle``.
        """
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
        with self._lock:  # a trial may have started meanwhile
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
        with self._lock:
            trials = self._read().trials + 1
            self._update(trials=trials)
        return trials

    def withdraw(self, number: int) -> None:
        """Take a version out of the history, as after an alarm: the one before it becomes current."""
        with self._lock:
            self._update(history=tuple(n for n in self.history if n != number))

    def _read(self) -> _Record:
        return read_json(self._file, _Record, most_bytes=_MAX_BYTES) if self._file.exists() else _Record()

    def _update(self, **values: object) -> None:
        write_json(self._file, self._read().model_copy(update=values))

    def _prune(self, history: tuple[int, ...]) -> None:
        """Delete versions that have left the history, and files of killed writes; readers hold versions in memory."""
        for path in (self.folder / "versions").iterdir():
            if path.name not in {f"{number:06d}" for number in history}:
                shutil.rmtree(path, ignore_errors=True)
        for stale in self.folder.glob(".versions.json.*"):
            stale.unlink(missing_ok=True)
