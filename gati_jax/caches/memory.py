"""What neighbour caches weigh, counted and as the paper states it."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gati_jax._errors import InputError

from .candidate import Candidate
from .neighbours import Centres, Neighbours

MIB = 2**20  # the paper's MB


COUNT_BYTES = 4  # a k-NN cache's own number of points


def point_bytes(units: int) -> int:
    """Return the bytes of one stored point: its key, its label and its norm."""
    return 4 * units + 4 + 4


def points_within(budget: int, units: int) -> int:
    """Return for how many points a k-NN cache has room in ``budget`` bytes, its count of them included."""
    return max(0, budget - COUNT_BYTES) // point_bytes(units)


class CacheMemory(NamedTuple):
    """The bytes of one neighbour cache."""

    name: str
    site: int
    key_network: int
    points: int

    @property
    def total(self) -> int:
        """Both."""
        return self.key_network + self.points


def memory_report(candidates: Iterable[Candidate]) -> tuple[CacheMemory, ...]:
    """Count the bytes of neighbour caches, key networks included.

    Two caches at one site may share a key network; each is charged with it, as if it stood alone.

    Raises:
        InputError: A candidate is no neighbour cache.
    """
    rows = []
    for c in candidates:
        if not isinstance(c.predictor, Neighbours | Centres):
            msg = f"candidates: expected neighbour caches, got {c.name}, a {type(c.predictor).__name__}"
            raise InputError(msg)
        hidden = c.params["predictor"]["params"]["hidden"]
        key_network = sum(leaf.size * leaf.dtype.itemsize for leaf in hidden.values())
        rows.append(CacheMemory(c.name, c.site, key_network, c.bytes - key_network))
    return tuple(rows)


class PublishedMemory(NamedTuple):
    """One figure of the paper, and what arithmetic gives."""

    what: str
    published_mb: float | None
    """None where the paper leaves it out."""
    arithmetic: str
    bytes: int

    @property
    def mb(self) -> float:
        """Of 2^20 bytes: only then do the published figures come out."""
        return self.bytes / MIB


def published_memory(
    shapes: Sequence[Sequence[int]], *, points: int = 40_000, units: int = 1024, centres: int = 100
) -> tuple[PublishedMemory, ...]:
    """Return the paper's memory table beside the arithmetic.

    Args:
        shapes: Of the activation behind every block of the paper's ResNet-18, 32x32x64 to 4x4x512.
        points: Stored; the published figures come out for the 35,000 and the 5,000 images together.
        units: Of a key.
        centres: Of a k-means cache.
    """
    blocks, numbers = len(shapes), sum(math.prod(shape) for shape in shapes)
    return (
        PublishedMemory(
            "raw k-NN",
            37_500.0,
            f"{points:,} points x {numbers:,} numbers in all blocks x 4 bytes",
            points * numbers * 4,
        ),
        PublishedMemory(
            "reduced k-NN",
            2_500.0,
            f"{points:,} points x {units:,} numbers x {blocks} blocks x 8 bytes",
            points * units * blocks * 8,
        ),
        PublishedMemory(
            "k-means",
            12.5,
            f"{centres:,} centres x {units:,} numbers x {blocks} blocks x 8 bytes",
            centres * units * blocks * 8,
        ),
        PublishedMemory(
            "k-means, ResNet-50",
            25.0,
            f"{centres:,} centres x {units:,} numbers x {2 * blocks} blocks x 8 bytes",
            centres * units * 2 * blocks * 8,
        ),
        PublishedMemory(
            "key networks",
            None,
            f"{numbers:,} numbers in all blocks x {units:,} units x 4 bytes",
            numbers * units * 4,
        ),
    )
