"""The devices that share a fit: rows are divided among them, and everything else is copied to each.

One program runs on all of them (``jax.jit`` over a mesh), so it computes what it would on one device, but for the order
in which numbers are added. With several processes (``jax.distributed``), each calls the same functions with the same
rows, and its devices work on their part.
"""

import dataclasses
import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from .errors import InputError

_ROWS = "rows"
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices that share the rows of a batch; the default is JAX's own device, which takes arrays as they are."""

    mesh: Mesh | None = None

    @property
    def count(self) -> int:
        """Their number, in all processes."""
        return 1 if self.mesh is None else self.mesh.size

    def split(self, rows: Shaped[Array | np.ndarray, "n ..."]) -> Shaped[Array | np.ndarray, "n ..."]:
        """Divide rows evenly; their number must be a multiple of the devices'."""
        if self.mesh is None:
            return rows
        sharding = NamedSharding(self.mesh, PartitionSpec(_ROWS))
        if isinstance(rows, jax.Array) and len(rows.sharding.device_set) == self.count:
            return _moved(rows, sharding=sharding)
        return _put(rows, sharding)

    def copy(self, tree: T) -> T:
        """Copy arrays to every device; those that are there stay as they are."""
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(functools.partial(_put, sharding=sharding), tree)

    def collect(self, tree: T) -> T:
        """Return arrays on JAX's own device again, as the rest of the library takes them."""
        if self.mesh is None:
            return tree
        whole = jax.tree.map(lambda leaf: leaf if leaf.is_fully_replicated else self.as_copies(leaf), tree)
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), whole)

    def as_rows(self, tree: T) -> T:
        """Say, inside a program, that arrays[n, ...] are divided like ``split``'s."""
        return tree if self.mesh is None else _constrain(tree, self.mesh, PartitionSpec(_ROWS))

    def as_copies(self, tree: T) -> T:
        """Say, inside a program, that every device has the whole of these arrays."""
        return tree if self.mesh is None else _constrain(tree, self.mesh, PartitionSpec())


ONE = Devices()


def sharing(batch: int, argument: str = "batch") -> Devices:
    """Return the devices that share batches of so many rows.

    In one process, these are as many as divide the batch evenly; with several processes, all of them. Where a default
    device is configured, nothing else is used.

    Args:
        batch: Rows.
        argument: What the number is called, for the error.

    Raises:
        InputError: There are several processes, whose devices cannot divide the batch evenly.
    """
    devices = jax.devices()
    if jax.process_count() > 1:
        if batch % len(devices):
            every = f"{len(devices)}, the devices of all processes"
            raise InputError(f"{argument}: expected a multiple of {every}, got {batch}")
    elif jax.config.values["jax_default_device"] is not None:
        return ONE
    count = max(n for n in range(1, len(devices) + 1) if batch % n == 0)
    return ONE if count == 1 else Devices(Mesh(np.array(devices[:count]), (_ROWS,)))


def _constrain(tree: T, mesh: Mesh, spec: PartitionSpec) -> T:
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), tree)


@functools.partial(jax.jit, static_argnames="sharding")
def _moved(array: Array, *, sharding: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(array, sharding)


def _put(array: PyTree, sharding: NamedSharding) -> Array:
    """Put an array that every process has on the devices of all."""
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    found = np.asarray(array)
    host = found.astype(jax.dtypes.canonicalize_dtype(found.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
