"""What an adaptive server keeps in ``--adapt-dir``, beside the versions: the state that its next process goes on from.

    monitor.json          see ``ControllerState``; replaced as a whole
    monitor.unsaved.json  the former state, moved aside because a change could not be written over it, as a rename needs
                          no space on a full disk: the next process begins with all caches closed

Until a change is on disk, the base alone answers (``AdaptiveEngine.unsaved``). So a process may be killed at any
moment: what was served, the next one knows.
"""

import logging
import time

from gati_jax import BundleError, InputError
from gati_jax.adaptation import ControllerState
from gati_jax.bundle import Versions
from gati_jax.bundle.manifest import read_json, write_json
from gati_jax.certification import trial_level

STATE, ASIDE = "monitor.json", "monitor.unsaved.json"
_MAX_BYTES = 2**20
_log = logging.getLogger("serve.adaptive.folder")


class StateFolder:
    """The folder of one server, which no other process writes to.

    Args:
        versions: In the same folder.
        delta: Of which each trial is given its part.

    Raises:
        InputError: Another process uses the folder.
        OSError: It is none, or cannot be written.
    """

    def __init__(self, versions: Versions, delta: float) -> None:
        """Claim the folder; a damaged ``versions.json`` is replaced by the first ``write``."""
        try:
            versions.claim()
        except InputError as error:
            got = versions.folder
            raise InputError(f"--adapt-dir: expected a folder that no other server uses, got {got}") from error
        self.versions, self._delta = versions, delta
        self._file, self._aside = versions.folder / STATE, versions.folder / ASIDE
        self._held: object = None  # what matters of the state on disk
        self._reserved: int | None = None  # number of a trial that has not begun
        self._wanted = self._owed = False
        self._damage = ""
        try:
            self._trials = versions.trials
        except BundleError as error:
            self._damage, self._trials = str(error), int(time.time())  # see ``Versions.repair``
        except OSError:
            versions.release()
            raise

    def read(self) -> tuple[ControllerState | None, str]:
        """Return the state, if there is any, and why it is not to be trusted, if so."""
        aside = self._aside.exists()
        file = self._aside if aside else self._file
        if not file.exists():
            missing = f"{file} is missing, although there have been trials" if self._trials else ""
            return None, self._damage or missing
        try:
            state = read_json(file, ControllerState, most_bytes=_MAX_BYTES)
        except (BundleError, OSError) as error:
            return None, str(error)
        if aside:
            return state, self._damage or f"{self._file} could not be written when something changed"
        self._held = _essence(state)
        forged = f"{file} has an alarm that closed nothing" if state.monitor.alarmed else ""
        return state, self._damage or forged

    def unknown_version(self, depth: int) -> int:
        """Return a monitor's version that no process has come to, where the state is lost.

        It counts alarms, each of which closes something, and what opens it again, which takes a trial: depth + 2 at
        most for a trial, and one more for a version that was found at the first start. Trials are counted in another
        file.
        """
        return (depth + 3) * (self._trials + 1) + 1

    def owe_trial(self) -> None:
        """Count a trial with the next ``write``: a version was begun without one, see ``unknown_version``."""
        self._owed = True

    def holds(self, state: ControllerState) -> bool:
        """Whether a restart would serve as this state does; evidence may be newer."""
        return _essence(state) == self._held

    def write(self, state: ControllerState) -> None:
        """Write the state, and store the number of a trial that waits for one.

        Raises:
            OSError: It cannot be written. If ``holds`` is false, a restart begins with all caches closed.
        """
        try:
            if self._damage:
                self.versions.repair()
                self._damage = ""
            if self._owed:
                self.versions.next_trial()
                self._owed = False
            write_json(self._file, state)
        except (BundleError, OSError):
            if not self.holds(state):
                self._set_aside()
            raise
        self._aside.unlink(missing_ok=True)
        self._held = _essence(state)
        if self._wanted:
            self._reserved = self.versions.next_trial()
            self._wanted = False

    def level(self) -> float | None:
        """Return the part of delta of a trial that begins now; None: its number is not on disk yet, so none may begin.

        This never waits for the disk: the next ``write`` stores a number.
        """
        number, self._reserved = self._reserved, None
        self._wanted = number is None
        return None if number is None else trial_level(self._delta, number)

    def close(self) -> None:
        """Let another process use the folder."""
        self.versions.release()

    def _set_aside(self) -> None:
        held, self._held = self._held, None
        try:
            if self._file.is_file():
                self._file.replace(self._aside)
        except OSError as error:
            if held is not None:  # said once
                _log.error("adaptation: a restart would forget what has changed", extra={"why": str(error)})


def refused(folder: object, error: OSError) -> InputError:
    """Return what is raised where a server's folder is none, or cannot be written."""
    return InputError(f"--adapt-dir: expected a folder that can be written, got {folder} ({error.strerror or error})")


def _essence(state: ControllerState) -> object:
    return state.bundle, state.epsilon, state.delta, state.number, state.closed, state.monitor.version
