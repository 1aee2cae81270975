"""The memory that "Accelerating Deep Learning Inference via Freezing" publishes, beside the arithmetic."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from gati_jax.caches import MIB


class PublishedMemory(NamedTuple):
    """One figure of the paper and the arithmetic behind it."""

    what: str
    published_mb: float | None
    """None where the paper gives no figure."""
    arithmetic: str
    bytes: int

    @property
    def mb(self) -> float:
        """In MB of 2^20 bytes, with which the published figures come out."""
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

    def row(what: str, published: float | None, *factors: tuple[int, str]) -> PublishedMemory:
        arithmetic = " x ".join(f"{n:,} {unit}" for n, unit in factors)
        return PublishedMemory(what, published, arithmetic, math.prod(n for n, _ in factors))

    of_key, in_blocks, doubles = (units, "numbers"), (numbers, "numbers in all blocks"), (8, "bytes")
    return (
        row("raw k-NN", 37_500.0, (points, "points"), in_blocks, (4, "bytes")),
        row("reduced k-NN", 2_500.0, (points, "points"), of_key, (blocks, "blocks"), doubles),
        row("k-means", 12.5, (centres, "centres"), of_key, (blocks, "blocks"), doubles),
        row("k-means, ResNet-50", 25.0, (centres, "centres"), of_key, (2 * blocks, "blocks"), doubles),
        row("key networks", None, in_blocks, (units, "units"), (4, "bytes")),
    )
