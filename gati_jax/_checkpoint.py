"""What saving and restoring arrays with Orbax needs in more than one room."""

import hashlib
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp


def restore_spec(tree: PyTree[Any]) -> PyTree[jax.ShapeDtypeStruct]:
    """Return the shapes of ``tree``, to be restored onto the default device, whichever it was saved from."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def checkpoint_folder(folder: Path, identity: str) -> Path:
    """Return where the checkpoints of one identity lie."""
    return folder / hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()


def open_checkpoints(folder: Path | None, identity: str) -> Any | None:  # noqa: ANN401 (orbax is untyped)
    """Return a checkpointer of one identity, which keeps the newest; None without a folder."""
    if folder is None:
        return None
    keep_newest: Any = ocp.training.preservation_policies.LatestN(1)
    path = checkpoint_folder(folder, identity).absolute()
    path.mkdir(parents=True, exist_ok=True)
    return ocp.training.Checkpointer(str(path), preservation_policy=keep_newest, cleanup_tmp_directories=True)
