"""Selectors learn, on rows that no predictor was fitted on, when a predictor agrees with the base.

For every row of the ``select`` split there is a selector that has not seen it: the rows are dealt into folds, and one
selector is fitted without each fold, one more on all rows. Composition sees the former's (out-of-fold) scores only.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from gati_jax._linen import call

from .optimize import apply_gradients

_STEPS, _RATE, _DECAY = 400, 0.02, 1e-3


def deal_folds(n: int, folds: int, seed: int) -> Int[np.ndarray, " n"]:
    """Deal n rows evenly into folds 0 .. folds - 1."""
    return np.random.default_rng((seed, n)).permutation(np.arange(n) % folds).astype(np.int32)


@functools.partial(jax.jit, static_argnames="selector")
def fit_selector(
    selector: nn.Module,
    logits: Float[Array, "n classes"],
    agrees: Bool[Array, " n"],
    weight: Float[Array, " n"],
    key: PRNGKeyArray,
) -> PyTree:
    """Fit a selector by full-batch Adam on the binary cross-entropy of its score.

    Args:
        selector: A Linen module, logits[n, classes] -> score[n].
        logits: A predictor's.
        agrees: Whether the predictor's class is the base's answer.
        weight: 1 for rows to learn from, 0 for held-out rows.
        key: Draws the initial variables.

    Returns:
        The selector's variables.
    """
    optimizer = optax.adamw(optax.cosine_decay_schedule(_RATE, _STEPS), weight_decay=_DECAY)
    target = agrees.astype(jnp.float32)

    def loss(variables: PyTree) -> Float[Array, ""]:
        rows = optax.losses.sigmoid_binary_cross_entropy(call(selector, variables, logits), target)
        return jnp.sum(rows * weight) / jnp.sum(weight)

    def step(carry: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], None]:
        variables, opt_state = carry
        return apply_gradients(optimizer, jax.grad(loss)(variables), opt_state, variables), None

    variables = selector.init(key, logits[:1])
    (variables, _), _ = jax.lax.scan(step, (variables, optimizer.init(variables)), None, _STEPS)
    return variables


def fit_selector_folds(
    selector: nn.Module,
    logits: Float[Array, "n classes"],
    agrees: Bool[Array, " n"],
    fold: Int[np.ndarray, " n"],
    folds: int,
    key: PRNGKeyArray,
) -> PyTree:
    """Fit ``folds`` selectors, the f-th without the rows of fold f, and one on all rows: variables[folds + 1, ...]."""
    weights = np.stack([fold != f for f in range(folds + 1)]).astype(np.float32)
    return jax.vmap(lambda weight: fit_selector(selector, logits, agrees, weight, key))(weights)
