"""A candidate: one trained cache at one site, independent of the network around it; and the selectors."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num, PyTree, UInt64
from pydantic import Field

from gati_jax.errors import InputError, printable
from gati_jax.models import Chain, probe_chain
from gati_jax.planning import ReplaySource
from gati_jax.planning.tables import NO_ROWS
from gati_jax.pytrees import call, register_pytree, tree_bytes, tree_digest

Activation = Float[Array, "batch *site"]
Logits = Float[Array, "batch classes"]
Scores = Float[Array, " batch"]

Width = Annotated[int, Field(ge=1, le=65_536)]
"""A size in a cache's configuration; the bounds hold where a manifest, which is untrusted, becomes a module."""

LOG_FLOOR = -16.0
"""Log-probabilities are cut off here: lower ones carry no more information, and would dominate every sum."""


def log_probabilities(logits: Logits) -> Logits:
    """Return the logarithm of the softmax, not below ``LOG_FLOOR``."""
    return jnp.maximum(jax.nn.log_softmax(logits), LOG_FLOOR)


@register_pytree(leaves="params", static=("name", "site", "predictor", "selector", "previous"))
@dataclasses.dataclass(frozen=True)
class Candidate:
    """A predictor and a selector at a site: a pytree whose leaves are those of ``params``.

    Args:
        name: Unique among the candidates of a fit, such as "grid4x128@18".
        site: The activation that it reads: the input of block ``site + 1``.
        predictor: A Linen module, activation[batch, ...] -> logits[batch, classes].
        selector: A Linen module, logits[batch, classes] -> score[batch].
        params: ``{"predictor": ..., "selector": ...}``, the two modules' variables.
        previous: Name of the candidate whose logits are the predictor's second input, see ``Cascaded``.
        fitted_rows: Digests of the rows that it was fitted on, where they are known. No part of the pytree.
    """

    name: str
    site: int
    predictor: nn.Module
    selector: nn.Module
    params: dict[str, Any]
    previous: str | None = None
    fitted_rows: UInt64[np.ndarray, " n"] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        """Describe it in a line."""
        modules = " and ".join(type(module).__name__ for module in (self.predictor, self.selector))
        behind = "" if self.previous is None else f", behind {printable(self.previous)}"
        return f"Candidate({printable(self.name)!r} at site {self.site}: {modules}{behind})"

    @property
    def bytes(self) -> int:
        """The memory that the parameters take."""
        return tree_bytes(self.params)


def lookup(candidate: Candidate, activation: Activation) -> tuple[Logits, Scores]:
    """Run a cache on the activation at its site.

    Returns:
        Class logits, and the float32 score to compare with the cache's threshold. A threshold of infinity switches a
        cache off, so an infinite score is lowered to the largest finite number.
    """
    logits = call(candidate.predictor, candidate.params["predictor"], activation)
    score = call(candidate.selector, candidate.params["selector"], logits).astype(jnp.float32)
    return logits, jnp.minimum(score, jnp.finfo(jnp.float32).max)


class ReadInFloat32(nn.Module):
    """A predictor that computes in float32, whatever it reads."""

    inner: nn.Module

    @nn.compact
    def __call__(self, activation: Activation) -> Logits:
        """Return class logits."""
        return self.inner(activation.astype(jnp.float32))


def in_float32(candidate: Candidate) -> Candidate:
    """Return a cache that was fitted on float32 activations as one for a base whose activations are in bfloat16."""
    nested = {kind: {"inner": tree} for kind, tree in candidate.params["predictor"].items()}
    params = {**candidate.params, "predictor": nested}
    return dataclasses.replace(candidate, predictor=ReadInFloat32(candidate.predictor), params=params)


Activations = Sequence[Num[Array, "batch ..."]] | Mapping[int, Num[Array, "batch ..."]]
"""Activations by site: of all sites in order, or a mapping of those that are needed."""


@dataclasses.dataclass(frozen=True)
class Part:
    """The plan for one candidate: a head at one site."""

    site: int
    predictor: nn.Module
    selector: nn.Module
    variables: Any = dataclasses.field(default=None, repr=False, compare=False)
    """The predictor's (a pytree), once it is trained."""
    previous: str | None = None
    """Name of the candidate whose logits it reads as well."""


def predict_all(
    parts: Mapping[str, Candidate] | Mapping[str, Part], variables: Mapping[str, PyTree], sites: Activations
) -> dict[str, Logits]:
    """Return the logits of several predictors by name, in their order; no gradient flows from one into another.

    Args:
        parts: The predictors by name.
        variables: Their variables by name.
        sites: The activations at sites 0 .. N - 1, or at least at those of the predictors.
    """
    logits: dict[str, Logits] = {}
    for name in sorted(parts, key=lambda name: parts[name].site):  # a previous one is always at an earlier site
        logits[name] = call(parts[name].predictor, variables[name], *predictor_inputs(parts[name], sites, logits))
    return {name: logits[name] for name in parts}


def predictor_inputs(part: Candidate | Part, sites: Activations, logits: Mapping[str, Logits]) -> tuple[Array, ...]:
    """Return a predictor's inputs: its site's activation, and the previous candidate's logits if it is cascaded."""
    activation = sites[part.site]
    return (activation,) if part.previous is None else (activation, jax.lax.stop_gradient(logits[part.previous]))


def fitted_rows(candidates: Iterable[Candidate]) -> UInt64[np.ndarray, " n"]:
    """Return the digests of all rows that any of these was fitted on, as far as they are known."""
    known = [candidate.fitted_rows for candidate in candidates if candidate.fitted_rows is not None]
    return np.unique(np.concatenate([NO_ROWS, *known]))


def choose(candidates: Iterable[Candidate], names: Sequence[str]) -> tuple[Candidate, ...]:
    """Return the candidates of these names, in this order.

    Raises:
        InputError: A name is not among the candidates.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    if missing := [name for name in names if name not in by_name]:
        raise InputError(f"candidates: expected {', '.join(missing)} among them, got {', '.join(by_name)}")
    return tuple(by_name[name] for name in names)


def replay_source(chain: Chain, candidates: Iterable[Candidate], dtype: str, *, probed: bool = True) -> ReplaySource:
    """Return a record of the parameters and the base's function that a replay of these candidates depends on.

    Args:
        chain: The base.
        candidates: The caches.
        dtype: Of the images.
        probed: Whether to run the base, to tell its function from others of the same parameters.
    """
    probe = probe_chain(chain)._asdict() if probed else {}
    digests = tuple((c.name, tree_digest(c.params)) for c in candidates)
    return ReplaySource(base=tree_digest(chain.params), candidates=digests, dtype=dtype, **probe)


class Cascaded(nn.Module):
    """A predictor's logits plus a linear map of the previous cache's log-probabilities.

    The sum of logits is a geometric ensemble, ``p ~ p_inner * prod_j p_previous[j] ** w[j, :]``, with learned weights.
    The previous cache may be cascaded itself, so the ensemble reaches back to the first one and reuses the evidence of
    every lookup that missed.
    """

    classes: int
    inner: nn.Module

    @nn.compact
    def __call__(self, activation: Activation, previous: Logits) -> Logits:
        """Return class logits."""
        ensemble = nn.Dense(self.classes, use_bias=False, kernel_init=_identity, name="ensemble")
        return self.inner(activation) + ensemble(log_probabilities(previous))


def _identity(_: Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> Float[Array, "classes classes"]:
    return jnp.eye(*shape, dtype=dtype)


def on_its_own(candidate: Candidate) -> Candidate:
    """Return a cascaded candidate without its ensemble, as a candidate that reads its site alone.

    Any other candidate is returned unchanged.
    """
    if not isinstance(candidate.predictor, Cascaded):
        return candidate
    own = {kind: tree["inner"] for kind, tree in candidate.params["predictor"].items() if "inner" in tree}
    params = {**candidate.params, "predictor": own}
    return dataclasses.replace(candidate, predictor=candidate.predictor.inner, params=params, previous=None)


# Selectors score a predictor's logits by the log-odds that it agrees with the base (GATI's binary selector), not by the
# probability: near certainty, where thresholds lie, that saturates in float32.


class LinearSelector(nn.Module):
    """The paper's selector: a linear map of the log-probabilities to {miss, hit}; the score is hit minus miss."""

    @nn.compact
    def __call__(self, logits: Logits) -> Scores:
        """Return scores."""
        miss_hit = nn.Dense(2, name="out")(log_probabilities(logits))
        return miss_hit[:, 1] - miss_hit[:, 0]


class ProbabilitySelector(nn.Module):
    """The log-odds of the largest probability: it has no parameters, so it cannot overfit a small select split."""

    @nn.compact
    def __call__(self, logits: Logits) -> Scores:
        """Return scores."""
        ordered = jnp.sort(logits, axis=-1)
        return ordered[:, -1] - jax.nn.logsumexp(ordered[:, :-1], axis=-1)


class SortedSelector(nn.Module):
    """A small MLP on the ``top`` largest log-probabilities in order: it sees how sure the predictor is, not of what."""

    hidden: Width = 16
    top: Width = 10

    @nn.compact
    def __call__(self, logits: Logits) -> Scores:
        """Return scores."""
        largest, _ = jax.lax.top_k(log_probabilities(logits), min(self.top, logits.shape[-1]))
        x = nn.relu(nn.Dense(self.hidden, name="hidden")(largest / -LOG_FLOOR))
        # The skip from the largest log-probability lets the fit start at plain confidence.
        return nn.Dense(1, name="out")(jnp.concatenate([x, largest[:, :1]], axis=-1))[:, 0]


class Confidence(nn.Module):
    """The largest logit: for predictors whose logits are log-confidences. It has no parameters."""

    @nn.compact
    def __call__(self, logits: Logits) -> Scores:
        """Return scores."""
        return logits.max(-1)
