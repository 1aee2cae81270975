"""Selectors: from a predictor's logits to a score, the log-odds that it agrees with the base (GATI's binary selector).

Scores are log-odds, not probabilities: near certainty, where thresholds lie, a probability saturates in float32.
"""

from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .candidate import LOG_FLOOR, Width


@runtime_checkable
class Selector(Protocol):
    """The interface of a selector: a Linen module from logits to scores."""

    def __call__(self, logits: Float[Array, "batch classes"]) -> Float[Array, " batch"]:
        """Return scores."""
        ...


class LinearSelector(nn.Module):
    """The paper's selector: a linear map of the log-probabilities to {miss, hit}; the score is hit minus miss."""

    @nn.compact
    def __call__(self, logits: Float[Array, "batch classes"]) -> Float[Array, " batch"]:
        """Return scores."""
        log_probabilities = jnp.maximum(jax.nn.log_softmax(logits), LOG_FLOOR)
        miss_hit = nn.Dense(2, name="out")(log_probabilities)
        return miss_hit[:, 1] - miss_hit[:, 0]


class ProbabilitySelector(nn.Module):
    """The log-odds of the largest probability: it has no parameters, so it cannot overfit a small select split."""

    @nn.compact
    def __call__(self, logits: Float[Array, "batch classes"]) -> Float[Array, " batch"]:
        """Return scores."""
        ordered = jnp.sort(logits, axis=-1)
        return ordered[:, -1] - jax.nn.logsumexp(ordered[:, :-1], axis=-1)


class SortedSelector(nn.Module):
    """A small MLP on the ``top`` largest log-probabilities in order: it sees how sure the predictor is, not of what."""

    hidden: Width = 16
    top: Width = 10

    @nn.compact
    def __call__(self, logits: Float[Array, "batch classes"]) -> Float[Array, " batch"]:
        """Return scores."""
        log_probabilities = jnp.maximum(jax.nn.log_softmax(logits), LOG_FLOOR)
        largest, _ = jax.lax.top_k(log_probabilities, min(self.top, logits.shape[-1]))
        x = nn.relu(nn.Dense(self.hidden, name="hidden")(largest / -LOG_FLOOR))
        # The skip from the largest log-probability lets the fit start at plain confidence.
        return nn.Dense(1, name="out")(jnp.concatenate([x, largest[:, :1]], axis=-1))[:, 0]


class Confidence(nn.Module):
    """The largest logit: for predictors whose logits are log-confidences. It has no parameters."""

    @nn.compact
    def __call__(self, logits: Float[Array, "batch classes"]) -> Float[Array, " batch"]:
        """Return scores."""
        return logits.max(-1)
