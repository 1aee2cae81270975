"""What goes wrong at a public boundary: one family, which command lines turn into one line and exit code 2."""

from collections.abc import Mapping


class InputError(ValueError):
    """An argument is not what was expected; the message names it and says expected and got."""


class WeightsError(InputError):
    """A weights file does not belong to the network."""


class BundleError(InputError):
    """A bundle folder is incomplete, damaged, too new, or made for another network."""


def describe_mismatch(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Compare named tensors with those that a network has.

    Args:
        expected: Shapes (or dtypes and shapes) by name.
        found: Those that came.

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
