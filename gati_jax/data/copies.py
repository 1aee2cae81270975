"""Whether splits share rows: equal ones by their digests, near copies by their pixels."""

import hashlib

import numpy as np
from jaxtyping import UInt64
from scipy.spatial import KDTree

from gati_jax.errors import InputError

from .streaming import ImageRows, Images, coarse_cells

_SHARED_ROWS = 0.01  # a larger share of equal rows is an overlap; a smaller one is the duplicates of real data


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


def count_near_copies(one: Images, other: Images | None = None) -> int:
    """Return how many images of ``one`` are in ``other`` (None: among its others), but for noise, mirrored or not.

    Two images are near copies if their pixels differ by 1 % of the largest pixel on average, or by one level at most.
    Candidates are nearest neighbours in a coarse grey image of 4x4 cells, in which noise averages out.

    Args:
        one: uint8[n, height, width, channels].
        other: uint8[m, height, width, channels].
    """
    itself, other = other is None, one if other is None else other
    cells, _ = _coarse(one)
    others, largest = _coarse(other)
    noise, tree = max(largest, 1) / 100, KDTree(others.reshape(len(other), -1))
    found = np.zeros(len(one), bool)
    for step in (1, -1):  # as it is, and mirrored
        turned, reach = cells[:, :, ::step].reshape(len(one), -1), max(noise, 1.0) + 1e-3
        _, nearest = tree.query(turned, 1 + itself, p=np.inf, distance_upper_bound=reach)
        for i, match in zip(np.repeat(np.arange(len(one)), 1 + itself), np.ravel(nearest), strict=True):
            if found[i] or match == len(other) or (itself and match == i):  # none is near
                continue
            difference = np.abs(one[i][:, ::step].astype(np.int16) - other[match])
            found[i] = bool(difference.mean() <= noise or difference.max() <= 1)
    return int(found.sum())


def _coarse(images: Images) -> tuple[np.ndarray, int]:
    """Return coarse grey images float32[n, 4, 4], and the largest pixel."""
    if isinstance(images, ImageRows):
        scan = images.scan()
        if scan.cells is None:
            raise InputError(f"images: expected uint8[n, height, width, channels], got {images.dtype}")
        return scan.cells, scan.largest
    return coarse_cells(images), int(images.max())
