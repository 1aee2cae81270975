"""Digests of parameters."""

import hashlib

import jax
import numpy as np
from jaxtyping import PyTree


def tree_digest(tree: PyTree) -> str:
    """Digest every array of a pytree with its place, dtype and shape."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
