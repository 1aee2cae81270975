"""Pictures in files: class folders or a CSV of paths, decoded, resized and cropped as torchvision evaluates.

torchvision resizes by Pillow, whose filters are antialiased; OpenCV's are not, and give other pixels. Files may be
anything: sizes have bounds, and only JPEG, PNG and WebP decoders are asked.
"""

import csv
import dataclasses
import io
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from gati_jax.errors import InputError, listed, printable

from .streaming import Source

_log = logging.getLogger(__name__)
_ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
_FORMATS = ("JPEG", "PNG", "WEBP")
_DEEP = ("I", "F")  # modes of more than 8 bits a channel
_MOST_PIXELS, _MOST_BYTES = 2**26, 2**28  # of one picture; eight threads decode one each
_MOST_CSV_BYTES = 2**29
Interpolation = Literal["bilinear", "bicubic", "lanczos", "box", "nearest"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """Pillow's resize and a centre crop, as ``torchvision.transforms.Resize`` and ``CenterCrop``.

    Args:
        resize: The shorter side, or (height, width).
        crop: The side of a square, or (height, width); zeros surround a smaller picture.
        interpolation: Pillow's filter.
        channels: 1 (grey) or 3 (RGB); None leaves arrays as they are, and makes pictures RGB.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"
    channels: Literal[1, 3] | None = None

    def picture(self, encoded: bytes, origin: str) -> UInt8[np.ndarray, "height width channels"]:
        """Decode a JPEG, PNG or WebP file, and transform it.

        Raises:
            InputError: It is damaged, too large or of another kind; names ``origin``.
        """
        image_module = pillow()
        try:
            with image_module.open(io.BytesIO(encoded), formats=_FORMATS) as image:
                _check_pixels(*image.size)
                _check_depth(image.mode)
                return self._transformed(image.convert("L" if self.channels == 1 else "RGB"))
        except InputError as error:
            raise InputError(f"{origin}: {error}") from error
        except Exception as error:  # Pillow raises many kinds for damaged files
            what = "JPEG, PNG or WebP" if isinstance(error, image_module.UnidentifiedImageError) else "that can be read"
            reason = "another file" if what.startswith("JPEG") else printable(str(error)) or type(error).__name__
            raise InputError(f"{origin}: expected a picture {what}, got {reason}") from error

    def array(self, image: np.ndarray, origin: str) -> np.ndarray:
        """Transform uint8[height, width, channels]; without options, return any array as it is.

        Raises:
            InputError: There are options, but it is no picture of 1 or 3 channels.
        """
        if self == Transform(interpolation=self.interpolation):
            return image
        if image.dtype != np.uint8 or image.ndim != len("hwc") or image.shape[-1] not in {1, 3}:
            expected, got = "uint8[height, width, 1 or 3] to resize or crop", f"{image.dtype}{[*image.shape]}"
            raise InputError(f"{origin}: expected {expected}, got {got}")
        opened = pillow().fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        mode = {None: opened.mode, 1: "L", 3: "RGB"}[self.channels]
        return self._transformed(opened.convert(mode))

    def _transformed(self, image: Any) -> UInt8[np.ndarray, "height width channels"]:  # noqa: ANN401 (optional module)
        width, height = image.size
        if isinstance(self.resize, int):
            longer = int(self.resize * max(width, height) / min(width, height))
            height, width = (self.resize, longer) if height <= width else (longer, self.resize)
        elif self.resize is not None:
            height, width = self.resize
        _check_pixels(width, height)
        if (width, height) != image.size:
            image = image.resize((width, height), pillow().Resampling[self.interpolation.upper()])
        if self.crop is not None:
            rows, columns = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
            top, left = (_offset(*sides) for sides in ((height, rows), (width, columns)))
            image = image.crop((left, top, left + columns, top + rows))
        array = np.asarray(image)
        return array if array.ndim == len("hwc") else array[..., None]


def _offset(side: int, wanted: int) -> int:
    """Return where a centre crop begins, rounded as torchvision does; below 0, zeros come before the picture."""
    return round((side - wanted) / 2) if side >= wanted else -((wanted - side) // 2)


def _check_pixels(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise InputError(f"expected at most {_MOST_PIXELS // 10**6} million pixels, got {width} x {height}")


def _check_depth(mode: str) -> None:
    if mode.startswith(_DEEP):
        raise InputError(f"expected 8 bits a channel, for Pillow would clip more, got a picture of mode {mode}")


def pillow() -> Any:  # noqa: ANN401 (an optional module)
    """Return ``PIL.Image``."""
    try:
        from PIL import Image  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise InputError('data.name: pictures need Pillow (pip install "gati-jax[train]")') from error
    return Image


class Pictures:
    """Picture files as a ``Source``, all of one size once they are transformed."""

    def __init__(self, paths: Sequence[str], transform: Transform) -> None:
        """Read nothing yet."""
        self._paths, self._transform = paths, transform
        self._shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._paths)

    def __getitem__(self, index: int, /) -> UInt8[np.ndarray, "height width channels"]:
        """Read one file."""
        path = self._paths[index]
        image = self._transform.picture(read_regular(path), path)
        self._shape = self._shape or image.shape
        if image.shape != self._shape:
            got = f"{[*image.shape]} in {path}, others have {[*self._shape]}"
            raise InputError(f"data.name: expected pictures of one size, got {got}: set data.resize and data.crop")
        return image


def read_regular(path: str) -> bytes:
    """Read a whole file that is no device, pipe or socket, and not too large.

    Raises:
        InputError: It is, or it cannot be read; names it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
                raise InputError(f"{path}: expected a regular file of at most {_MOST_BYTES >> 20} MB")
            return file.read(_MOST_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{printable(path)}: cannot be read: {reason}") from error


class Listed(NamedTuple):
    """The picture files of one split."""

    paths: list[str]
    labels: Int[np.ndarray, " n"] | None
    class_names: tuple[str, ...]


def list_pictures(place: Path, split: str) -> Listed:
    """List the picture files of a folder or a CSV file, in an order that does not depend on the file system.

    Args:
        place: A folder whose sub-folders are the classes, sorted by name; or with a folder of such folders for each
            split; or of pictures without labels. Or a CSV file with a column ``path`` (relative to its folder) and
            perhaps ``label`` (numbers or names) and ``split``.
        split: "all", or the name of a split.

    Raises:
        InputError: There is none, or the folder is laid out otherwise.
    """
    if place.is_file():
        return _from_csv(place, split)
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


def _from_csv(file: Path, split: str) -> Listed:
    if file.stat().st_size > _MOST_CSV_BYTES:
        raise InputError(f"data.dir: expected a CSV file of at most {_MOST_CSV_BYTES >> 20} MB, got {file}")
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines, strict=True, skipinitialspace=True)
            columns = _check_columns(table.fieldnames or (), file)
            rows = [(row["path"], row.get("label"), row.get("split")) for row in map(_whole, table)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"data.dir: expected a CSV file, got {file}: {error}") from error
    if not rows:
        raise InputError(f"data.dir: expected rows in {file}, got none")
    _check_filled("path", [path for path, *_ in rows], file)
    labels, class_names = _named([label for _, label, _ in rows], file) if "label" in columns else (None, ())
    known = sorted({one or "" for *_, one in rows}) if "split" in columns else ["all"]
    if split not in known:
        raise InputError(f"split: expected one of {', '.join(map(printable, known[:20]))} of {file}, got {split!r}")
    kept = [i for i, (*_, one) in enumerate(rows) if "split" not in columns or one == split]
    paths = [str(file.parent / rows[i][0]) for i in kept]
    return _some(paths, None if labels is None else labels[kept], class_names, file)


def _check_columns(names: Sequence[str], file: Path) -> set[str]:
    """Return the names of a file's columns, of which it has ``path``, and each once."""
    columns = set(names)
    if "path" not in columns or len(columns) < len(names):
        expected = f"columns path and perhaps label and split, each once, in the first line of {file}"
        raise InputError(f"data.dir: expected {expected}, got {listed(names, most=10) or 'none'}")
    if others := sorted(columns - {"path", "label", "split"}):
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


class Transformed:
    """A source of arrays or (array, label) with each image transformed."""

    def __init__(self, source: Source, transform: Transform, name: str) -> None:
        """Read nothing yet."""
        self.wrapped, self._transform, self._name = source, transform, name

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.wrapped)

    def __getitem__(self, index: int, /) -> Any:  # noqa: ANN401 (see Source)
        """Return one row."""
        record, origin = self.wrapped[index], f"data.name: row {index} of {self._name}"
        if isinstance(record, dict):
            return record | {"image": self._transform.array(np.asarray(record["image"]), origin)}
        if isinstance(record, tuple):
            return self._transform.array(np.asarray(record[0]), origin), *record[1:]
        return self._transform.array(np.asarray(record), origin)
