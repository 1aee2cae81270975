"""Candidates before they have learned anything: what a lookup costs does not depend on it."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from gati_jax.caches import Candidate, fold_standardize, predictor_inputs
from gati_jax.models import Chain

from .heads import Head, Part, more_selectors, parts_of


def head_sizes(chain: Chain, heads: Sequence[Head]) -> dict[str, int]:
    """Return the bytes that every candidate of a fit would take, by name; no array is made."""
    shapes = {name: _shapes(chain, part) for name, part in _all_parts(chain, heads).items()}
    return {
        name: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for name, tree in shapes.items()
    }


def untrained(chain: Chain, heads: Sequence[Head]) -> tuple[Candidate, ...]:
    """Return the candidates that ``fit`` would make, with small random numbers for what it would learn.

    Args:
        chain: The base.
        heads: As for ``fit``.
    """
    candidates, drawn = [], {}
    for i, (name, part) in enumerate(_all_parts(chain, heads).items()):
        random = _random(_shapes(chain, part), jax.random.key(i))
        predictor, variables = part.predictor, part.variables
        if variables is None:
            # Under several selectors, one predictor: as after a fit, so that its lookup is timed once.
            key = part.site, part.predictor, part.previous
            if key not in drawn:
                drawn[key] = fold_standardize(part.predictor, random["predictor"])
            predictor, variables = drawn[key]
        params = {"predictor": variables, "selector": random["selector"]}
        candidates.append(Candidate(name, part.site, predictor, part.selector, params, part.previous))
    return tuple(candidates)


def _all_parts(chain: Chain, heads: Sequence[Head]) -> dict[str, Part]:
    return more_selectors(parts_of(chain, heads), heads)


def _shapes(chain: Chain, part: Part) -> PyTree:
    batch = [jax.ShapeDtypeStruct((1, *spec.shape), spec.dtype) for spec in chain.site_specs]
    logits = jax.ShapeDtypeStruct((1, chain.classes), jnp.float32)

    def init(sites: list[jax.Array], logits: jax.Array) -> PyTree:
        key = jax.random.key(0)
        said = {} if part.previous is None else {part.previous: logits}
        own = (
            part.variables
            if part.variables is not None
            else part.predictor.init(key, *predictor_inputs(part, sites, said))
        )
        return {"predictor": own, "selector": part.selector.init(key, logits)}

    return jax.eval_shape(init, batch, logits)


def _random(shapes: PyTree, key: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: 0.01 * jax.random.normal(key, leaf.shape, leaf.dtype) + 0.01, shapes)
