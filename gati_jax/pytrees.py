"""Pytrees: static parts that are hashed once, digests, shapes to restore into, and modules without state."""

import dataclasses
import hashlib
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, PyTree


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Static:
    """A tuple of hashable values that remembers its hash.

    ``jax.jit`` hashes the static part of every argument on every call. A ResNet-56 is 27 block modules deep, and
    hashing them anew would cost as much as running several of its blocks.
    """

    values: tuple[Any, ...]
    hash_value: int = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Hash once."""
        object.__setattr__(self, "hash_value", hash(self.values))

    def __hash__(self) -> int:
        """Return the remembered hash."""
        return self.hash_value

    def __eq__(self, other: object) -> bool:
        """Compare by value; the same object compares at once."""
        return self is other or (isinstance(other, Static) and self.values == other.values)


def tree_digest(tree: PyTree) -> str:
    """Digest every array of a pytree with its place, dtype and shape."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def restore_spec(tree: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """Return the shapes of ``tree``, to be restored onto the default device, whichever it was saved from."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def call(module: nn.Module, variables: Any, *inputs: Array) -> Array:  # noqa: ANN401 (a pytree)
    """Apply a module that keeps no state: ``apply`` may also return changed state, which its type cannot rule out."""
    return cast("Array", module.apply(variables, *inputs))
