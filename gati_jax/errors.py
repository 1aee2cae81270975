"""Errors of the public functions; command lines print them as one line and exit with code 2."""

from collections.abc import Mapping


class InputError(ValueError):
    """An argument is not what was expected; the message names it, and says what was expected and what came."""


class WeightsError(InputError):
    """A weights file is damaged or does not belong to the network."""


class BundleError(InputError):
    """A bundle folder is incomplete, damaged, too new, or made for another network."""


def describe_mismatch(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """List how named tensors differ from those that a network has.

    Args:
        expected: Shapes (or dtypes and shapes) of the network's tensors by name.
        found: Those of the given ones.

    Returns:
        Sorted lists of missing, unexpected and misshapen names; empty if there are none.
    """
    both = sorted(expected.keys() & found.keys())
    lists = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": [
            f"{name} (expected {expected[name]}, got {found[name]})" for name in both if expected[name] != found[name]
        ],
    }
    return "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in lists.items() if names)
