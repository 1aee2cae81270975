"""Versions of a bundle on disk, and which of them is served.

    DIR/versions/000001/   a bundle folder each, complete before anything points to it
    DIR/versions.json      {"history": [1, 2, 4], "newest": 4, "trials": 5}: the last of the history is current

``versions.json`` is written beside itself and renamed over: whoever is killed leaves the old one or the new. A version
enters the history once its folder is whole, and is deleted once the history is without it. So the current version can
always be loaded; if its folder is damaged from outside, or by a loss of power, the one before it takes its place.
Numbers are never used twice, nor is a rolled-back version ever rolled back to. One process writes; any number read.
"""

import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gati_jax.errors import BundleError, InputError
from gati_jax.models import Chain

from .load import load_bundle
from .record import Bundle
from .save import save_bundle, save_tuning

_log = logging.getLogger(__name__)
_KEEP = 5
_MAX_BYTES = 2**20

Number = Annotated[int, Field(ge=1, lt=10**6)]


class _Record(BaseModel):
    """``versions.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    """The versions below a folder."""

    def __init__(self, folder: Path | str, *, keep: int = _KEEP, chain: Chain | None = None) -> None:
        """Name the folder.

        Args:
            folder: Made when the first version is saved.
            keep: Versions of the history to keep, the current one included.
            chain: The base's structure, for bundles of a user's own chain.

        Raises:
            InputError: ``keep`` is not 1 or more.
        """
        if keep < 1:
            raise InputError(f"keep: expected 1 or more, got {keep}")
        self.folder, self.keep, self._chain = Path(folder), keep, chain
        self._lock = threading.Lock()

    @property
    def history(self) -> tuple[int, ...]:
        """The versions that may be served, the current one last."""
        return self._read().history

    def path(self, number: int) -> Path:
        """Return a version's bundle folder."""
        return self.folder / "versions" / f"{number:06d}"

    def save(self, bundle: Bundle) -> int:
        """Save a bundle as the current version, its tunings included; return its number.

        Whatever fails, or kills it, before the last rename leaves the version before it current.

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
        with self._lock:  # trials may have begun meanwhile
            record = self._read()
            history = (*record.history, number)[-self.keep :]
            self._write(record.model_copy(update={"history": history, "newest": number}))
        self._prune(history)
        return number

    def load_current(self) -> Loaded:
        """Load the current version; the newest one before it that can be loaded, where its folder is damaged.

        Raises:
            BundleError: There is none.
        """
        for number in reversed(self.history):
            try:
                return Loaded(number, load_bundle(self.path(number), chain=self._chain))
            except BundleError as error:
                _log.error("version %d cannot be loaded, the one before it takes its place: %s", number, error)
        raise BundleError(f"versions: expected a version in {self.folder} that can be loaded, got none")

    def rollback(self) -> Loaded:
        """Make the version before the current one current, and load it.

        Raises:
            BundleError: There is none before it.
        """
        record = self._read()
        if len(record.history) < 2:  # noqa: PLR2004 (the current one, and one before it)
            raise BundleError(f"versions: expected one before the current in {self.folder}, got {list(record.history)}")
        self._write(record.model_copy(update={"history": record.history[:-1]}))
        return self.load_current()

    def next_trial(self) -> int:
        """Return the number of a trial that begins, from 1 on.

        It is written down first: a trial that is killed has been one, and its part of delta is spent.
        """
        with self._lock:
            record = self._read()
            self._write(record.model_copy(update={"trials": record.trials + 1}))
        return record.trials + 1

    def withdraw(self, number: int) -> None:
        """Take a version out of the history, as an alarm asks: it is not loaded any more; what was before it is."""
        with self._lock:
            record = self._read()
            self._write(record.model_copy(update={"history": tuple(n for n in record.history if n != number)}))

    def _read(self) -> _Record:
        file = self.folder / "versions.json"
        if not file.exists():
            return _Record()
        if file.stat().st_size > _MAX_BYTES:
            raise BundleError(f"versions: {file} is larger than {_MAX_BYTES} bytes")
        try:
            return _Record.model_validate_json(file.read_bytes())
        except ValidationError as error:
            raise BundleError(f"versions: {file} is damaged: {error.errors(include_url=False)[0]['msg']}") from error

    def _write(self, record: _Record) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".versions-", delete=False) as stream:
            stream.write(record.model_dump_json().encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        Path(stream.name).replace(self.folder / "versions.json")

    def _prune(self, history: tuple[int, ...]) -> None:
        """Delete what the history is without; a reader of a deleted version has it in memory."""
        for path in (self.folder / "versions").iterdir():
            if path.name not in {f"{number:06d}" for number in history}:
                shutil.rmtree(path, ignore_errors=True)
        for stale in self.folder.glob(".versions-*"):
            stale.unlink(missing_ok=True)
