"""Schedules: how many rows are covered by tiles of a few fixed sizes."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from gati_jax._errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Full tiles first, then what is cheapest for the rest: one more full tile, partly empty, or smaller ones.

    Args:
        sizes: Rows in a tile, falling.
        rest: For r = 0 .. sizes[0] - 1 remaining rows, how many tiles of each size.
    """

    sizes: tuple[int, ...]
    rest: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Check that every rest is covered.

        Raises:
            InputError: Sizes that do not fall, or a rest that is not covered.
        """
        if not self.sizes or min(self.sizes) < 1 or list(self.sizes) != sorted(set(self.sizes), reverse=True):
            msg = f"sizes: expected falling tile sizes, got {self.sizes}"
            raise InputError(msg)
        if len(self.rest) != self.sizes[0] or any(self._rows(counts) < r for r, counts in enumerate(self.rest)):
            msg = f"rest: expected tiles that cover 0 .. {self.sizes[0] - 1} rows, got {self.rest}"
            raise InputError(msg)

    @classmethod
    def of(cls, milliseconds: Mapping[int, float], *, batch: int | None = None) -> "Schedule":
        """Choose tiles by their measured times.

        Args:
            milliseconds: What a tile of each size takes.
            batch: The most rows that there will be; larger tiles than that are not considered.

        Raises:
            InputError: No tile size is at most ``batch``.
        """
        sizes = sorted(size for size in milliseconds if batch is None or size <= batch)
        if not sizes:
            msg = f"milliseconds: expected a tile of at most {batch} rows, got {sorted(milliseconds)}"
            raise InputError(msg)
        full = min(reversed(sizes), key=lambda size: milliseconds[size] / size)
        sizes = [size for size in reversed(sizes) if size <= full]
        cheapest: list[tuple[float, tuple[int, ...]]] = [(0.0, (0,) * len(sizes))]
        for rows in range(1, full):
            options = []
            for i, size in enumerate(sizes):
                ms, counts = cheapest[max(0, rows - size)]
                options.append((ms + milliseconds[size], (*counts[:i], counts[i] + 1, *counts[i + 1 :])))
            cheapest.append(min(options))
        return cls(sizes=tuple(sizes), rest=tuple(counts for _, counts in cheapest))

    def _rows(self, counts: tuple[int, ...]) -> int:
        return sum(size * count for size, count in zip(self.sizes, counts, strict=True))

    @functools.cached_property
    def table(self) -> Int[np.ndarray, "rest sizes"]:
        """``rest`` as an array."""
        return np.array(self.rest, np.int32)

    def tiles(self, rows: int) -> tuple[int, ...]:
        """Return how many tiles of each size ``rows`` rows take."""
        full, rest = divmod(rows, self.sizes[0])
        return (self.rest[rest][0] + full, *self.rest[rest][1:])

    def covered(self, rows: int) -> int:
        """Return the most rows that the tiles for at most ``rows`` rows take up."""
        return max(self._rows(self.tiles(n)) for n in range(rows + 1))

    def milliseconds(self, rows: int, tile_ms: Mapping[int, float]) -> float:
        """Return what ``rows`` rows take."""
        return sum(tile_ms[size] * count for size, count in zip(self.sizes, self.tiles(rows), strict=True))
