"""Groups of rows: recordings, patients or cameras, whose rows are not independent and must stay in one split."""

import itertools
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Int, Shaped

from gati_jax.errors import InputError, printable

Groups = Shaped[np.ndarray, " n"]
"""Of every row the group that it belongs to: a whole number or a name."""


def as_groups(name: str, groups: Groups | Sequence[Hashable], n: int) -> Groups:
    """Return groups as an array of whole numbers or names.

    Args:
        name: What messages call them.
        groups: One for each row.
        n: Rows.

    Raises:
        InputError: There is not one for each row, or they are something else.
    """
    expected = f"{name}: expected a whole number or a name for each of {n} rows"
    try:
        names = np.asarray(groups)
        if names.dtype == object:  # a column of a data frame
            names = np.asarray(names.tolist())
    except ValueError as error:
        raise InputError(f"{expected}, got names of several lengths") from error
    if names.shape != (n,) or names.dtype.kind not in "iubUS":
        raise InputError(f"{expected}, got {names.dtype}{list(names.shape)}")
    return names


def shuffled(groups: Groups, seed: int) -> Int[np.ndarray, " n"]:
    """Return row numbers with the groups in random order, and the rows of each in their own."""
    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return np.argsort(np.random.default_rng(seed).permutation(len(sizes))[index], kind="stable")


def whole_groups(groups: Groups, part: slice) -> slice:
    """Move both ends of a part to the nearest places where a group ends: what is next to it begins there.

    Raises:
        InputError: No group is left.
    """
    edges = np.flatnonzero(groups[1:] != groups[:-1]) + 1
    edges = np.concatenate([[0], edges, [len(groups)]])
    start, stop = (int(edges[np.abs(edges - end).argmin()]) for end in (part.start, part.stop))
    if start == stop:
        asked = f"rows {part.start} to {part.stop - 1} of {len(groups)}, in {len(edges) - 1} groups"
        raise InputError(f"split: expected at least one whole group, for no group is divided, got {asked}")
    return slice(start, stop)


def check_no_groups(parts: Mapping[str, Groups | None]) -> None:
    """Check that the rows of every split are independent, for what counts them one by one.

    Raises:
        InputError: Names the first split that has groups.
    """
    for name, groups in parts.items():
        if groups is not None:
            got = f"{len(groups)} rows of {name} in {len(np.unique(groups))} groups"
            raise InputError(f"groups: expected independent rows, which are counted one by one here, got {got}")


def check_whole_groups(parts: Mapping[str, Groups | None]) -> None:
    """Check that no group has rows in two splits, and that all splits have groups if one has.

    Args:
        parts: Of every split the groups of its rows.

    Raises:
        InputError: Names the two splits.
    """
    for (one, first), (other, second) in itertools.combinations(parts.items(), 2):
        if (first is None) != (second is None):
            has, lacks = (one, other) if second is None else (other, one)
            raise InputError(f"groups: expected them for every split or for none, got them for {has}, not for {lacks}")
        if first is None or second is None:
            continue
        if len(shared := np.intersect1d(first, second)):
            which = f"{printable(str(shared[0]))} in {one} and {other} ({len(shared)} such groups)"
            raise InputError(f"groups: expected every group in one split, got {which}")
