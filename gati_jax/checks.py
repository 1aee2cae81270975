"""Checks of arguments that several rooms share."""

import tempfile
from pathlib import Path

from .errors import InputError


def check_share(name: str, value: float) -> None:
    """Check that a number lies strictly between 0 and 1.

    Args:
        name: The argument, for the message.
        value: What was given; NaN is refused.

    Raises:
        InputError: It does not.
    """
    if not 0 < value < 1:
        raise InputError(f"{name}: expected a number between 0 and 1, got {value}")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part.

    Args:
        path: The file; its folder exists.
        data: The whole content.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        written = Path(file.name)
        try:
            file.write(data)
            file.close()
            written.chmod(0o644)
            written.replace(path)
        finally:
            written.unlink(missing_ok=True)
