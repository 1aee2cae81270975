"""Images from TensorFlow Datasets or scikit-learn, in named splits that are checked to be disjoint.

TensorFlow is not needed: ``tfds.data_source`` reads array_record files with random access.
"""

import dataclasses
import hashlib
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Shaped, UInt8, UInt64
from scipy.spatial import KDTree

from .errors import InputError

_SPLIT = re.compile(r"(?P<name>\w+)(\[(?P<start>\d*):(?P<stop>\d*)\])?")
DATASET_NAME = r"[a-z0-9_]{1,100}(/[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99})?(:(\d{1,9}|\*)(\.(\d{1,9}|\*)){2})?"
"""As in TFDS: ``cifar10``, ``mnist_corrupted/identity:1.0.0``; it can neither leave a folder nor name code."""
_SHARED_ROWS = 0.01  # a larger share of equal rows is an overlap; a smaller one is the duplicates of real data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images with their labels, in memory."""

    images: Shaped[np.ndarray, "n ..."]
    labels: Int[np.ndarray, " n"] | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return n."""
        return len(self.images)

    def check(self, name: str, input_shape: tuple[int, ...], classes: int) -> None:
        """Check that a network takes the images and has an output for every class.

        Args:
            name: What the data are called in messages.
            input_shape: The network's, without the batch.
            classes: How many the network has.

        Raises:
            InputError: It does not.
        """
        if self.images.shape[1:] != input_shape:
            raise InputError(f"{name}: the network takes {input_shape}, got images {self.images.shape[1:]}")
        named, largest = len(self.class_names), -1 if self.labels is None else int(self.labels.max())
        if named not in {0, classes} or largest >= classes:
            got = f"{named} class names" if named else f"label {largest}"
            raise InputError(f"{name}: the network has {classes} classes, got {got}")


@dataclasses.dataclass(frozen=True, order=True)
class Rows:
    """A contiguous part of a source's split: ``test[2500:5000]``."""

    split: str
    start: int = 0
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Rows":
        """Parse TFDS's notation with absolute indices.

        Raises:
            InputError: Another notation, or no rows.

        Example:
            >>> Rows.parse("test[2500:]")
            Rows(split='test', start=2500, stop=None)
        """
        match = _SPLIT.fullmatch(text)
        if match is None:
            raise InputError(f"split: expected a form like train, test[:2500] or test[2500:5000], got {text!r}")
        rows = cls(match["name"], int(match["start"] or 0), int(match["stop"]) if match["stop"] else None)
        if rows.stop is not None and rows.stop <= rows.start:
            raise InputError(f"split: expected at least one row, got {text!r}")
        return rows

    def overlaps(self, other: "Rows") -> bool:
        """Return whether the two parts share a row."""
        before = self.stop is not None and self.stop <= other.start
        after = other.stop is not None and other.stop <= self.start
        return self.split == other.split and not before and not after


def check_disjoint(splits: Mapping[str, str]) -> None:
    """Check that named splits share no row.

    Args:
        splits: Parts of the source by name, such as ``{"select": "test[:2500]", "certify": "test[2500:5000]"}``.

    Raises:
        InputError: Names the two splits that overlap.
    """
    rows = {name: Rows.parse(text) for name, text in splits.items()}
    for one, other in itertools.combinations(rows, 2):
        if rows[one].overlaps(rows[other]):
            raise InputError(
                f"splits: expected disjoint splits, got {one}={splits[one]} overlapping {other}={splits[other]}"
            )


def load(name: str, split: str, data_dir: Path | str | None = None) -> Dataset:
    """Load part of a data set into memory.

    Args:
        name: "digits" (embedded in scikit-learn, 8x8, the one split "all") or a TFDS name such as "cifar10".
        split: "train", "test[2500:5000]", ...
        data_dir: TFDS's folder; None for its default one, into which a missing data set is downloaded.

    Returns:
        Images uint8[n, height, width, channels] with labels int32[n], if it has labels.

    Raises:
        InputError: The data set, the folder, the version or the split does not exist, the files have no random access,
            or the features are not what ``Dataset`` holds.
    """
    rows = Rows.parse(split)
    return _digits(rows) if name == "digits" else _tfds(name, rows, data_dir)


def _digits(rows: Rows) -> Dataset:
    from sklearn.datasets import load_digits  # noqa: PLC0415 (optional)

    if rows.split != "all":
        raise InputError(f"split: expected all, the only split of digits, got {rows.split!r}")
    source: Any = load_digits()
    part = slice(rows.start, _stop(rows, len(source.images)))
    # Pixels are whole numbers 0 .. 16. scikit-learn sorts the digits by writer, so contiguous parts would differ in
    # style; a fixed shuffle makes every part a sample of the same population, as certificates assume.
    order = np.random.default_rng(0).permutation(len(source.images))[part]
    images = source.images[order].astype(np.uint8)[..., None]
    return Dataset(images=images, labels=source.target[order].astype(np.int32), class_names=tuple("0123456789"))


def _tfds(name: str, rows: Rows, data_dir: Path | str | None) -> Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tfds 4.9.10 imports deprecated names of its dependencies
        import tensorflow_datasets as tfds  # noqa: PLC0415 (optional)

    if not re.fullmatch(DATASET_NAME, name):  # "namespace:name" would make TFDS import code, and bundles name data sets
        raise InputError(f"data.name: expected digits or a TensorFlow Datasets name such as cifar10, got {name!r}")
    builder = _builder(tfds, name, data_dir)
    if rows.split not in builder.info.splits:
        known = ", ".join(sorted(builder.info.splits))
        raise InputError(f"split: expected one of {known} of {name}, got {rows.split!r}")
    features = builder.info.features
    if "image" not in (known := sorted(getattr(features, "keys", tuple)())):
        raise InputError(f"data.name: expected features image and, if there are labels, label; {name} has {known}")
    stop = _stop(rows, builder.info.splits[rows.split].num_examples)
    try:
        source: Any = builder.as_data_source(split=f"{rows.split}[{rows.start}:{stop}]")
    except NotImplementedError as error:
        got = f"{name} in {builder.info.file_format.value}"
        raise InputError(f"data.dir: expected files with random access (array_record), got {got}") from error
    examples = [(np.asarray(example["image"]), example.get("label")) for example in source]
    images, labels = zip(*examples, strict=True)
    if len(sizes := {image.shape for image in images}) > 1:
        one, other = sorted(sizes)[:2]
        raise InputError(f"data.name: expected images of one size, {name} has {one} and {other}")
    if images[0].dtype != np.uint8 or images[0].ndim != len("hwc"):
        got = f"{images[0].dtype}{list(images[0].shape)}"
        raise InputError(f"data.name: expected images uint8[height, width, channels], {name} has {got}")
    if "label" not in known:
        return Dataset(images=np.stack(images))
    names = getattr(features["label"], "names", None) or ()  # plain integers have none
    return Dataset(images=np.stack(images), labels=_labels(name, labels), class_names=tuple(names))


def _builder(tfds: Any, name: str, data_dir: Path | str | None) -> Any:  # noqa: ANN401 (an optional module)
    """Return TFDS's builder of a data set that is ready to be read."""
    folder, _, wanted = name.partition(":")  # the version is a folder below
    if data_dir is not None and not (Path(data_dir) / folder).is_dir():
        raise InputError(f"data.dir: expected a TensorFlow Datasets folder with {folder}/ in it, got {data_dir}")
    builder: Any = None
    try:
        options: Any = {} if data_dir else {"file_format": "array_record"}
        builder = tfds.builder(name, data_dir=data_dir, **options)
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(f"data.name: expected digits or a TensorFlow Datasets name, got {name!r}") from error
    except AssertionError as error:  # how TFDS refuses a version
        if data_dir is None:
            raise InputError(f"data.name: expected a version that {folder} has, got {wanted!r}") from error
    if data_dir is None:
        builder.download_and_prepare()
    elif builder is None or not builder.is_prepared():
        there = sorted(file.parent.name for file in (Path(data_dir) / folder).glob("*/dataset_info.json"))
        expected = f"{folder} in version {wanted or getattr(builder, 'version', '')}"
        got = f"{', '.join(there) or 'none'}; a name like {folder}:1.2.3 asks for a version"
        raise InputError(f"data.dir: expected {expected}, got {got}")
    return builder


def _labels(name: str, given: Sequence[Any]) -> Int[np.ndarray, " n"] | None:
    """Return labels as integers; None if all are -1, by which TFDS marks splits without."""
    labels = np.asarray(given)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise InputError(f"data.name: expected an integer as label, {name} has {labels.dtype}{list(labels.shape[1:])}")
    if (labels == -1).all():
        return None
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most > np.iinfo(np.int32).max:
        raise InputError(f"data.name: expected labels from 0 on, {name} has {least} to {most}")
    return labels.astype(np.int32)


def _stop(rows: Rows, available: int) -> int:
    stop = available if rows.stop is None else rows.stop
    if stop > available or rows.start >= available:
        got = f"[{rows.start}:{rows.stop or ''}]"
        raise InputError(f"split: expected rows of {rows.split}, got {got}; {rows.split} has {available} rows")
    return stop


def batches(n: int, size: int, *, seed: tuple[int, ...]) -> Iterator[Int[np.ndarray, " size"]]:
    """Yield the row indices of one shuffled epoch of n rows in batches, without a last incomplete one."""
    order = np.random.default_rng(seed).permutation(n)
    for start in range(0, n - size + 1, size):
        yield order[start : start + size]


def full_batches(n: int, size: int) -> Iterator[Int[np.ndarray, " size"]]:
    """Yield n row indices in order; the last batch is padded with its first row, so that all have one shape."""
    for start in range(0, n, size):
        rows = np.arange(start, start + size)
        yield np.where(rows < n, rows, start)


def row_digests(images: Shaped[np.ndarray, "n ..."]) -> UInt64[np.ndarray, " n"]:
    """Return a 64-bit digest of every row's bytes, by which rows are recognised across splits."""
    rows = np.ascontiguousarray(images)
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), np.uint64)


def fingerprint(digests: UInt64[np.ndarray, " n"]) -> str:
    """Return one digest for a whole split, which depends on the order of its rows."""
    return hashlib.blake2b(digests.tobytes(), digest_size=16).hexdigest()


def check_distinct_rows(
    one: UInt64[np.ndarray, " n"], other: UInt64[np.ndarray, " m"], *, names: tuple[str, str]
) -> None:
    """Check by the rows' digests that two splits do not share them; a few duplicates in real data pass.

    Raises:
        InputError: More than 1 % of the smaller split's rows are in the other, too.
    """
    (few, name), (many, other_name) = sorted(((one, names[0]), (other, names[1])), key=lambda split: len(split[0]))
    shared = int(np.isin(few, many).sum())
    if shared > _SHARED_ROWS * len(few):
        raise InputError(
            f"splits: expected {name} and {other_name} disjoint, got {shared} rows of {name} in {other_name}"
        )


def count_near_copies(
    one: UInt8[np.ndarray, "n height width channels"], other: UInt8[np.ndarray, "m height width channels"] | None = None
) -> int:
    """Return how many images of ``one`` are in ``other`` (None: among its others), but for noise, mirrored or not.

    Two images are near copies if their pixels differ by 1 % of the largest pixel on average, or by one level at most.
    Candidates are nearest neighbours in a coarse grey image of 4x4 cells, in which noise averages out.
    """
    itself, other = other is None, one if other is None else other
    noise = max(int(other.max()), 1) / 100
    cells, tree = _coarse(one), KDTree(_coarse(other).reshape(len(other), -1))
    found = np.zeros(len(one), bool)
    for step in (1, -1):  # as it is, and mirrored
        turned, reach = cells[:, :, ::step].reshape(len(one), -1), max(noise, 1.0) + 1e-3
        _, nearest = tree.query(turned, 1 + itself, p=np.inf, distance_upper_bound=reach)
        for i, match in zip(np.repeat(np.arange(len(one)), 1 + itself), np.ravel(nearest), strict=True):
            if match == len(other) or (itself and match == i):  # none is near
                continue
            difference = np.abs(one[i, :, ::step].astype(np.int16) - other[match])
            found[i] |= bool(difference.mean() <= noise or difference.max() <= 1)
    return int(found.sum())


def _coarse(images: UInt8[np.ndarray, "n height width channels"]) -> Float32[np.ndarray, "n 4 4"]:
    """Average grey levels over 4x4 cells, which may divide pixels; in parts, for memory."""
    height, width = (_shares(side) for side in images.shape[1:3])
    parts = (images[i : i + 1000].mean(-1, dtype=np.float32) for i in range(0, len(images), 1000))
    return np.concatenate([height @ part @ width.T for part in parts])


def _shares(side: int) -> Float32[np.ndarray, "4 side"]:
    """Return by which shares the pixels of a side lie in each of 4 cells."""
    edges = np.arange(5)[:, None] * side / 4
    inside = np.clip(edges - np.arange(side), 0, 1)  # of each pixel, left of an edge
    return (np.diff(inside, axis=0) * 4 / side).astype(np.float32)
