"""Pytrees packed into few arguments.

Every argument of a compiled program costs about two microseconds a call on a CPU, and a network has hundreds of small
vectors: biases, means, thresholds. Packing joins them into one array that the program slices again, which costs
nothing: the slices are fused into whatever reads them. Flattening happens once, not in every call.
"""

import dataclasses
import math
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gati_jax._static import Static

SMALL = 4096  # floats; slices of larger arrays would be copied before a matrix product can read them
T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed(Generic[T]):
    """A pytree as its large leaves and one vector of all small float32 ones."""

    large: tuple[Array, ...]
    small: Float[Array, " total"]
    layout: Static = dataclasses.field(metadata={"static": True})
    """The tree's structure, and the shape of every leaf that is in ``small`` (None for a large one)."""


def pack(tree: T) -> Packed[T]:
    """Pack a pytree of arrays."""
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
    shapes = tuple(leaf.shape if leaf.size <= SMALL and leaf.dtype == jnp.float32 else None for leaf in leaves)
    small = [jnp.ravel(leaf) for leaf, shape in zip(leaves, shapes, strict=True) if shape is not None]
    large = tuple(leaf for leaf, shape in zip(leaves, shapes, strict=True) if shape is None)
    vector = jnp.concatenate(small) if small else jnp.zeros(0, jnp.float32)
    return Packed(large=large, small=vector, layout=Static((structure, shapes)))


def unpack(packed: Packed[T]) -> T:
    """Rebuild the pytree inside a program."""
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
