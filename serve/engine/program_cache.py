"""Compiled programs, kept on disk for the next start: JAX's persistent compilation cache, with what it leaves out.

    FOLDER/                 of this user alone, because programs in it run in this process
      lock                  held while a process compiles
      MACHINE/              digest of jaxlib, device, the processor's features and the compiler's flags
        PROGRAMS/           digest of the parameters and algorithms of what is served
          *-cache           the programs, as JAX writes them
          record.json       their digests, and what each program answers to made-up images
          unproved          there while programs are loaded: if one of them ends the process, the next one finds it

A program that was compiled for a processor with other features may end the process or answer wrongly, and JAX loads it
if a file of the right name is there. So the features are part of the folder's name, files are compared with their
digests before they are loaded, and each program runs before it is used: its answers must be those that it gave when it
was compiled. Whatever is wrong is one warning in the log, and everything is compiled anew.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import platform
import shutil
import stat
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import Float

from gati_jax import BundleError, InputError
from gati_jax.bundle.manifest import read_json
from gati_jax.files import lock_file, write_atomically
from gati_jax.options import Strict

RECORD, UNPROVED, LOCK = "record.json", "unproved", "lock"
MOST_BYTES = 2 * 2**30
_MOST_RECORD = 64 * 2**20  # bytes
_TOLERANCE = 1e-4  # of the largest number: threads may add in another order
_PROCESSOR = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU implementer", "CPU part")
_COLUMNS = 16  # of an answer: its score and logits
_DIGITS = 16
_log = logging.getLogger("serve.engine.program_cache")
T = TypeVar("T")
Outputs = Mapping[str, Float[np.ndarray, "rows columns"]]
"""By program, what it answers to made-up images."""


class Record(Strict):
    """What ``record.json`` holds."""

    files: dict[str, str]
    """By name, the SHA-256 digest."""
    outputs: dict[str, list[list[float]]]


class ProgramCache:
    """The programs of this machine, in a folder that is created if need be.

    Args:
        folder: See above.
        most_bytes: Of all that is kept; the programs that were not used for the longest time go first.
    """

    def __init__(self, folder: Path, *, most_bytes: int = MOST_BYTES) -> None:
        """Remember the folder; it is looked at when something is to be compiled."""
        self.folder, self._most_bytes = folder, most_bytes
        self._off = False

    def build(self, key: str, make: Callable[[], T], run: Callable[[T], Outputs]) -> T:
        """Compile programs, or load those that are kept.

        Args:
            key: Of the programs that belong together: what is served.
            make: Compiles them all by JAX.
            run: Runs every one of them.
        """
        if self._off or jax.config.values["jax_compilation_cache_dir"]:  # then the user has one for all programs
            return make()
        try:
            with _locked(self.folder):
                place = self.folder / machine() / hashlib.sha256(key.encode()).hexdigest()[:_DIGITS]
                try:
                    return self._build(place, make, run)
                except Exception:
                    shutil.rmtree(place, ignore_errors=True)
                    raise
        except Exception as error:  # noqa: BLE001 (what is not the cache's fault is raised again below)
            self._off = True
            _log.warning("programs are compiled anew and not kept: %s", error or repr(error))
        return make()

    def _build(self, place: Path, make: Callable[[], T], run: Callable[[T], Outputs]) -> T:
        record, why = _read(place)
        if why:
            _log.warning("programs are compiled anew: %s", why, extra={"folder": str(place)})
            shutil.rmtree(place)
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        (place / UNPROVED).touch()
        with _pointed_at(place):
            built = make()
        outputs = {name: _finite(output[:, :_COLUMNS]) for name, output in run(built).items()}
        if odd := [name for name, found in outputs.items() if not _agree(found, record.outputs.get(name))]:
            raise RuntimeError(f"programs that were loaded answer otherwise than when they were compiled: {odd[:5]}")
        known = record.outputs | {name: output.tolist() for name, output in outputs.items()}
        files = {file.name: _digest(file) for file in _files(place)}
        if (new := Record(files=files, outputs=known)) != record:
            write_atomically(place / RECORD, new.model_dump_json().encode())
        (place / UNPROVED).unlink()
        os.utime(place / RECORD)
        self._evict(place)
        return built

    def _evict(self, latest: Path) -> None:
        """Remove what has not been used for the longest time."""
        places = {record.parent: record.stat().st_mtime for record in self.folder.glob(f"*/*/{RECORD}")}
        sizes = {place: sum(file.stat().st_size for file in place.iterdir()) for place in places}
        excess = sum(sizes.values()) - self._most_bytes
        for place in sorted(places, key=lambda place: (place == latest, places[place])):
            if excess <= 0:
                return
            shutil.rmtree(place)
            excess -= sizes[place]


def default_folder() -> Path:
    """Return the user's own folder for such things, and not one beside the bundle.

    A bundle is untrusted input, and may be on a disk that is read only; programs are code of this process.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    caches = Path(given) if given.startswith("/") else Path("~/.cache").expanduser()
    return caches / "gati-jax" / "programs"


def machine() -> str:
    """Return a digest of all on which a compiled program depends, besides the program: JAX's key leaves some out."""
    device = jax.devices()[0]
    facts = [
        jax.__version__,
        importlib.metadata.version("jaxlib"),
        device.client.platform,
        device.client.platform_version,
    ]
    facts += [device.device_kind, str(jax.device_count()), os.environ.get("XLA_FLAGS", ""), *_processor()]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:_DIGITS]


def _processor() -> list[str]:
    """Describe the first processor, with the features that compiled code may use."""
    found = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        found += [line for line in text.splitlines() if line.partition(":")[0].strip() in _PROCESSOR]
    return found


@contextlib.contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Hold the folder, once it is clear that no other user can write to it.

    Raises:
        InputError: Another user can, or another process compiles.
        OSError: It cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.lstat()
    if hasattr(os, "geteuid"):  # Windows has other permissions, by which a user's own folders are private
        mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if not mine or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise InputError(f"--program-cache: expected a folder that only this user can write to, got {folder}")
    with lock_file(folder / LOCK):
        yield


@contextlib.contextmanager
def _pointed_at(place: Path) -> Generator[None]:
    """Have JAX read and write programs there. It raises if it cannot, where it would warn of each program."""
    options = {
        "jax_compilation_cache_dir": str(place),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_enable_xla_caches": "none",
        "jax_raise_persistent_cache_errors": True,
    }
    before = {name: jax.config.values[name] for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it remembers the last folder
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def _read(place: Path) -> tuple[Record, str]:
    """Return what is kept in a folder, and why it is not to be loaded, if so."""
    nothing = Record(files={}, outputs={})
    if not place.exists():
        return nothing, ""
    if (place / UNPROVED).exists():
        return nothing, "the last process that loaded or compiled them did not come to an end of that"
    try:
        record = read_json(place / RECORD, Record, most_bytes=_MOST_RECORD)
        if {file.name: _digest(file) for file in _files(place)} != record.files:
            return nothing, "what is kept is damaged"
    except (BundleError, OSError) as error:
        return nothing, str(error)
    return record, ""


def _files(place: Path) -> list[Path]:
    return sorted(file for file in place.iterdir() if file.name not in {RECORD, UNPROVED})


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _finite(output: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows columns"]:
    """Replace what JSON cannot express: a base's scores are infinite."""
    return np.nan_to_num(np.asarray(output, np.float64), nan=-1.0, posinf=1.0, neginf=-1.0)


def _agree(found: Float[np.ndarray, "rows columns"], kept: list[list[float]] | None) -> bool:
    """Whether a program answers as it did; True if it is new."""
    if kept is None:
        return True
    expected = np.asarray(kept)
    close = _TOLERANCE * max(1.0, float(np.abs(found).max()))
    return expected.shape == found.shape and bool(np.allclose(found, expected, rtol=0, atol=close))
