"""Compiled programs: with which options, which belong to a whole program, and with how few arguments.

Every argument of a compiled program costs about two microseconds a call on a CPU, and a network has hundreds of small
vectors: biases, means, thresholds. Packing joins them into one array that the program slices again, which costs
nothing: the slices are fused into whatever reads them. Flattening happens once, not in every call.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gati_jax.pytrees import Static

CompilerOptions = tuple[tuple[str, str], ...]
"""Names and values."""


@functools.cache
def compiled(
    function: Callable[..., Any],
    options: CompilerOptions,
    *,
    static: tuple[str, ...] = (),
    keep_unused: bool = False,
    donate: tuple[str, ...] = (),
) -> jax.stages.Wrapped:
    """Return ``function`` jitted with compiler options; the same function and options give the same object.

    Args:
        function: A function at module level, for the cache would keep whatever a closure holds.
        options: Compiler options.
        static: Names of static arguments.
        keep_unused: Pass arrays to the program even if it does not read them.
        donate: Names of arguments whose memory the results may take.
    """
    return jax.jit(
        function,
        static_argnames=static,
        donate_argnames=donate,
        keep_unused=keep_unused,
        compiler_options=dict(options) or None,
    )


_SMALL = 4096  # floats; slices of larger arrays would be copied before a matrix product can read them
T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed(Generic[T]):
    """A pytree as its large leaves and one vector of all its small float32 leaves."""

    large: tuple[Array, ...]
    small: Float[Array, " total"]
    layout: Static = dataclasses.field(metadata={"static": True})
    """The tree's structure, and the shape of every leaf in ``small`` (None for a large leaf)."""


def pack(tree: T) -> Packed[T]:
    """Pack a pytree of arrays into few arguments."""
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
    shapes = tuple(leaf.shape if leaf.size <= _SMALL and leaf.dtype == jnp.float32 else None for leaf in leaves)
    small = [jnp.ravel(leaf) for leaf, shape in zip(leaves, shapes, strict=True) if shape is not None]
    large = tuple(leaf for leaf, shape in zip(leaves, shapes, strict=True) if shape is None)
    vector = jnp.concatenate(small) if small else jnp.zeros(0, jnp.float32)
    return Packed(large=large, small=vector, layout=Static((structure, shapes)))


def unpack(packed: Packed[T]) -> T:
    """Return the pytree again, inside a program."""
    structure, shapes = packed.layout.values
    large, leaves, start = iter(packed.large), [], 0
    for shape in shapes:
        if shape is None:
            leaves.append(next(large))
        else:
            size = math.prod(shape)
            leaves.append(packed.small[start : start + size].reshape(shape))
            start += size
    return jax.tree.unflatten(structure, leaves)
