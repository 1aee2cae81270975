"""The cascade's state and the one pure step that every per-sample driver repeats.

Stage i runs the span from the i-th chosen site's predecessor to that site and looks the activation up there; the last
stage runs the rest of the base. Spans have activations of different shapes, but a loop's carry has one: the activation
travels in a flat buffer as large as the largest of them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from gati_jax._errors import InputError
from gati_jax.caches import Candidate, lookup
from gati_jax.models import Chain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cascade:
    """A bundle made runnable: all its arrays are leaves, so new ones of the same shapes never recompile.

    Args:
        chain: The base.
        caches: In the order of their sites.
        thresholds: One for each cache; a score at or above it is a hit.
    """

    chain: Chain
    caches: tuple[Candidate, ...]
    thresholds: Float[Array, " caches"]

    @property
    def sites(self) -> tuple[int, ...]:
        """Where the caches are."""
        return tuple(cache.site for cache in self.caches)


class CascadeState(NamedTuple):
    """One request on its way."""

    # Evolving
    stage: Int[Array, ""]  # the next to run; stage i ends at cache i, the last at the base
    activation: Float[Array, " buffer"]  # what enters it, flat, zeros behind
    done: Bool[Array, ""]
    # The answer, final once done
    exit: Int[Array, ""]  # site number, N for the base
    score: Float[Array, ""]  # of the last lookup; infinity from the base
    logits: Float[Array, " classes"]


class Prediction(NamedTuple):
    """The answer to one request (or, with a leading batch dimension, to many)."""

    class_index: Int[Array, "*batch"]
    exit: Int[Array, "*batch"]  # site number, or N for the base
    score: Float[Array, "*batch"]  # log-odds of agreeing with the base; infinity from the base itself
    logits: Float[Array, "*batch classes"]


def _entry_sites(cascade: Cascade) -> tuple[int, ...]:
    """The site at which each stage begins."""
    return (0, *cascade.sites)


def check_cascade(cascade: Cascade) -> None:
    """Check that caches and thresholds fit the chain.

    Raises:
        InputError: Sites out of order or range, or not one threshold for each cache.
    """
    sites = cascade.sites
    if sorted(set(sites)) != list(sites) or any(not 0 <= site < len(cascade.chain) for site in sites):
        msg = f"caches: expected rising sites in 0 .. {len(cascade.chain) - 1}, got {sites}"
        raise InputError(msg)
    if cascade.thresholds.shape != (len(sites),):
        msg = f"thresholds: expected one for each of {len(sites)} caches, got shape {list(cascade.thresholds.shape)}"
        raise InputError(msg)


def begin(cascade: Cascade, image: Shaped[Array, "*input"]) -> CascadeState:
    """Return the state of a fresh request: nothing run, the base's exit presumed."""
    specs = cascade.chain.site_specs
    size = max(math.prod(specs[site].shape) for site in _entry_sites(cascade))
    x = cascade.chain.prepare(image[None])
    return CascadeState(
        stage=jnp.zeros((), jnp.int32),
        activation=_to_buffer(x, jnp.zeros(size, jnp.float32)),
        done=jnp.zeros((), bool),
        exit=jnp.full((), len(cascade.chain), jnp.int32),
        score=jnp.full((), jnp.inf, jnp.float32),
        logits=jnp.zeros(cascade.chain.classes, jnp.float32),
    )


def _to_buffer(x: Float[Array, "..."], buffer: Float[Array, " buffer"]) -> Float[Array, " buffer"]:
    return buffer.at[: x.size].set(x.reshape(-1).astype(buffer.dtype))


def _from_buffer(buffer: Float[Array, " buffer"], spec: jax.ShapeDtypeStruct) -> Float[Array, "1 ..."]:
    return buffer[: math.prod(spec.shape)].reshape(1, *spec.shape).astype(spec.dtype)


def step(cascade: Cascade, state: CascadeState) -> CascadeState:
    """Run one stage: a span, and the lookup or the classifier behind it. Pure; a driver repeats it until ``done``."""
    return jax.lax.switch(state.stage, [_stage(cascade, i) for i in range(len(cascade.caches) + 1)], state)


def _stage(cascade: Cascade, index: int) -> Callable[[CascadeState], CascadeState]:
    chain = cascade.chain
    start = _entry_sites(cascade)[index]

    def span_and_lookup(state: CascadeState) -> CascadeState:
        cache = cascade.caches[index]
        x = chain.span(_from_buffer(state.activation, chain.site_specs[start]), start, cache.site)
        logits, score = lookup(cache, x)
        hit = score[0] >= cascade.thresholds[index]
        return CascadeState(
            stage=state.stage + 1,
            activation=_to_buffer(x, state.activation),
            done=hit,
            exit=jnp.where(hit, jnp.int32(cache.site), state.exit),
            score=jnp.where(hit, score[0], state.score),
            logits=logits[0].astype(jnp.float32),
        )

    def rest_of_base(state: CascadeState) -> CascadeState:
        x = chain.span(_from_buffer(state.activation, chain.site_specs[start]), start, len(chain))
        logits = chain.classify(x)[0].astype(jnp.float32)
        return state._replace(stage=state.stage + 1, done=jnp.ones((), bool), logits=logits)

    return rest_of_base if index == len(cascade.caches) else span_and_lookup


def finish(state: CascadeState) -> Prediction:
    """Turn the state of a request that is done into its answer."""
    return Prediction(jnp.argmax(state.logits, -1).astype(jnp.int32), state.exit, state.score, state.logits)
