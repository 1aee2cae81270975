"""Data sets by name: TensorFlow Datasets, scikit-learn's digits, picture files, archives, Hugging Face, functions.

TensorFlow is not needed: ``tfds.data_source`` reads array_record files with random access.
"""

import dataclasses
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field, ValidationError

from gati_jax.errors import InputError, as_array, as_path, check_kind, describe_failure
from gati_jax.options import Seed, Strict, describe_error

from .groups import Groups, as_groups, shuffled, whole_groups
from .listing import list_pictures
from .packed import REPOSITORY, Opened, open_huggingface, open_npz
from .pictures import Interpolation, Pictures, Transform, Transformed
from .splits import Rows
from .streaming import ImageRows, Images, Source

DATASET_NAME = r"[a-z0-9_]{1,100}(/[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99})?(:(\d{1,9}|\*)(\.(\d{1,9}|\*)){2})?"
"""As in TFDS: ``cifar10``, ``mnist_corrupted/identity:1.0.0``; it can neither leave a folder nor name code."""
_log = logging.getLogger(__name__)
_Side = Annotated[int, Field(ge=1, le=4096)]


class Reading(Strict):
    """How images are read that are not in their final form."""

    resize: _Side | tuple[_Side, _Side] | None = Field(
        default=None, description="the shorter side in pixels, or [height, width], as torchvision's Resize; unset: none"
    )
    crop: _Side | tuple[_Side, _Side] | None = Field(
        default=None, description="side or [height, width] of the centre that is kept then; unset: all"
    )
    interpolation: Interpolation = Field(default="bilinear", description="Pillow's filter, which is antialiased")
    channels: Literal[1, 3] | None = Field(
        default=None, description="1 for grey, 3 for RGB; unset: RGB for picture files, arrays as they are"
    )
    shuffle_seed: Seed | Literal["none"] = Field(
        default=0,
        description="by which rows are shuffled before they are split; none: as they come; TFDS has its own order",
    )
    memory_mb: Annotated[int, Field(ge=0)] = Field(
        default=512, description="a split up to this size is kept in memory; a larger one is read again in every pass"
    )
    repository: Annotated[str, Field(pattern=f"^{REPOSITORY}$")] | None = Field(
        default=None, description="huggingface: owner/name, owner/name:config or owner/name@revision on the hub"
    )
    image_column: str | None = Field(default=None, description="huggingface: unset: the only column of images")
    label_column: str | None = Field(default=None, description="huggingface: unset: the only one of classes, or label")
    group_column: str | None = Field(
        default=None,
        description="huggingface, or a CSV file of pictures: names of each row's recording, patient or camera",
    )

    @property
    def transform(self) -> Transform:
        """What is done to each image."""
        return Transform(resize=self.resize, crop=self.crop, interpolation=self.interpolation, channels=self.channels)

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Reading":
        """Check options.

        Raises:
            InputError: Names the first that is not right.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise InputError(f"data: {describe_error(error.errors(include_url=False)[0])}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images with their labels."""

    images: Images
    """In memory, or read when they are indexed."""
    labels: Int[np.ndarray, " n"] | None = None
    class_names: tuple[str, ...] = ()
    ids: np.ndarray | None = None
    """What the source calls each row: the path of a picture, or else the row's number in the source's own order."""
    groups: Groups | None = None
    """What rows belong together, such as a recording or a patient; None where they are independent."""

    def __repr__(self) -> str:
        """Describe it in a line."""
        classes = f"; {len(self.class_names)} classes" if self.class_names else ""
        labels = "without labels" if self.labels is None else "with labels"
        groups = "" if self.groups is None else f"; {len(np.unique(self.groups))} groups"
        return f"Dataset({self.images.dtype}{[*self.images.shape]} {labels}{classes}{groups})"

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


def load(name: str, split: str, data_dir: Path | str | None = None, **options: Any) -> Dataset:  # noqa: ANN401 (checked)
    """Load part of a data set.

    Args:
        name: "digits" (embedded in scikit-learn, 8x8, the one split "all"), "folder", "npz" or "huggingface", or a TFDS
            name such as "cifar10". Names never import code: see ``load_function``.
        split: "train", "test[2500:5000]", "all[:80%]", ...
        data_dir: TFDS's folder; None for its default one, into which a missing data set is downloaded. Otherwise the
            data set's own folder or file.
        options: Of ``Reading``: ``resize``, ``crop``, ``shuffle_seed``, ...

    Returns:
        Images, uint8[n, height, width, channels] unless an archive has others, with labels int32[n], if it has labels.
        Those that take more than ``memory_mb`` are read when they are indexed. Where the source has groups, no split
        divides one: its ends are moved to the nearest place where a group ends.

    Raises:
        InputError: The data set, the folder, the version or the split does not exist, the files have no random access,
            or the features are not what ``Dataset`` holds.
    """
    check_kind("data.name", name, str, "the name of a data set")
    rows, reading = Rows.parse(split), Reading.of(options)
    place = None if data_dir is None else as_path("data.dir", data_dir)
    in_columns = name == "huggingface" or (name == "folder" and place is not None and place.is_file())
    if reading.group_column is not None and not in_columns:
        raise InputError(f"data.group_column: expected huggingface or a CSV file of pictures with it, got {name}")
    if name == "digits":
        return _digits(rows)
    if name not in {"folder", "npz", "huggingface"}:
        return _tfds(name, rows, data_dir, reading)
    if name == "huggingface":
        opened = open_huggingface(
            place,
            rows.split,
            repository=reading.repository,
            columns=(reading.image_column, reading.label_column, reading.group_column),
            transform=reading.transform,
        )
    elif place is None:
        raise InputError(f"data.dir: expected the folder or file of {name}, got none")
    elif name == "folder":
        paths, labels, class_names, groups = list_pictures(place, rows.split, reading.group_column)
        opened = Opened(Pictures(paths, reading.transform), labels, class_names, paths, groups)
    else:
        archive = open_npz(place, rows.split)
        opened = archive._replace(images=Transformed(archive.images, reading.transform, str(place)))
    return _dataset(f"{name} {place or reading.repository}", opened, rows, reading)


def load_function(function: Callable[..., Any], split: str, *, name: str = "", **options: Any) -> Dataset:  # noqa: ANN401
    """Load part of what a function returns.

    Args:
        function: Takes the name of a split, or nothing, for "all". It returns images, (images, labels) or (images,
            labels, groups), with None for no labels. Images are an array or a ``Source``: read by several threads if
            its images take more than ``memory_mb``.
        split: As for ``load``.
        name: What messages call it; by default its own name.
        options: As for ``load``.

    Raises:
        InputError: It has no such split, or returns something else.
    """
    rows, reading = Rows.parse(split), Reading.of(options)
    name = name or getattr(function, "__qualname__", "the function")
    if not callable(function):
        raise InputError(f"data.name: expected a function, got {name}, which is {type(function).__name__}")
    if reading.group_column is not None:
        raise InputError(f"data.group_column: expected {name} to return groups itself, got {reading.group_column!r}")
    arguments = (rows.split,) if _takes_arguments(function) else ()
    if not arguments and rows.split != "all":
        raise InputError(f"split: expected all, for {name} takes no argument, got {rows.split!r}")
    try:
        found = function(*arguments)
    except (Exception, SystemExit) as error:
        raise InputError(f"data.name: {name} failed: {describe_failure(error)}") from error
    whole = isinstance(found, tuple) and len(found) in {2, 3}
    images, labels, groups = (*found, None)[:3] if whole else (found, None, None)
    if isinstance(images, str | bytes | dict) or not isinstance(images, Source):
        expected = "images, (images, labels[, groups]) or a sized, indexable source"
        raise InputError(f"data.name: expected {expected} from {name}, got {type(images).__name__}")
    given = None if labels is None else as_array("data.name", labels)
    if given is not None and given.shape[:1] != (len(images),):
        raise InputError(f"data.name: expected {len(images)} labels, as images, from {name}, got {[*given.shape]}")
    together = None if groups is None else as_groups(f"data.name: groups from {name}", groups, len(images))
    opened = Opened(Transformed(images, reading.transform, name), given, groups=together)
    return _dataset(name, opened, rows, reading)


def _takes_arguments(function: Callable[..., Any]) -> bool:
    try:
        return bool(inspect.signature(function).parameters)
    except ValueError:  # a function that is not written in Python may not tell
        return True


def _dataset(name: str, opened: Opened, rows: Rows, reading: Reading) -> Dataset:
    """Return some rows of an opened split, in memory if they are few."""
    found = ImageRows(opened.images, name="data.name")
    n = len(found)
    part = rows.within(n)
    order, how = np.arange(n), "in their own order"
    if opened.groups is not None:
        if reading.shuffle_seed != "none":
            order = shuffled(opened.groups, reading.shuffle_seed)
            how = f"groups shuffled by seed {reading.shuffle_seed}"
        part = whole_groups(opened.groups[order], part)
        how += f", {len(np.unique(opened.groups[order[part]]))} whole groups"
    elif reading.shuffle_seed != "none":
        # Often sorted by class: contiguous parts of it would be other populations, which certificates exclude.
        order, how = (
            np.random.default_rng(reading.shuffle_seed).permutation(n),
            f"shuffled by seed {reading.shuffle_seed}",
        )
    _log.info("%s: %d rows of %s, %s; using rows %d to %d", name, n, rows.split, how, part.start, part.stop - 1)
    images = found.take(order[part])
    labels = None if opened.labels is None else opened.labels[order[part]]
    ids = order[part] if opened.ids is None else np.asarray(opened.ids)[order[part]]
    kept = _kept(images, labels, reading, name, opened.class_names, ids)
    return kept if opened.groups is None else dataclasses.replace(kept, groups=opened.groups[order[part]])


def _kept(
    rows: ImageRows, labels: np.ndarray | None, reading: Reading, name: str, class_names: Sequence[str], ids: np.ndarray
) -> Dataset:
    """Return rows with their labels, which are in the source's records if none are given."""
    if len(rows) * rows.row_bytes <= reading.memory_mb * 10**6:
        images, own = rows.load()
    else:
        images, own = rows, rows.scan().labels if labels is None else None
    given = own if labels is None else labels
    return Dataset(
        images=images,
        labels=None if given is None else _labels(name, given),
        class_names=tuple(class_names),
        ids=ids,
    )


def _digits(rows: Rows) -> Dataset:
    from sklearn.datasets import load_digits  # noqa: PLC0415 (optional)

    if rows.split != "all":
        raise InputError(f"split: expected all, the only split of digits, got {rows.split!r}")
    source: Any = load_digits()
    # Pixels are whole numbers 0 .. 16. scikit-learn sorts the digits by writer, so contiguous parts would differ in
    # style; a fixed shuffle makes every part a sample of the same population, as certificates assume.
    order = np.random.default_rng(0).permutation(len(source.images))[rows.within(len(source.images))]
    images = source.images[order].astype(np.uint8)[..., None]
    labels = source.target[order].astype(np.int32)
    return Dataset(images=images, labels=labels, class_names=tuple("0123456789"), ids=order)


def _tfds(name: str, rows: Rows, data_dir: Path | str | None, reading: Reading) -> Dataset:
    if not re.fullmatch(DATASET_NAME, name):  # "namespace:name" would make TFDS import code, and bundles name data sets
        expected = "digits or a TensorFlow Datasets name such as cifar10, or folder, npz or huggingface"
        raise InputError(f"data.name: expected {expected}, got {name!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tfds 4.9.10 imports deprecated names of its dependencies
        import tensorflow_datasets as tfds  # noqa: PLC0415 (optional)

    builder = _builder(tfds, name, data_dir)
    if rows.split not in builder.info.splits:
        known = ", ".join(sorted(builder.info.splits))
        raise InputError(f"split: expected one of {known} of {name}, got {rows.split!r}")
    features = builder.info.features
    if "image" not in (known := sorted(getattr(features, "keys", tuple)())):
        raise InputError(f"data.name: expected features image and, if there are labels, label; {name} has {known}")
    part = rows.within(builder.info.splits[rows.split].num_examples)
    try:
        source: Any = builder.as_data_source(split=f"{rows.split}[{part.start}:{part.stop}]")
    except NotImplementedError as error:
        got = f"{name} in {builder.info.file_format.value}"
        raise InputError(f"data.dir: expected files with random access (array_record), got {got}") from error
    images = ImageRows(Transformed(source, reading.transform, name), name="data.name")
    if images.dtype != np.uint8 or images.ndim != len("nhwc"):
        got = f"{images.dtype}{[*images.shape[1:]]}"
        raise InputError(f"data.name: expected images uint8[height, width, channels], {name} has {got}")
    names = getattr(features["label"], "names", None) if "label" in known else ()
    ids = np.arange(part.start, part.stop)
    return _kept(images, None, reading, name, names or (), ids)  # plain integers have no names


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


def _labels(name: str, labels: np.ndarray) -> Int[np.ndarray, " n"] | None:
    """Return labels as integers; None if all are -1, by which TFDS marks splits without."""
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise InputError(f"data.name: expected an integer as label, {name} has {labels.dtype}{list(labels.shape[1:])}")
    if (labels == -1).all():
        return None
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most > np.iinfo(np.int32).max:
        raise InputError(f"data.name: expected labels from 0 on, {name} has {least} to {most}")
    return labels.astype(np.int32)
