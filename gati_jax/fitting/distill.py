"""The loss by which a predictor learns the base's answers."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def distillation_loss(
    logits: Float[Array, "batch classes"],
    base_logits: Float[Array, "batch classes"],
    *,
    alpha: float = 0.5,
    temperature: float = 6.0,
) -> Float[Array, ""]:
    """Return the batch's mean of ``alpha T^2 KL(base_T || predictor_T) + (1 - alpha) CE(predictor, base's answer)``.

    Args:
        logits: The predictor's.
        base_logits: The base's, for the same augmented images.
        alpha: Weight of the soft term.
        temperature: T, by which both logits are divided in the soft term (GATI's released code: alpha 0.5, T 6).
    """
    soft = optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(logits / temperature), jax.nn.log_softmax(base_logits / temperature)
    )
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(base_logits, -1))
    return jnp.mean(alpha * temperature**2 * soft + (1 - alpha) * hard)
