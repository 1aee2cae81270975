"""Measured costs of lookups: what each adds to the cascade around it."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from gati_jax.caches import Candidate, Network, lookup
from gati_jax.models import Chain

from .batched import BatchedCascade, predict_tiled
from .cascade import Cascade, Prediction
from .drivers import predict_one
from .numerics import reference
from .options import Options, compiled
from .packing import Packed, pack, unpack
from .schedule import Schedule
from .timing import time_interleaved, time_turns

LEAST_SHARE = 0.1
TURN = 4  # calls


def lookup_program(
    cache: Candidate, activation: Float[Array, "batch *site"], options: Options = ()
) -> Callable[[], tuple[Array, Array]]:
    """Return a compiled call of a lookup by itself."""
    return functools.partial(compiled(_lookup, options), pack(cache), activation)


@reference
def _lookup(packed: Packed[Candidate], activation: Float[Array, "batch *site"]) -> tuple[Array, Array]:
    return lookup(unpack(packed), activation)


def time_lookups(
    chain: Chain, candidates: Iterable[Candidate], images: Shaped[Array, "batch *input"], rounds: int, options: Options
) -> dict[str, float]:
    """Return what each lookup adds to the cascade around it.

    Alone, a lookup is too short to time: starting its program takes longer. So as many as there are sites are timed at
    once, in a cascade in which every one of them misses, and what that takes longer than the base, turn by turn, is
    shared out in proportion to their times alone. A predictor is timed once for all its selectors, which cost next to
    nothing: composition would choose among them by noise.

    That is a difference of two long times, and noise may eat it up or turn it around. But no lookup is free, and a plan
    that takes one for free looks up everywhere: each costs at least ``LEAST_SHARE`` of its time alone. Most of that
    time is the start of its program, so that where differences are clear, they are several times as much. A small
    network before the base is long enough to be timed alone.
    """
    alike: dict[tuple[object, ...], list[Candidate]] = {}
    for candidate in candidates:
        alike.setdefault(_predictor_key(candidate), []).append(candidate)
    distinct = [candidate for candidate, *_ in alike.values()]
    alone = _time_alone(chain, distinct, len(images), rounds, options)
    cascades = _cascades(cache for cache in distinct if not isinstance(cache.predictor, Network))
    programs = {str(i): [_all_miss(chain, caches, images, options)] * TURN for i, caches in enumerate([(), *cascades])}
    # The first call of a turn finds its weights cold.
    turns = {int(i): np.median(ms[:, 1:], axis=1) for i, ms in time_turns(programs, rounds).items()}
    milliseconds = {cache.name: alone[cache.name] for cache in distinct}
    for i, caches in enumerate(cascades, start=1):
        whole = sum(alone[cache.name] for cache in caches)
        added = max(LEAST_SHARE * whole, float(np.median(turns[i] - turns[0])))
        milliseconds |= {cache.name: added * alone[cache.name] / whole for cache in caches}
    return {other.name: milliseconds[first.name] for first, *rest in alike.values() for other in (first, *rest)}


def _cascades(candidates: Iterable[Candidate]) -> list[tuple[Candidate, ...]]:
    """Deal candidates out to cascades, each with one at a site."""
    groups: list[dict[int, Candidate]] = []
    for candidate in candidates:
        free = next((group for group in groups if candidate.site not in group), None)
        if free is None:
            groups.append(free := {})
        free[candidate.site] = candidate
    return [tuple(group[site] for site in sorted(group)) for group in groups]


def _predictor_key(candidate: Candidate) -> tuple[object, ...]:
    """Say which predictor a candidate has: others may have the very same arrays under another selector."""
    arrays = jax.tree.leaves(candidate.params["predictor"])
    return candidate.site, candidate.predictor, *map(id, arrays)


def _time_alone(
    chain: Chain, caches: Iterable[Candidate], batch: int, rounds: int, options: Options
) -> dict[str, float]:
    programs = {}
    for cache in caches:
        spec = chain.site_specs[cache.site]
        activation = jax.random.normal(jax.random.key(0), (batch, *spec.shape)).astype(spec.dtype)
        programs[cache.name] = lookup_program(cache, activation, options)
    return {name: float(np.median(ms)) for name, ms in time_interleaved(programs, rounds=rounds).items()}


def _all_miss(
    chain: Chain, caches: tuple[Candidate, ...], images: Shaped[Array, "batch *input"], options: Options
) -> Callable[[], Prediction]:
    """Return a call of the cascade in which every lookup misses."""
    cascade = Cascade(chain, caches, jnp.full(len(caches), jnp.inf))
    if len(images) == 1:
        return functools.partial(predict_one, cascade, images[0], options)
    one_tile = BatchedCascade.of(cascade, Schedule.of({len(images): 1.0}))
    return functools.partial(predict_tiled, one_tile, images, options=options)
