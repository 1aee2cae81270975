"""Scalars for TensorBoard: DIR/tensorboard."""

import contextlib
from collections.abc import Generator, Mapping
from pathlib import Path

from tensorboardX import SummaryWriter


class Scalars:
    """Writes figures by epoch; a resumed run goes on where its checkpoint was, and hides what lies behind it."""

    def __init__(self, folder: Path) -> None:
        """Write below ``folder`` once there is something to write."""
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def write(self, epoch: int, values: Mapping[str, float], *, hides: bool = True) -> None:
        """Write one value for every name; the first also hides what earlier runs wrote of later epochs.

        Args:
            epoch: 1 is the first.
            values: By name.
            hides: Whether it hides what they wrote of this epoch, too.
        """
        if self._writer is None:
            purge = epoch if hides else epoch + 1
            self._writer = SummaryWriter(str(self._folder), purge_step=purge, flush_secs=10)
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


@contextlib.contextmanager
def scalars(folder: Path) -> Generator[Scalars]:
    """Yield a writer, and close it."""
    writer = Scalars(folder)
    try:
        yield writer
    finally:
        writer.close()
