"""The picture files of a data set: class folders, or a CSV file of paths."""

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from gati_jax.errors import InputError, listed, printable

from .groups import Groups

_log = logging.getLogger(__name__)
_ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
_MOST_CSV_BYTES = 2**29


class Listed(NamedTuple):
    """The picture files of one split."""

    paths: list[str]
    labels: Int[np.ndarray, " n"] | None
    class_names: tuple[str, ...]
    groups: Groups | None = None
    """What pictures belong together, where a column of the CSV file says it."""


def list_pictures(place: Path, split: str, group_column: str | None = None) -> Listed:
    """List the picture files of a folder or a CSV file, in an order that does not depend on the file system.

    Args:
        place: A folder whose sub-folders are the classes, sorted by name; or with a folder of such folders for each
            split; or of pictures without labels. Or a CSV file with a column ``path`` (relative to its folder) and
            perhaps ``label`` (numbers or names) and ``split``.
        split: "all", or the name of a split.
        group_column: The CSV file's column of names of what belongs together.

    Raises:
        InputError: There is none, or the folder is laid out otherwise.
    """
    if place.is_file():
        return _from_csv(place, split, group_column)
    if not place.is_dir():
        raise InputError(f"data.dir: expected a folder of pictures or a CSV file, got {place}")
    folders, loose = _contents(place)
    below = {name: _contents(place / name) for name in folders}
    splits = sorted(name for name, (deeper, _) in below.items() if deeper)
    if split != "all":
        if split not in splits:
            known = ", ".join(splits) or "all"
            raise InputError(f"split: expected one of {known} of {place}, got {split!r}")
        classes = sorted({name for one in splits for name in below[one][0]})
        files = {name: _contents(place / split / name) for name in below[split][0]}
        return _by_class(place / split, files, classes)
    if splits:
        expected, got = "folders of pictures, a class each", f"folders in {place / splits[0]}"
        raise InputError(f"split: expected {', '.join(splits)} or {expected}, got all, and {got}")
    if not folders:
        return _some([str(place / name) for name in loose], None, (), place)
    if loose:
        got = f"{printable(loose[0])} beside {printable(folders[0])}/"
        raise InputError(f"data.dir: expected class folders only, or pictures only, in {place}, got {got}")
    return _by_class(place, below, folders)


def _by_class(place: Path, files: dict[str, tuple[list[str], list[str]]], classes: list[str]) -> Listed:
    paths, labels = [], []
    for name, (deeper, pictures) in files.items():
        if deeper:
            raise InputError(f"data.dir: expected pictures in the class folder {place / name}, got {deeper[0]}/ in it")
        if not pictures:
            _log.warning("%s: no picture of class %s", place, printable(name))
        paths += [str(place / name / picture) for picture in pictures]
        labels += [classes.index(name)] * len(pictures)
    return _some(paths, np.array(labels, np.int32), tuple(classes), place)


def _some(paths: list[str], labels: np.ndarray | None, class_names: tuple[str, ...], place: Path) -> Listed:
    if not paths:
        raise InputError(f"data.dir: expected .jpg, .jpeg, .png or .webp files, got none in {place}")
    return Listed(paths, labels, class_names)


def _contents(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of sub-folders and of pictures, sorted; links are followed, hidden files left out."""
    folders, pictures, others = [], [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                kind = folders if entry.is_dir() else pictures if _is_picture(entry.name) else others
                kind.append(entry.name)
    except OSError as error:
        raise InputError(f"data.dir: cannot list {folder}: {error.strerror}") from error
    if others:
        _log.warning("%s: %d other files are left out, such as %s", folder, len(others), printable(min(others)))
    return sorted(folders), sorted(pictures)


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in _ENDINGS


def _from_csv(file: Path, split: str, group_column: str | None) -> Listed:
    if file.stat().st_size > _MOST_CSV_BYTES:
        raise InputError(f"data.dir: expected a CSV file of at most {_MOST_CSV_BYTES >> 20} MB, got {file}")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, strict=True, skipinitialspace=True)
            columns = _check_columns(table.fieldnames or (), file, group_column)
            keys = ("path", "label", group_column or "", "split")
            rows = [tuple(row.get(key) for key in keys) for row in map(_whole, table)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"data.dir: expected a CSV file, got {file}: {error}") from error
    if not rows:
        raise InputError(f"data.dir: expected rows in {file}, got none")
    _check_filled("path", [row[0] for row in rows], file)
    labels, class_names = _named([row[1] for row in rows], file) if "label" in columns else (None, ())
    if group_column is not None:
        _check_filled(group_column, [row[2] for row in rows], file)
    known = sorted({one or "" for *_, one in rows}) if "split" in columns else ["all"]
    if split not in known:
        raise InputError(f"split: expected one of {', '.join(map(printable, known[:20]))} of {file}, got {split!r}")
    kept = [i for i, (*_, one) in enumerate(rows) if "split" not in columns or one == split]
    listed_here = _some(
        [str(file.parent / (rows[i][0] or "")) for i in kept],
        None if labels is None else labels[kept],
        class_names,
        file,
    )
    return listed_here._replace(groups=np.array([rows[i][2] for i in kept], str) if group_column is not None else None)


def _check_columns(names: Sequence[str], file: Path, group_column: str | None) -> set[str]:
    """Return the names of a file's columns, of which it has ``path``, and each once, and that of groups, if any."""
    columns = set(names)
    if "path" not in columns or len(columns) < len(names):
        expected = f"columns path and perhaps label and split, each once, in the first line of {file}"
        raise InputError(f"data.dir: expected {expected}, got {listed(names, most=10) or 'none'}")
    if group_column is not None and group_column not in columns - {"path", "label", "split"}:
        raise InputError(
            f"data.group_column: expected a column of {file} but path, label and split, got {group_column!r}"
        )
    if others := sorted(columns - {"path", "label", "split", group_column or ""}):
        _log.warning("%s: other columns than path, label and split are left out: %s", file, listed(others, most=10))
    return columns


def _whole(row: dict[str, str]) -> dict[str, str]:
    if None in row:  # where the csv module puts what is too much
        raise csv.Error(f"more cells than columns in the row of {printable(row['path'])}")
    return row


def _named(names: Sequence[str | None], file: Path) -> tuple[Int[np.ndarray, " n"], tuple[str, ...]]:
    """Return labels as integers: those that are given, or positions among the sorted names."""
    _check_filled("label", names, file)
    texts = [name or "" for name in names]
    if all(text.isascii() and text.isdecimal() and len(text) < len(str(2**31)) for text in texts):
        return np.array(texts, np.int64).astype(np.int32), ()
    if all(map(_is_number, texts)):  # sorted as names, 10.0 would come before 2.0
        odd = next(row for row, text in enumerate(texts, 1) if not text.isascii() or not text.isdecimal())
        got = f"{printable(texts[odd - 1])} in row {odd}"
        raise InputError(f"data.dir: expected labels that are whole numbers from 0, or names, in {file}, got {got}")
    classes = {name: i for i, name in enumerate(sorted(set(texts)))}
    return np.array([classes[text] for text in texts], np.int32), tuple(classes)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_filled(column: str, values: Sequence[str | None], file: Path) -> None:
    for row, value in enumerate(values, 1):
        if not value:
            raise InputError(f"data.dir: expected a {column} in every row of {file}, got none in row {row}")
