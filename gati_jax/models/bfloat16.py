"""A base in bfloat16: blocks compute in it, and their activations are in it; the classifier stays float32.

Layer norms, softmax and the classifier compute in float32 (see ``modules`` and ``transformers``): what is rounded to 8
bits are activations and what multiplies them. Products sum in float32 in the libraries that XLA calls; nothing here
asks for it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .chain import Block, Chain


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A block that takes and returns bfloat16, where it takes and returns floats; equal blocks make equal ones."""

    block: Block

    def __call__(self, params: PyTree, x: Array) -> Array:
        """Run the block, whose parameters are in bfloat16."""
        with jax.numpy_dtype_promotion("standard"):  # constants of a block may be float32
            return jnp.asarray(to_bfloat16(self.block(params, jnp.asarray(to_bfloat16(x)))))


@dataclasses.dataclass(frozen=True)
class Exact:
    """A classifier that computes in float32."""

    classifier: Block

    def __call__(self, params: PyTree, x: Array) -> Array:
        """Return float32 logits."""
        return self.classifier(params, x.astype(jnp.float32) if _is_float(x) else x)


def in_bfloat16(chain: Chain) -> Chain:
    """Return a chain whose blocks compute in bfloat16: another function of the same inputs, with half the memory.

    It takes the same inputs, and its classifier returns float32 logits. It has no ``network``, by which its blocks
    could be rebuilt.
    """
    blocks = tuple(Rounded(block) for block in chain.blocks)
    params = (*(jax.tree.map(to_bfloat16, tree) for tree in chain.params[:-1]), chain.params[-1])
    classifier = Exact(chain.classifier)
    return Chain(blocks, classifier, params, chain.input_spec, chain.normalization, input_name=chain.input_name)


def to_bfloat16(x: Array | np.ndarray) -> Array | np.ndarray:
    """Round floats; anything else is left as it is."""
    return jnp.asarray(x, jnp.bfloat16) if _is_float(x) else x


def _is_float(x: Array | np.ndarray) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)
