"""Errors of the public functions, which command lines print as one line, and what several rooms raise them with."""

import numbers
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


class InputError(ValueError):
    """An argument is not what was expected; the message names it, and says what was expected and what came."""


class WeightsError(InputError):
    """A weights file is damaged or does not belong to the network."""


class BundleError(InputError):
    """A bundle folder is incomplete, damaged, too new, or made for another network."""


def check_share(name: str, value: float | int) -> None:  # noqa: PYI041 (beartype tells them apart)
    """Check that a value lies strictly between 0 and 1.

    Args:
        name: The argument, for the message.
        value: What was given for it.

    Raises:
        InputError: It is 0 or less, 1 or more, NaN, or no number.
    """
    if not isinstance(value, numbers.Real):
        raise InputError(f"{name}: expected a number between 0 and 1, got {value!r:.100}")
    if not 0 < value < 1:
        raise InputError(f"{name}: expected a number between 0 and 1, got {value}")


def check_kind(argument: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Check that an argument is of a class.

    Args:
        argument: Its name, for the message.
        value: What was given for it.
        kind: The class, or several.
        expected: How a user gets one, such as "what gati_jax.load_bundle returns".

    Raises:
        InputError: It is of another.
    """
    if not isinstance(value, kind):
        raise InputError(f"{argument}: expected {expected}, got {kind_of(value)}")


def as_path(argument: str, value: object) -> Path:
    """Return the path that an argument names.

    Raises:
        InputError: It is no path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{argument}: expected a path, got {kind_of(value)}")
    return Path(value)


def as_array(argument: str, value: object) -> np.ndarray:
    """Return what NumPy makes of an argument.

    Raises:
        InputError: It has rows of different lengths, or is no array at all.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"{argument}: expected an array, got rows of different lengths") from error
    if array.dtype == object and array.ndim == 0:  # how NumPy takes whatever it does not know
        raise InputError(f"{argument}: expected an array, got {kind_of(value)}")
    return array


def kind_of(value: object) -> str:
    """Describe for a message what was given in place of something else: its type, and how its repr begins."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"{type(value).__name__} {printable(' '.join(repr(value).split()), most=60)}"


def describe_failure(error: BaseException) -> str:
    """Describe an error of the user's code in one line, with the last place in that code where it passed."""
    text = printable(" ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":"), most=300)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    said = isinstance(error, SyntaxError) or not frames  # a syntax error says where it is
    return text if said else f"{text} ({frames[-1].filename}, line {frames[-1].lineno})"


def _is_users(file: str) -> bool:
    installed = "site-packages" in file or Path(file).is_relative_to(Path(__file__).parent)
    return not (installed or file.startswith("<") or Path(file).is_relative_to(Path(os.__file__).parent))


def printable(text: str, *, most: int = 200) -> str:
    """Return text of an untrusted file as a message may show it: its start, escaped where it does not print.

    Args:
        text: A name in the file, or what a library says about it.
        most: Characters to keep.
    """
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:most])
    return shown if len(text) <= most else f"{shown}..."


def listed(names: Sequence[str], *, most: int = 100, room: int = 3_000) -> str:
    """Join names of an untrusted file for a message, at most ``most`` of them and about ``room`` characters."""
    shown = [printable(name) for name in names[:most]]
    while len(shown) > 1 and sum(map(len, shown)) > room:
        shown.pop()
    more = [f"and {len(names) - len(shown)} more"] if len(names) > len(shown) else []
    return ", ".join([*shown, *more])


def describe_mismatch(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Return sorted lists of missing, unexpected and misshapen names, the first 100 of each; empty if there are none.

    Args:
        expected: Shapes (or dtypes and shapes) of the network's tensors by name.
        found: Those of the given ones.
    """
    differ = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    lists = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [f"{name} (expected {expected[name]}, got {found[name]})" for name in differ],
    }
    return "; ".join(f"{len(names)} {kind}: {listed(names)}" for kind, names in lists.items() if names)


def text_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return rows as aligned text below a title; the first column is aligned to the left."""
    cells = [list(columns), *([printable(_cell(value)) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]
    return "\n".join([printable(title), *(f"  {line}" for line in lines)])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
