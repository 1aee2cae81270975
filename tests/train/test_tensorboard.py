"""What TensorBoard would read: the records of an event file, taken apart by their format."""

import importlib
import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from train.base import Scalars

Event: Any = importlib.import_module("tensorboardX.proto.event_pb2").Event


def events(folder: Path) -> list[Any]:
    """Read TFRecords: length, checksum of it, data, checksum of them."""
    found = []
    for file in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_every_scalar_is_written_and_a_resumed_run_hides_what_lies_behind_its_checkpoint(tmp_path):
    written = set()
    for first in (1, 2):
        with closing(Scalars(tmp_path / "tb")) as writer:
            for epoch in range(first, 4):
                writer.write(epoch, {"train/loss": 0.5 * epoch, "train/accuracy": 0.25})
        found = events(tmp_path / "tb")
        values = {(e.step, v.tag, v.simple_value) for e in found for v in e.summary.value}
        own = {(e, *pair) for e in range(first, 4) for pair in (("train/loss", 0.5 * e), ("train/accuracy", 0.25))}
        written = own if first == 1 else written
        assert values in (own, written)  # writers that begin within a second share a file
    assert [e.step for e in found if e.HasField("session_log")][-1] == 2  # TensorBoard drops earlier values from there


def test_nothing_is_written_where_there_is_nothing_to_say(tmp_path):
    with pytest.raises(ZeroDivisionError), closing(Scalars(tmp_path / "tb")):
        raise ZeroDivisionError
    assert not (tmp_path / "tb").exists()
