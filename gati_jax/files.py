"""Files and folders that are replaced as a whole, locks between processes, and digests of the files of a folder."""

import contextlib
import glob
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import BinaryIO

from .errors import BundleError, InputError

try:
    import fcntl
except ImportError:  # Windows, where there are no locks between processes
    fcntl = None

_LONGEST_NAME = 200
_AGAIN = 0.01  # seconds between two tries to lock a file


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file as a whole: a reader, or a process killed half-way, finds the old content or the new one.

    The content goes to a hidden file ``.<name>.<random>`` in the same folder, reaches the disk, and is then renamed
    over ``path``. Missing folders are created; the file is readable by everybody.

    Args:
        path: The file to create or replace.
        content: Its bytes.

    Raises:
        OSError: The file cannot be written; what was there stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)  # temporary files are private
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    with contextlib.suppress(OSError):  # not every file system syncs folders; the new content is in place
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Have a rename reach the disk: a loss of power could undo it otherwise."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(path: Path, *, seconds: float = 0.0) -> BinaryIO:
    """Open a file, created if need be, and keep other processes and threads from locking it.

    Args:
        path: The file; its content stays as it is.
        seconds: How long to wait while it is locked.

    Returns:
        The file: the lock ends when it is closed, or with the process, however that ends.

    Raises:
        InputError: It is locked elsewhere.
        OSError: It cannot be opened.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)  # a pipe in its place is an error
    file, until = os.fdopen(os.open(path, flags, 0o666), "ab"), time.monotonic() + seconds
    try:
        while not (locked := _lock(file)) and time.monotonic() < until:
            time.sleep(_AGAIN)
    except BaseException:
        file.close()
        raise
    if not locked:
        file.close()
        raise InputError(f"{path.parent}: expected a folder that no other process uses, {path.name} is locked")
    return file


def _lock(file: BinaryIO) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield a new empty folder that takes the place of ``path``, or of what it links to, once the block ends well.

    A folder cannot be renamed over another one, so the old one is first moved aside, to ``previous(path)``. A process
    that is killed between the two renames leaves it there, where ``present`` finds it.
    """
    path = resolved(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.saving-*"):
        shutil.rmtree(stale, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.saving-", dir=path.parent))
    try:
        yield fresh
        fresh.chmod(0o755)  # mkdtemp's folders are private
        if path.exists():
            shutil.rmtree(previous(path), ignore_errors=True)
            path.rename(previous(path))
        fresh.rename(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(previous(path), ignore_errors=True)


def resolved(path: Path) -> Path:
    """Return a path without links; where these lead in a circle, a path that does not exist."""
    return Path(os.path.realpath(path))


def previous(path: Path) -> Path:
    """Return where the old folder waits while the new one takes its place."""
    return path.with_name(f".{path.name}.previous")


def present(path: Path) -> Path:
    """Return ``path``, or the old folder where a killed save left only that."""
    path = resolved(path)
    return previous(path) if not path.exists() and previous(path).exists() else path


def digests(folder: Path) -> dict[str, str]:
    """Return "<bytes> <sha256>" of every file below ``folder``, by its relative path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): _digest(file) for file in files}


def check_files(folder: Path, expected: Mapping[str, str]) -> None:
    """Compare the files below ``folder`` with their digests; manifest.json and tuning/ are not among them.

    Raises:
        BundleError: Names the first file that is missing, truncated, changed or not listed.
    """
    for name, digest in expected.items():
        file = folder / name
        if "\0" in name or len(name) > _LONGEST_NAME or not resolved(file).is_relative_to(resolved(folder)):
            raise BundleError(f"bundle: manifest.json lists {name[:_LONGEST_NAME]!r}, which is no file of the bundle")
        if not file.is_file():
            raise BundleError(f"bundle: {name} is missing from {folder}")
        size = digest.partition(" ")[0]
        if size != (got := str(file.stat().st_size)):
            raise BundleError(f"bundle: {file} is truncated or changed: expected {size} bytes, got {got}")
        if _digest(file) != digest:
            raise BundleError(f"bundle: {file} is damaged: its SHA-256 is not the one in manifest.json")
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        if not file.is_dir() and name not in expected and name != "manifest.json" and not name.startswith("tuning/"):
            raise BundleError(f"bundle: {folder} holds {name}, which manifest.json does not list")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return f"{os.fstat(stream.fileno()).st_size} {hashlib.file_digest(stream, 'sha256').hexdigest()}"
