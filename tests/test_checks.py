"""Checks that several packages share, and files that are written as a whole."""

import os
from pathlib import Path

import numpy as np
import pytest

from gati_jax import InputError
from gati_jax.checks import check_not_empty, check_positive, check_share, write_atomically


@pytest.mark.parametrize("value", [0, 1, -0.5, 2.0, float("nan"), float("inf")])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(InputError, match=f"delta: expected a number between 0 and 1, got {value}"):
        check_share("delta", value)
    check_share("delta", 0.5)


@pytest.mark.parametrize("value", [0, -3])
def test_a_count_below_one_is_refused(value):
    with pytest.raises(InputError, match=f"batch: expected 1 or more, got {value}"):
        check_positive("batch", value)
    check_positive("batch", 1)


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="images: expected at least one, got none"):
        check_not_empty("images", np.zeros((0, 3)))
    check_not_empty("images", np.zeros((1, 3)))


@pytest.mark.parametrize("content", ["é\n", b"\xff\0"], ids=["text", "bytes"])
def test_a_file_is_written_with_its_folders_and_replaced(tmp_path, content):
    path = tmp_path / "a" / "b.json"
    for _ in range(2):
        write_atomically(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert path.stat().st_mode & 0o777 == 0o644
        write_atomically(path, "other")
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupted"])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, failing, error):
    path = tmp_path / "x"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os if failing == "fsync" else Path, failing, fail)
    with pytest.raises(type(error)):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
