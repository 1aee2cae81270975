"""Data sets in few files: NumPy's .npz archives, and Hugging Face's ``datasets``, local or from the hub. No pickles."""

import math
import re
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gati_jax.errors import InputError, listed, printable

from .groups import Groups, as_groups
from .pictures import Transform, read_regular
from .streaming import Source

_MOST_BYTES = 2**34  # of a compressed array, which is read into memory
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, ..., lengths of its name and extra field
REPOSITORY = r"[A-Za-z0-9_.-]{1,96}(/[A-Za-z0-9_.-]{1,96})?(:[A-Za-z0-9_.+-]{1,96})?(@[A-Za-z0-9_./+-]{1,96})?"


class Opened(NamedTuple):
    """One split of a data set."""

    images: Source
    labels: np.ndarray | None
    class_names: tuple[str, ...] = ()
    ids: Sequence[str] | None = None
    """What the source calls its rows; None if it only counts them."""
    groups: Groups | None = None
    """What rows belong together; None where they are independent."""


def open_npz(place: Path, split: str) -> Opened:
    """Open an archive's arrays ``images`` and perhaps ``labels`` and ``groups``.

    Those that are not compressed stay on disk.

    Args:
        place: The file, whose arrays may be called ``train_images``, ``train_labels`` and ``train_groups`` for each
            split instead; or a folder with a file for each split, such as ``train.npz``.
        split: "all", or the name of a split.

    Raises:
        InputError: There is none, or it holds something else.
    """
    if place.is_dir():
        known = {file.stem: (file, "") for file in sorted(place.glob("*.npz"))}
    else:
        with _archive(place) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
        whole = {"all": (place, "")} if "images" in names else {}
        parts = sorted(name.removesuffix("_images") for name in names if name.endswith("_images"))
        known = whole | {name: (place, f"{name}_") for name in parts}
        if not known:
            expected = "an array images, or one such as train_images for each split"
            raise InputError(f"data.dir: expected {expected}, {place} has {listed(sorted(names), most=10) or 'none'}")
    if split not in known:
        raise InputError(f"split: expected one of {listed([*known]) or 'some .npz files'} of {place}, got {split!r}")
    file, prefix = known[split]
    images, labels = (_read_array(file, f"{prefix}{name}") for name in ("images", "labels"))
    if images is None or images.ndim < len("nx") or not len(images):
        got = "none" if images is None else f"shape {[*images.shape]}"
        raise InputError(f"data.dir: expected an array {prefix}images[n, ...] in {file}, got {got}")
    if labels is not None and labels.shape != images.shape[:1]:
        got = f"shape {[*labels.shape]}"
        raise InputError(f"data.dir: expected {prefix}labels[{len(images)}], as {prefix}images, in {file}, got {got}")
    groups = _read_array(file, f"{prefix}groups", kinds="biuUS")
    together = None if groups is None else as_groups(f"data.dir: {prefix}groups in {file}", groups, len(images))
    return Opened(images, labels, groups=together)


def _archive(file: Path) -> zipfile.ZipFile:
    if not file.is_file():
        raise InputError(f"data.dir: expected an .npz file or a folder of them, got {file}")
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise InputError(f"data.dir: expected an .npz file, got {file}: {error}") from error


def _read_array(file: Path, name: str, *, kinds: str = "biuf") -> np.ndarray | None:
    """Return an array of an archive, mapped from the file where it is stored as it is; None if there is none."""
    with _archive(file) as archive:
        try:
            info = archive.getinfo(f"{name}.npy")
        except KeyError:
            return None
        try:
            return _member(file, archive, info, kinds)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError, struct.error) as error:
            what = printable(str(error)) or type(error).__name__
            expected = "an array of numbers" + (" or names" if "U" in kinds else "")
            raise InputError(f"data.dir: expected {expected}, got {name} in {file} with {what}") from error


def _member(file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, kinds: str) -> np.ndarray:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in {(1, 0), (2, 0)}:
            raise ValueError(f"version {version} of NumPy's format")
        one = version == (1, 0)
        read = np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
        if dtype.hasobject or dtype.kind not in kinds or fortran:
            raise ValueError(f"dtype {dtype}{' in Fortran order' if fortran else ''}")
        begin, size = member.tell(), math.prod(shape) * dtype.itemsize
        if info.file_size != begin + size:
            raise ValueError(f"{info.file_size} bytes for {dtype}{[*shape]}")
        if info.compress_type == zipfile.ZIP_STORED and size:
            return np.memmap(file, dtype, "r", _start_of(file, info) + begin, tuple(shape))
        if size > _MOST_BYTES:
            raise ValueError(f"{size} bytes that are compressed: write it with np.savez")
        return np.frombuffer(_read(member, size), dtype).reshape(shape)


def _read(member: Any, size: int) -> bytearray:  # noqa: ANN401 (zipfile's)
    """Read exactly so many bytes; memory grows only with what is really there."""
    data = bytearray()
    while len(data) < size and (some := member.read(min(2**24, size - len(data)))):
        data += some
    if len(data) < size:
        raise EOFError(f"{len(data)} of {size} bytes")
    return data


def _start_of(file: Path, info: zipfile.ZipInfo) -> int:
    """Return where a stored member's bytes begin in the file."""
    with file.open("rb") as raw:
        raw.seek(info.header_offset)
        signature, name, extra = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise ValueError("a damaged header")
    return info.header_offset + _LOCAL_HEADER.size + name + extra


def open_huggingface(
    place: Path | None,
    split: str,
    *,
    repository: str | None,
    columns: tuple[str | None, str | None, str | None],
    transform: Transform,
) -> Opened:
    """Open a split of a data set of Hugging Face's.

    Args:
        place: A folder of parquet files, or one that ``save_to_disk`` wrote.
        split: One that it has; "all" where it has none.
        repository: Instead of ``place``, a name on the hub: ``owner/name``, ``owner/name:config``, with ``@revision``.
        columns: Of images, labels and groups; None for the only column of images, the only one of class labels or the
            one called label, and for no groups.
        transform: Of pictures.

    Raises:
        InputError: There is none, it cannot be read, or the columns are not clear.
    """
    try:
        import datasets  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise InputError('data.name: huggingface needs datasets (pip install "gati-jax[huggingface]")') from error
    library: Any = datasets
    if (place is None) == (repository is None):
        raise InputError("data.dir, data.repository: expected a folder, or a name on the Hugging Face hub, one of them")
    what = printable(str(repository or place))
    try:
        found: Any = _on_the_hub(library, repository) if repository else _in_folder(library, Path(place or ""))
    except InputError:
        raise
    except Exception as error:  # of the library, of Arrow, of the network
        reason = printable(str(error).partition("\n")[0]) or type(error).__name__
        raise InputError(f"data.name: expected a data set that datasets can load, got {what}: {reason}") from error
    parts = dict(found) if isinstance(found, dict) else {"all": found}
    if split not in parts:
        raise InputError(f"split: expected one of {listed(sorted(parts))} of {what}, got {split!r}")
    rows = parts[split]
    features = dict(rows.features)
    picture = [name for name, feature in features.items() if isinstance(feature, library.Image)]
    image = _column("image", columns[0], picture, features, what)
    if image is None:
        raise InputError(f"data.image_column: expected the column of images, {what} has {listed(sorted(features))}")
    classes = [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]
    label = _column("label", columns[1], classes or [n for n in ("label",) if n in features], features, what)
    labels = None if label is None else np.asarray(rows.select_columns([label])[:][label])
    names = tuple(getattr(features.get(label or ""), "names", None) or ())
    group = _column("group", columns[2], [], features, what)
    together = None
    if group is not None:
        together = as_groups(f"data.group_column: {group} of {what}", rows.select_columns([group])[:][group], len(rows))
    only = rows.select_columns([image])
    encoded = image in picture
    only = only.cast_column(image, library.Image(decode=False)) if encoded else only.with_format("numpy")
    return Opened(_Column(only, image, transform, what), labels, names, groups=together)


def _on_the_hub(library: Any, repository: str) -> Any:  # noqa: ANN401 (an optional module)
    if not re.fullmatch(REPOSITORY, repository):
        expected = "owner/name, owner/name:config or owner/name@revision"
        raise InputError(f"data.repository: expected {expected}, got {repository!r}")
    name, _, revision = repository.partition("@")
    name, _, config = name.partition(":")
    return library.load_dataset(name, config or None, revision=revision or None)


def _in_folder(library: Any, place: Path) -> Any:  # noqa: ANN401 (an optional module)
    """Load a local data set by formats that hold data only."""
    if (place / "state.json").is_file() or (place / "dataset_dict.json").is_file():
        return library.load_from_disk(str(place))
    if place.is_file() and place.suffix == ".parquet":
        return library.load_dataset("parquet", data_files=str(place))
    if any(place.rglob("*.parquet")):
        return library.load_dataset("parquet", data_dir=str(place))
    expected = "a folder of parquet files, or one that save_to_disk wrote"
    raise InputError(f"data.dir: expected {expected}, got {place}")


def _column(kind: str, wanted: str | None, found: list[str], features: dict[str, Any], what: str) -> str | None:
    if wanted is not None and wanted not in features:
        raise InputError(f"data.{kind}_column: expected one of {listed(sorted(features))} of {what}, got {wanted!r}")
    if wanted is None and len(found) > 1:
        raise InputError(f"data.{kind}_column: expected one of {listed(found)} of {what}, got none")
    return wanted or (found[0] if found else None)


class _Column:
    """A column of a data set as a source: encoded pictures, or nested lists of numbers."""

    def __init__(self, rows: Any, column: str, transform: Transform, what: str) -> None:  # noqa: ANN401 (optional)
        self._rows, self._column, self._transform, self._what = rows, column, transform, what

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> np.ndarray:
        value, origin = self._rows[index][self._column], f"data.name: row {index} of {self._what}"
        if isinstance(value, dict) and ("bytes" in value or "path" in value):
            encoded = value.get("bytes")
            if encoded is None and value.get("path"):
                encoded = read_regular(value["path"])
            if encoded is None:
                raise InputError(f"{origin}: expected a picture, got none")
            return self._transform.picture(encoded, origin)
        return self._transform.array(np.asarray(value), origin)
