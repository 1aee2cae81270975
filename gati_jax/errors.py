"""Errors of the public functions, which command lines print as one line, and what several rooms raise them with."""

from collections.abc import Mapping


class InputError(ValueError):
    """An argument is not what was expected; the message names it, and says what was expected and what came."""


class WeightsError(InputError):
    """A weights file is damaged or does not belong to the network."""


class BundleError(InputError):
    """A bundle folder is incomplete, damaged, too new, or made for another network."""


def describe_mismatch(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Return sorted lists of missing, unexpected and misshapen names of tensors; empty if there are none.

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
    return "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in lists.items() if names)
