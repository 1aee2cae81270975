"""What saving and restoring arrays with Orbax needs in more than one room."""

from typing import Any

import jax
from jaxtyping import PyTree


def restore_spec(tree: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Return the shapes of ``tree``, to be restored onto the default device, whichever it was saved from."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
