"""The arrays of a bundle: flat names, and only the shapes that base and caches imply."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from ._checkpoint import restore_spec
from ._errors import BundleError, InputError, describe_mismatch
from .caches import Candidate
from .models import Chain

MAX_ARRAY_BYTES = 8 * 2**30  # a manifest of a few lines may imply any number; compressed, so may a small file


def arrays(chain: Chain, caches: Iterable[Candidate]) -> dict[str, Any]:
    """Return every array under a flat name, such as "base/0/block/conv1/conv/kernel".

    Raises:
        InputError: Two arrays have the same name.
    """
    trees = {"base": chain, **{f"caches/{c.name}": c for c in caches}}
    named = [(f"{prefix}{_name(path)}", leaf) for prefix, tree in trees.items() for path, leaf in _leaves(tree)]
    found = {name: jnp.asarray(leaf) if isinstance(leaf, int | float | complex) else leaf for name, leaf in named}
    if len(found) < len(named):
        names = [name for name, _ in named]
        msg = (
            f"params: expected distinct names, got twice: {', '.join(sorted({n for n in names if names.count(n) > 1}))}"
        )
        raise InputError(msg)
    return found


def _leaves(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:  # noqa: ANN401 (a Chain or a Candidate)
    return jax.tree_util.tree_leaves_with_path(tree)


def _name(path: tuple[Any, ...]) -> str:
    """Name a leaf; the first key is the field that holds all parameters."""
    return "".join(f"/{jax.tree_util.keystr((key,), simple=True)}" for key in path[1:])


def filled(tree: Any, values: Mapping[str, Any], prefix: str) -> Any:  # noqa: ANN401 (a Chain or a Candidate)
    """Return the tree with the arrays of these names in the places of its leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[f"{prefix}{_name(path)}"], tree)


def load_arrays(folder: Path, expected: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Load arrays of exactly these names, shapes and dtypes.

    Raises:
        BundleError: Sorted lists of missing, unexpected and misshapen names; or Orbax cannot read the folder.
    """
    if (total := sum(math.prod(v.shape) * v.dtype.itemsize for v in expected.values())) > MAX_ARRAY_BYTES:
        msg = f"bundle: {folder} would take {total} bytes of memory, {MAX_ARRAY_BYTES} are allowed"
        raise BundleError(msg)
    path = str(folder.absolute())
    try:
        found = ocp.metadata(path).metadata
        if not isinstance(found, dict):
            msg = f"bundle: {folder} is damaged: it does not say which arrays it holds"
            raise BundleError(msg)
        shapes = {name: _describe(v) for name, v in expected.items()}
        if problems := describe_mismatch(shapes, {name: _describe(v) for name, v in found.items()}):
            msg = f"bundle: the arrays are not this chain's. {problems}"
            raise BundleError(msg)
        return ocp.load(path, restore_spec(dict(expected)))
    except (ocp.errors.InvalidLayoutError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BundleError):
            raise
        msg = f"bundle: {folder} is damaged: {error}"
        raise BundleError(msg) from error


def _describe(array: Any) -> str:  # noqa: ANN401 (an array, or the shape of one)
    return f"{array.dtype}{list(array.shape)}"
