"""Continue the fit of candidates that are in use, on recent images.

The base's activations are computed once and kept: the forward pass dominates the cost, and recent images are few (2,000
of them at a site of 8x8x256 take 131 MB). Hence there is no augmentation. Candidates keep their names, structure and
shapes, so a program that was compiled for the old ones accepts the new ones.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from gati_jax.caches import Candidate, Centres, Neighbours, Network, fold_standardize, unfold_standardize
from gati_jax.caches.candidate import Part
from gati_jax.data import Images, full_batches
from gati_jax.errors import InputError
from gati_jax.models import Chain, fast_forward
from gati_jax.pytrees import Static

from .fit import Candidates, check_splits, deal_folds, fit_selectors, last_selector
from .loop import LoopConfig, LoopState, Pause, no_pause, run_loop
from .predictors import FitConfig, advance, check_finite, merge, optimizer_of

REFIT_CONFIG = FitConfig(epochs=10, batch=64, learning_rate=1e-3)
_STATISTICS_ROWS = 512
_KEPT = Network | Neighbours | Centres  # not trained by gradients, or too large for a few images


def refit(
    chain: Chain,
    candidates: Iterable[Candidate],
    images: Shaped[np.ndarray, "n ..."],
    *,
    select: Shaped[np.ndarray, "m ..."],
    config: FitConfig = REFIT_CONFIG,
    pause: Pause | None = None,
) -> Candidates:
    """Continue the training of heads, and fit all selectors anew; networks and stored points stay as they are.

    Args:
        chain: The base.
        candidates: As a bundle has them.
        images: Recent requests[n, ...], on which heads learn the base's answers.
        select: Later requests[m, ...], none of them among ``images``: the selectors are fitted on them.
        config: As for a fit, without augmentation.
        pause: Called after every batch, step and selector.

    Raises:
        InputError: As ``fit``; or a candidate takes another's logits.
    """
    items = tuple(candidates)
    if cascaded := [item.name for item in items if item.previous is not None]:
        raise InputError(f"candidates: expected none that takes another's logits, got {', '.join(cascaded)}")
    pause = pause or no_pause
    splits = check_splits(chain, images, select)
    parts = {c.name: Part(c.site, c.predictor, c.selector, c.params["predictor"]) for c in items}
    fold = deal_folds(splits.select_rows, config)
    heads = {name: part for name, part in parts.items() if not isinstance(part.predictor, _KEPT)}
    if heads:
        parts |= _train(fast_forward(chain), heads, splits.images, config, pause)
    selectors = fit_selectors(chain, parts, splits.select, fold, config, pause=pause)
    refitted = tuple(
        dataclasses.replace(c, params={"predictor": parts[c.name].variables, "selector": last_selector(variables)})
        for c, variables in zip(items, selectors, strict=True)
    )
    return splits.candidates(refitted, selectors, fold, float(config.epochs) if heads else None)


def _train(chain: Chain, heads: Mapping[str, Part], images: Images, config: FitConfig, pause: Pause) -> dict[str, Part]:
    """Return the heads with their new variables, folded as they were."""
    base_logits, activations = _run_base(chain, images, sorted({p.site for p in heads.values()}), config, pause)
    first_rows = {site: jnp.asarray(rows[:_STATISTICS_ROWS]) for site, rows in activations.items()}
    unfolded = {
        name: unfold_standardize(part.predictor, part.variables, first_rows[part.site]) for name, part in heads.items()
    }
    pause()
    learning = Static(tuple((name, Part(p.site, unfolded[name][0], p.selector)) for name, p in heads.items()))
    # Copied, because a step donates its state, and these arrays may belong to a cascade that is being served.
    params = {name: jax.tree.map(jnp.copy, variables["params"]) for name, (_, variables) in unfolded.items()}
    constants = {name: {k: v for k, v in tree.items() if k != "params"} for name, (_, tree) in unfolded.items()}
    total = jnp.asarray(len(images) // config.batch * config.epochs, jnp.int32)

    def step(state: LoopState, logits: np.ndarray, *rows: np.ndarray) -> tuple[LoopState, Float[Array, ""]]:
        sites = dict(zip(activations, rows, strict=True))
        done = _step(constants, total, sites, logits, state=state, parts=learning, config=config)
        jax.block_until_ready(done)
        pause()
        return done

    first = LoopState(jnp.zeros((), jnp.int32), params, optimizer_of(config, total).init(params))
    loop = LoopConfig(epochs=config.epochs, batch=config.batch, seed=config.seed)
    arrays = (base_logits, *activations.values())
    params = run_loop(step, first, arrays, loop, progress=False, description="refitting").params
    check_finite(params)
    learned = merge(params, constants)
    for name, (module, _) in unfolded.items():
        if module != heads[name].predictor:
            learned[name] = fold_standardize(module, learned[name])[1]
    return {name: Part(p.site, p.predictor, p.selector, learned[name]) for name, p in heads.items()}


def _run_base(
    chain: Chain, images: Images, sites: list[int], config: FitConfig, pause: Pause
) -> tuple[Float[np.ndarray, "n classes"], dict[int, Float[np.ndarray, "n ..."]]]:
    """Return the base's logits and its activations by site."""
    parts = []
    for rows in full_batches(len(images), config.batch):
        parts.append(jax.tree.map(np.asarray, _forward(chain, images[rows], sites=tuple(sites))))
        pause()
    logits, *activations = (np.concatenate(column)[: len(images)] for column in zip(*parts, strict=True))
    return logits, dict(zip(sites, activations, strict=True))


@functools.partial(jax.jit, static_argnames="sites")
def _forward(chain: Chain, images: Array, *, sites: tuple[int, ...]) -> tuple[Array, ...]:
    activations, logits = chain.activations(chain.prepare(images))
    return (logits, *(activations[site] for site in sites))


_step = jax.jit(advance, static_argnames=("parts", "config"), donate_argnames="state")
