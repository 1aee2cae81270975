"""Named parts of a source, which are checked to be disjoint, and the order in which rows are read."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Int

from gati_jax.errors import InputError, check_kind

_SPLIT = re.compile(r"(?P<name>\w[\w.-]*)(\[(?P<start>\d{0,12})(?P<from>%?):(?P<stop>\d{0,12})(?P<to>%?)\])?")
_WHOLE = 100  # per cent


@dataclasses.dataclass(frozen=True, order=True)
class Rows:
    """A contiguous part of a source's split: ``test[2500:5000]`` or ``test[:80%]``."""

    split: str
    start: int = 0
    stop: int | None = None
    percent: bool = False
    """Whether start and stop are percentages of the split's rows."""

    @classmethod
    def parse(cls, text: str) -> "Rows":
        """Parse TFDS's notation, with row numbers or percentages.

        Raises:
            InputError: Another notation, or no rows.

        Example:
            >>> Rows.parse("test[2500:]")
            Rows(split='test', start=2500, stop=None, percent=False)
        """
        check_kind("split", text, str, "a form like train or test[:2500]")
        match = _SPLIT.fullmatch(text)
        if match is None or (match["from"] and not match["start"]) or (match["to"] and not match["stop"]):
            expected = "a form like train, test[:2500], test[2500:5000] or test[80%:]"
            raise InputError(f"split: expected {expected}, got {text!r}")
        rows = cls(
            match["name"],
            int(match["start"] or 0),
            int(match["stop"]) if match["stop"] else None,
            bool(match["from"] or match["to"]),
        )
        if rows.percent and ((match["start"] and not match["from"]) or (match["stop"] and not match["to"])):
            raise InputError(f"split: expected row numbers or percentages, got both in {text!r}")
        if rows.percent and max(rows.start, rows.stop or 0) > _WHOLE:
            raise InputError(f"split: expected percentages up to 100%, got {text!r}")
        if rows.stop is not None and rows.stop <= rows.start:
            raise InputError(f"split: expected at least one row, got {text!r}")
        return rows

    def overlaps(self, other: "Rows") -> bool:
        """Return whether the two parts share a row, or could: numbers and percentages cannot be compared."""
        if self.split != other.split:
            return False
        if self.percent != other.percent:
            return True
        before = self.stop is not None and self.stop <= other.start
        after = other.stop is not None and other.stop <= self.start
        return not before and not after

    def within(self, available: int) -> slice:
        """Return the part of a split that has so many rows; percentages are rounded to the nearest row, as in TFDS.

        Raises:
            InputError: The split does not have these rows.
        """
        start, stop = self.start, available if self.stop is None else self.stop
        if self.percent:
            start = round(start * available / _WHOLE)
            stop = available if self.stop is None else round(stop * available / _WHOLE)
        if stop > available or start >= min(stop, available):
            unit = "%" if self.percent else ""
            got = f"[{self.start}{unit}:{f'{self.stop}{unit}' if self.stop else ''}]"
            raise InputError(f"split: expected rows of {self.split}, got {got}; {self.split} has {available} rows")
        return slice(start, stop)


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
            mixed = rows[one].percent != rows[other].percent
            hint = " (row numbers and percentages of one split cannot be compared)" if mixed else ""
            raise InputError(
                f"splits: expected disjoint splits, got {one}={splits[one]} overlapping {other}={splits[other]}{hint}"
            )


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
