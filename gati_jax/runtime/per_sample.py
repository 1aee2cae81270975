"""Per-sample drivers: they repeat the cascade's step until a request is done, for one request after another."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from gati_jax.models.chain import reference

from .cascade import Cascade, Prediction, begin, finish, step
from .compilation import CompilerOptions, Packed, compiled, unpack


@reference
def _predict_one(packed: Packed[Cascade], image: Shaped[Array | np.ndarray, "*input"]) -> Prediction:
    state = begin(unpack(packed), jnp.asarray(image))
    return finish(jax.lax.while_loop(lambda state: ~state.done, lambda state: step(packed, state), state))


@jax.jit
@reference
def _predict_batch(packed: Packed[Cascade], images: Shaped[Array | np.ndarray, "batch *input"]) -> Prediction:
    return jax.lax.map(lambda image: _predict_one(packed, image), images)


def predict_one(
    cascade: Cascade, image: Shaped[Array | np.ndarray, "*input"], options: CompilerOptions = ()
) -> Prediction:
    """Answer one request in one program: a ``lax.while_loop`` that stops at the first hit.

    Stages beyond the exit are skipped, not masked: the loop's body is a ``lax.switch`` that runs one stage only.

    Args:
        cascade: See ``Cascade``; its arrays are arguments of the program, its structure selects the program.
        image: One uint8 image or prepared input, without a batch dimension.
        options: Compiler options of the program.
    """
    return compiled(_predict_one, options)(cascade.packed, image)


@reference
def _predict_only(packed: Packed[Cascade], images: Shaped[Array | np.ndarray, "1 *input"]) -> Prediction:
    return jax.tree.map(lambda column: column[None], _predict_one(packed, images[0]))


def predict_only(
    cascade: Cascade, images: Shaped[Array | np.ndarray, "1 *input"], options: CompilerOptions = ()
) -> Prediction:
    """Answer a batch of one, as ``predict_one`` does; the batch dimension is handled inside the program."""
    return compiled(_predict_only, options)(cascade.packed, images)


def predict_batch(cascade: Cascade, images: Shaped[Array | np.ndarray, "batch *input"]) -> Prediction:
    """Answer many requests in one program, one after another; each leaves at its own exit.

    ``vmap`` would run every branch for every row. Here rows share nothing, so skipped blocks are saved time; but a
    device is slower at one row after another than at tiles, see ``predict_tiled``.
    """
    return _predict_batch(cascade.packed, images)


def predict_stepwise(cascade: Cascade, image: Shaped[Array | np.ndarray, "*input"]) -> Prediction:
    """Answer one request by the same step in a plain Python loop: for debugging, and as a check on the jitted loop."""
    with jax.default_matmul_precision("highest"), jax.disable_jit():  # or every lax.switch would compile its branches
        state = begin(cascade, jnp.asarray(image))
        while not state.done:
            state = step(cascade.packed, state)
        return finish(state)
