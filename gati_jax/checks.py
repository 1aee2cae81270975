"""What every room may use: the check of a share, and the one way in which a file is written."""

import os
import tempfile
from pathlib import Path

from .errors import InputError


def check_share(name: str, value: float | int) -> None:  # noqa: PYI041 (beartype tells them apart)
    """Check that a value lies strictly between 0 and 1.

    Args:
        name: The argument, for the message.
        value: What was given for it.

    Raises:
        InputError: It is 0 or less, 1 or more, or NaN.
    """
    if not 0 < value < 1:
        raise InputError(f"{name}: expected a number between 0 and 1, got {value}")


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
