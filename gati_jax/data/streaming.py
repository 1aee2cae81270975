"""Images that are read when they are needed: rows of any sized, indexable source, a few batches in memory at a time.

``ImageRows`` is indexed like an array of the images, so what works on batches takes either. Threads read the rows, for
decoding is the slowest part. One scan over all rows keeps a digest of each; whenever a row is read again it is compared
with its digest, because a certificate about rows that change would be about nothing.
"""

import collections
import contextlib
import hashlib
import itertools
import logging
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Shaped, UInt8, UInt64

from gati_jax.errors import InputError, describe_failure, kind_of

_log = logging.getLogger(__name__)
_THREADS = min(8, os.cpu_count() or 1)
_TASK_ROWS = 16  # that a thread reads in a row: handing over each alone would cost more than a small row itself
_AHEAD = 2  # batches that are read while the caller works on another
_SCAN_BYTES = 2**25
_MOST_ROWS = 2**28  # whose numbers alone take gigabytes


@runtime_checkable
class Source(Protocol):
    """Anything sized and indexable, as Grain's ``RandomAccessDataSource`` or a map-style PyTorch data set is.

    A row is an image, a tuple (image, label) or a mapping with ``image`` and perhaps ``label``. Several threads read at
    once, and a row must be the same whenever it is read: no random augmentation.
    """

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, index: int, /) -> Any:  # noqa: ANN401 (see above)
        """Return one row."""
        ...


class Scan(NamedTuple):
    """What one pass over n rows leaves in memory."""

    digests: UInt64[np.ndarray, " n"]
    labels: np.ndarray | None
    """As the source has them; None if it has none."""
    cells: Float32[np.ndarray, "n 4 4"] | None
    """Coarse grey images; None if the rows are no uint8 images."""
    largest: int
    """The largest pixel; 0 if the rows are no uint8 images."""


def _length(source: Any, name: str) -> int:  # noqa: ANN401 (checked here)
    if not isinstance(source, Source):
        raise InputError(f"{name}: expected a sized, indexable source, got {kind_of(source)}")
    try:
        n = len(source)
    except Exception as error:  # of a source's own code, or of Python about what it returned
        got = describe_failure(error)
        raise InputError(f"{name}: expected a source of which len() is the number of rows, got {got}") from error
    if n == 0:
        raise InputError(f"{name}: expected at least one row, got none")
    if n > _MOST_ROWS:
        raise InputError(f"{name}: expected at most {_MOST_ROWS} rows, got {n}")
    return n


class ImageRows:
    """The images of a source, read when they are indexed.

    Args:
        source: See ``Source``.
        name: The argument or config key that it came from, for messages.

    Raises:
        InputError: It is empty, or its first row is no array.
    """

    def __init__(self, source: Source, *, name: str = "images") -> None:
        """Read the first row, for its shape and dtype."""
        self._source, self._name = source, name
        self._at, self._scan = np.arange(_length(source, name)), None
        image, _ = self._record(0)
        self._row_shape, self.dtype = image.shape, image.dtype

    def __repr__(self) -> str:
        """Describe it in a line."""
        return f"ImageRows({self.dtype}{[*self.shape]})"

    def take(self, rows: np.ndarray | slice) -> "ImageRows":
        """Return some of the rows, which are not read for it."""
        part = object.__new__(ImageRows)
        part.__dict__.update(self.__dict__)
        part._at, part._scan = self._at[rows], _part_of(self._scan, rows)
        return part

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array's."""
        return (len(self._at), *self._row_shape)

    @property
    def ndim(self) -> int:
        """As an array's."""
        return len(self.shape)

    @property
    def row_bytes(self) -> int:
        """The memory of one image."""
        return int(np.prod(self._row_shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        """Return n."""
        return len(self._at)

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield image by image; some are read ahead."""
        starts = range(0, len(self), _TASK_ROWS)
        for images in self.batches(np.arange(start, min(start + _TASK_ROWS, len(self))) for start in starts):
            yield from images

    def __getitem__(self, rows: int | np.integer | slice | np.ndarray | Sequence[int] | tuple[Any, ...]) -> np.ndarray:
        """Read one image, or several as an array; further indices choose parts of what was read."""
        if isinstance(rows, tuple):
            found = self[rows[0]]
            return found[(*([slice(None)] if found.ndim == self.ndim else []), *rows[1:])]
        if isinstance(rows, int | np.integer):
            return self._checked(int(np.arange(len(self))[rows]))[0]
        return next(self.batches([np.arange(len(self))[rows]]))

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:  # noqa: FBT001 (NumPy's)
        """Read all rows into memory."""
        if copy is False:
            raise ValueError("images that are read from a source can only be copied into an array")
        return self[:].astype(dtype or self.dtype, copy=False)

    def batches(self, order: Iterable[Int[np.ndarray, " batch"]]) -> Generator[np.ndarray]:
        """Yield the images of each batch of row numbers; the next ones are read meanwhile."""
        with contextlib.closing(self._records(order)) as records:
            for images, _ in records:
                yield images

    def scan(self) -> Scan:
        """Read every row once, the first time, and return what is kept of all."""
        if self._scan is None:
            n = len(self)
            _log.info("%s: reading %d rows of %s%s for their digests", self._name, n, self.dtype, [*self._row_shape])
            size = max(1, min(1000, _SCAN_BYTES // max(1, self.row_bytes)))
            order = (np.arange(start, min(start + size, n)) for start in range(0, n, size))
            pictures = self.dtype == np.uint8 and self.ndim == len("nhwc")
            digests, cells, labels, largest = [], [], [], 0
            with contextlib.closing(self._records(order)) as records:
                for images, some in records:
                    digests.append(digest_rows(images))
                    labels += some
                    if pictures:
                        cells.append(coarse_cells(images))
                        largest = max(largest, int(images.max()))
            known = None if all(label is None for label in labels) else np.asarray(labels)
            self._scan = Scan(np.concatenate(digests), known, np.concatenate(cells) if cells else None, largest)
        return self._scan

    def load(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return all images, and the labels as the source has them, in memory."""
        with contextlib.closing(self._records([np.arange(len(self))])) as records:
            images, labels = next(records)
        return images, None if all(label is None for label in labels) else np.asarray(labels)

    def _records(self, order: Iterable[np.ndarray]) -> Generator[tuple[np.ndarray, list[Any]]]:
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="rows")
        waiting: collections.deque[_Batch] = collections.deque()
        try:
            for rows in order:
                waiting.append(self._submit(pool, np.asarray(rows)))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().wait()
            while waiting:
                yield waiting.popleft().wait()
        finally:
            pool.shutdown(cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, rows: np.ndarray) -> "_Batch":
        unique, inverse = np.unique(rows, return_inverse=True)  # padding repeats a row
        images = np.empty((len(unique), *self._row_shape), self.dtype)
        labels: list[Any] = [None] * len(unique)

        def fill(start: int) -> None:
            for i in range(start, min(start + _TASK_ROWS, len(unique))):
                images[i], labels[i] = self._checked(int(unique[i]))

        return _Batch(
            images, labels, inverse, [pool.submit(fill, start) for start in range(0, len(unique), _TASK_ROWS)]
        )

    def _checked(self, row: int) -> tuple[np.ndarray, Any]:
        """Read one row, and compare it with what is known of it."""
        at = int(self._at[row])
        image, label = self._record(at)
        if image.shape != self._row_shape or image.dtype != self.dtype:
            one, other = sorted([f"{self.dtype}{[*self._row_shape]}", f"{image.dtype}{[*image.shape]}"])
            raise InputError(f"{self._name}: expected images of one size and dtype, got {one} and {other} (row {at})")
        if image.dtype.kind in "fV" and not np.isfinite(image).all():  # V: bfloat16
            raise InputError(f"{self._name}: expected finite values, got NaN or infinity in row {at}")
        if self._scan is not None and digest_rows(image[None])[0] != self._scan.digests[row]:
            raise InputError(
                f"{self._name}: expected row {at} to be the same whenever it is read, got another image: is it"
                " augmented at random, read by code that threads may not share, or has its file changed?"
            )
        return image, label

    def _record(self, at: int) -> tuple[np.ndarray, Any]:
        try:
            record, label = self._source[at], None
            if isinstance(record, Mapping):
                record, label = record["image"], record.get("label")
            elif isinstance(record, tuple):
                record, label = record[0], record[1] if len(record) > 1 else None
            image = np.asarray(record)
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # whatever a source's own code raises
            source = type(getattr(self._source, "wrapped", self._source)).__name__
            raise InputError(f"{self._name}: row {at} of {source} cannot be read: {describe_failure(error)}") from error
        if image.dtype.kind not in "biufV" or image.dtype.names:
            raise InputError(f"{self._name}: expected an array of numbers in row {at}, got {image.dtype}")
        return image, label


class _Batch(NamedTuple):
    """Rows that are being read; equal rows once."""

    images: np.ndarray
    labels: list[Any]
    inverse: np.ndarray
    futures: list[Future[None]]

    def wait(self) -> tuple[np.ndarray, list[Any]]:
        for future in self.futures:
            future.result()
        if np.array_equal(self.inverse, np.arange(len(self.images))):
            return self.images, self.labels
        return self.images[self.inverse], [self.labels[i] for i in self.inverse]


Images = np.ndarray | ImageRows
"""Images[n, ...] in memory, or read when they are indexed."""


def take(images: Images, rows: np.ndarray | slice) -> Images:
    """Return some rows; those of a source are not read for it."""
    return images.take(rows) if isinstance(images, ImageRows) else images[rows]


def read_batches(
    arrays: Sequence[Images], order: Iterable[Int[np.ndarray, " batch"]]
) -> Generator[tuple[np.ndarray, ...]]:
    """Yield the same rows of several arrays for each batch of row numbers; a source's are read ahead."""
    orders = itertools.tee(order, len(arrays))
    readers = [_read(rows, numbers) for rows, numbers in zip(arrays, orders, strict=True)]
    try:
        yield from zip(*readers, strict=True)
    finally:
        for reader in readers:
            reader.close()


def _read(images: Images, order: Iterable[np.ndarray]) -> Generator[np.ndarray]:
    if isinstance(images, ImageRows):
        with contextlib.closing(images.batches(order)) as batches:
            yield from batches
    else:
        yield from (images[rows] for rows in order)


def row_digests(images: Images) -> UInt64[np.ndarray, " n"]:
    """Return a 64-bit digest of every row's bytes, by which rows are recognised across splits."""
    return images.scan().digests if isinstance(images, ImageRows) else digest_rows(images)


def digest_rows(images: Shaped[np.ndarray, "n ..."]) -> UInt64[np.ndarray, " n"]:
    """Return ``row_digests`` of an array."""
    rows = np.ascontiguousarray(images)
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(b"".join(digests), np.uint64)


def coarse_cells(images: UInt8[np.ndarray, "n height width channels"]) -> Float32[np.ndarray, "n 4 4"]:
    """Average grey levels over 4x4 cells, which may divide pixels; in parts, for memory."""
    height, width = (_shares(side) for side in images.shape[1:3])
    step = max(1, min(1000, _SCAN_BYTES // max(1, images[:1].nbytes)))
    parts = (images[i : i + step].mean(-1, dtype=np.float32) for i in range(0, len(images), step))
    return np.concatenate([height @ part @ width.T for part in parts])


def _shares(side: int) -> Float32[np.ndarray, "4 side"]:
    """Return by which shares the pixels of a side lie in each of 4 cells."""
    edges = np.arange(5)[:, None] * side / 4
    inside = np.clip(edges - np.arange(side), 0, 1)  # of each pixel, left of an edge
    return (np.diff(inside, axis=0) * 4 / side).astype(np.float32)


def _part_of(scan: Scan | None, rows: np.ndarray | slice) -> Scan | None:
    if scan is None:
        return None
    labels, cells = (None if column is None else column[rows] for column in (scan.labels, scan.cells))
    return Scan(scan.digests[rows], labels, cells, scan.largest)
