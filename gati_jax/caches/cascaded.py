"""A predictor that also sees what the cache before it said (Zero Time Waste, Wojcik et al., arXiv:2106.05409)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from .candidate import Candidate

_FLOOR = -16.0  # a log-probability below this says nothing more, and its weight would drown all else


class Cascaded(nn.Module):
    """A predictor's logits plus a linear map of the previous cache's log-probabilities.

    The sum of logits is a geometric ensemble, ``p ~ p_inner * prod_j p_previous[j] ** w[j, :]``, with learned weights;
    the previous cache may be one of these itself, so the ensemble reaches back to the first. No computation is thrown
    away: what an earlier cache was nearly sure of still counts.
    """

    classes: int
    inner: nn.Module

    @nn.compact
    def __call__(
        self, activation: Float[Array, "batch *site"], previous: Float[Array, "batch classes"]
    ) -> Float[Array, "batch classes"]:
        """Return class logits."""
        log_probabilities = jnp.maximum(jax.nn.log_softmax(previous), _FLOOR)
        ensemble = nn.Dense(self.classes, use_bias=False, kernel_init=_identity, name="ensemble")
        return self.inner(activation) + ensemble(log_probabilities)


def _identity(_: Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> Float[Array, "classes classes"]:
    return jnp.eye(*shape, dtype=dtype)


def on_its_own(candidate: Candidate) -> Candidate:
    """Return a cascaded candidate's own part, without the ensemble; any other as it is."""
    if not isinstance(candidate.predictor, Cascaded):
        return candidate
    own = {kind: tree["inner"] for kind, tree in candidate.params["predictor"].items() if "inner" in tree}
    params = {**candidate.params, "predictor": own}
    return dataclasses.replace(candidate, predictor=candidate.predictor.inner, params=params, previous=None)
