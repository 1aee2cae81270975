"""Pytrees: static parts that are hashed once, few arguments for programs, digests, and modules without state.

Every argument of a compiled program costs about two microseconds a call on a CPU, and a network has hundreds of small
vectors: biases, means, thresholds. Packing joins them into one array that the program slices again, which costs
nothing: the slices are fused into whatever reads them. Flattening happens once, not in every call.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

T = TypeVar("T")
_SMALL = 4096  # floats; slices of larger arrays would be copied before a matrix product can read them


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


class Fixed:
    """A value as a static part of a function: by value where it can be hashed, otherwise the object that it is."""

    def __init__(self, value: Any) -> None:  # noqa: ANN401 (anything)
        """Hash once."""
        self.value = value
        try:
            self._hash, self._by_value = hash(value), True
        except TypeError:  # lists and arrays
            self._hash, self._by_value = id(value), False

    def __hash__(self) -> int:
        """Return the remembered hash."""
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Compare by value where both have a hash."""
        if not isinstance(other, Fixed) or self.value is other.value:
            return isinstance(other, Fixed)
        return self._by_value and other._by_value and self._hash == other._hash and self.value == other.value


def register_pytree(*, leaves: str, static: tuple[str, ...]) -> Callable[[type[T]], type[T]]:
    """Register a frozen dataclass as a pytree whose one child is the field ``leaves``; the others are static.

    An object keeps its static part, so that it is hashed once. Unflattening takes any leaves, without checks.
    """

    def flatten(tree: T) -> tuple[tuple[PyTree], Static]:
        if "_static" not in vars(tree):
            vars(tree)["_static"] = Static(tuple(getattr(tree, name) for name in static))
        return (getattr(tree, leaves),), vars(tree)["_static"]

    def decorate(cls: type[T]) -> type[T]:
        def unflatten(structure: Static, children: tuple[PyTree]) -> T:
            tree = object.__new__(cls)
            vars(tree).update(zip(static, structure.values, strict=True))
            vars(tree).update({leaves: children[0], "_static": structure})
            return tree

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)
        return cls

    return decorate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed(Generic[T]):
    """A pytree as its large leaves and one vector of all its small float32 leaves."""

    large: tuple[Array, ...]
    small: Float[Array, " total"]
    layout: Static = dataclasses.field(metadata={"static": True})
    """The tree's structure, and the shape of every leaf in ``small`` (None for a large leaf)."""


def pack(tree: T, *, most: int = _SMALL) -> Packed[T]:
    """Pack a pytree of arrays into few arguments.

    Args:
        tree: Any.
        most: Values of a small leaf; with -1 no leaf is moved, as for arrays that are arguments of a program already.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
    shapes = tuple(leaf.shape if leaf.size <= most and leaf.dtype == jnp.float32 else None for leaf in leaves)
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


def is_traced(tree: PyTree) -> bool:
    """Whether a transformation, such as jit or grad, is tracing an array of a pytree."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def tree_digest(tree: PyTree) -> str:
    """Digest every array of a pytree with its place, dtype and shape."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def tree_bytes(tree: PyTree) -> int:
    """Return the memory that the arrays of a pytree take, or would take."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def restore_spec(tree: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """Return the shapes of ``tree``, to be restored to where its arrays are, whichever devices they were saved from.

    What is no array yet is restored onto the default device, also that of ``with jax.default_device(...)``.
    """
    configured = jax.config.values["jax_default_device"]
    device = configured if isinstance(configured, jax.Device) else jax.local_devices(backend=configured)[0]
    default = jax.sharding.SingleDeviceSharding(device)

    def spec(leaf: Any) -> jax.ShapeDtypeStruct:  # noqa: ANN401 (an array, or its shape)
        shared = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if shared else default)

    return jax.tree.map(spec, tree)


def call(module: nn.Module, variables: Any, *inputs: Array) -> Array:  # noqa: ANN401 (a pytree)
    """Apply a module that keeps no state: ``apply`` may also return changed state, which its type cannot rule out."""
    return cast("Array", module.apply(variables, *inputs))
