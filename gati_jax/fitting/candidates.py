"""Fit the candidates of one base: all sites and heads in one pass over the data, then their selectors.

Activations and base logits are computed inside the jitted step from the same augmented images, and never stored.
The base's parameters are an argument of that step that nothing updates.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree, Shaped, UInt64

from gati_jax._digest import tree_digest
from gati_jax._errors import InputError
from gati_jax._linen import call
from gati_jax.caches import Candidate, Grid, SortedSelector, choose, fold_standardize
from gati_jax.data import check_distinct_rows, fingerprint, row_digests
from gati_jax.models import Chain, check_images

from .augment import Augment
from .distill import distillation_loss
from .loop import LoopConfig, LoopState, run_loop
from .optimize import apply_gradients
from .selection import deal_folds, fit_selector_folds

_INIT_ROWS = 512  # enough to tell the features' means and scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """A kind of cache to train.

    Args:
        name: Prefix of the candidates' names: "grid" at site 9 becomes "grid@9".
        predictor: Makes the predictor for a number of classes.
        selector: The selector.
        sites: Where; None for sites 1 .. N - 1.
    """

    name: str
    predictor: Callable[[int], nn.Module]
    selector: nn.Module
    sites: tuple[int, ...] | None = None


DEFAULT_HEADS = (Head(name="grid", predictor=Grid, selector=SortedSelector()),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How predictors and selectors are trained.

    Args:
        epochs: Passes of all predictors over the fit split.
        batch: Images in a step.
        optimizer: "adamw", or the paper's "sgd" with momentum 0.9; both warm up linearly and decay by a cosine.
        learning_rate: Its peak.
        weight_decay: Decoupled for adamw, L2 for sgd.
        alpha: Weight of the soft term of the distillation loss.
        temperature: Its T.
        augment: Crops and flips.
        folds: Folds of the select split.
        seed: Initial values, order and augmentation.
    """

    epochs: int = 5
    batch: int = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-2
    weight_decay: float = 1e-3
    alpha: float = 0.5
    temperature: float = 6.0
    augment: Augment = Augment()  # noqa: RUF009 (frozen)
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what could not be trained.

        Raises:
            InputError: Names the field.
        """
        if self.optimizer not in {"adamw", "sgd"}:
            msg = f"optimizer: expected adamw or sgd, got {self.optimizer!r}"
            raise InputError(msg)
        if not 0 < self.learning_rate < np.inf:
            msg = f"learning_rate: expected a positive number, got {self.learning_rate}"
            raise InputError(msg)
        for name, least in (("epochs", 1), ("batch", 1), ("folds", 2)):
            if (got := getattr(self, name)) < least:
                msg = f"{name}: expected {least} or more, got {got}"
                raise InputError(msg)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """The candidates of a fit, and which rows they have learned from.

    Iterating gives the candidates with their final selectors. ``fold_selectors`` holds, per candidate, the variables
    of the selectors of every fold, [folds + 1, ...]; ``replay`` scores a select row by the one that has not seen it.
    """

    items: tuple[Candidate, ...]
    fold_selectors: tuple[PyTree, ...]
    select_rows: UInt64[np.ndarray, " n"]  # digests
    select_fold: Int[np.ndarray, " n"]
    fit_rows: UInt64[np.ndarray, " m"]  # digests
    dtype: str
    """Of the images: rows are recognised by their bytes."""

    def __iter__(self) -> Iterator[Candidate]:
        """Iterate over the candidates."""
        return iter(self.items)

    def __len__(self) -> int:
        """Return their number."""
        return len(self.items)

    def take(self, names: Sequence[str]) -> "Candidates":
        """Return these candidates only, in this order.

        Raises:
            InputError: A name is not among them.
        """
        items = choose(self.items, names)
        index = [self.items.index(item) for item in items]
        return dataclasses.replace(self, items=items, fold_selectors=tuple(self.fold_selectors[i] for i in index))


def fit(
    chain: Chain,
    images: Shaped[np.ndarray, "n ..."],
    *,
    select: Shaped[np.ndarray, "m ..."],
    heads: Sequence[Head] = DEFAULT_HEADS,
    config: FitConfig = FitConfig(),
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> Candidates:
    """Train caches to reproduce the answers of a frozen base. No labels are needed.

    Args:
        chain: The base.
        images: The fit split: uint8 or prepared inputs.
        select: The select split, disjoint from it: the selectors learn here.
        heads: What to train, and where.
        config: How.
        checkpoint: A folder; a fit that was killed and is called again the same way resumes from there.
        progress: Whether to draw a progress bar on a terminal.

    Raises:
        InputError: Images that the chain does not take, overlapping splits, a site that the chain does not have.
    """
    images, select = check_images(chain, images), check_images(chain, select, argument="select")
    if images.dtype != select.dtype:
        msg = f"select: expected {images.dtype}, as images, got {select.dtype}"
        raise InputError(msg)
    fit_rows, select_rows = row_digests(images), row_digests(select)
    check_distinct_rows(select_rows, fit_rows, names=("select", "fit"))
    predictors = _predictors(chain, heads)
    identity = f"{config} {predictors} {_code(chain)} {fingerprint(fit_rows)} {tree_digest(chain.params)}"
    if len(images) < config.batch:
        msg = f"images: expected at least one batch of {config.batch} rows, got {len(images)}"
        raise InputError(msg)
    unique, copy_of = np.unique(select_rows, return_inverse=True)  # equal rows share a fold
    if len(unique) < config.folds:
        msg = f"select: expected at least one distinct row for each of {config.folds} folds, got {len(unique)}"
        raise InputError(msg)
    folder = Path(checkpoint) if checkpoint else None
    variables = _train(chain, predictors, images, config, checkpoint=folder, identity=identity, progress=progress)
    for name, part in predictors.items():
        predictor, variables[name] = fold_standardize(part.predictor, variables[name])
        predictors[name] = dataclasses.replace(part, predictor=predictor)
    fold = deal_folds(len(unique), config.folds, config.seed)[copy_of]
    fold_selectors = _fit_selectors(chain, predictors, variables, select, fold, config)
    items = tuple(
        Candidate(
            name,
            p.site,
            p.predictor,
            p.selector,
            {"predictor": variables[name], "selector": jax.tree.map(lambda v: v[-1], s)},
        )
        for (name, p), s in zip(predictors.items(), fold_selectors, strict=True)
    )
    return Candidates(
        items=items,
        fold_selectors=fold_selectors,
        select_rows=select_rows,
        select_fold=fold,
        fit_rows=fit_rows,
        dtype=str(images.dtype),
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    """The static part of one candidate to be."""

    site: int
    predictor: nn.Module
    selector: nn.Module


def _predictors(chain: Chain, heads: Sequence[Head]) -> dict[str, _Part]:
    parts = {}
    for head in heads:
        sites = range(1, len(chain)) if head.sites is None else head.sites
        if bad := [site for site in sites if not 0 <= site < len(chain)]:
            msg = f"heads: expected sites 0 to {len(chain) - 1} for {head.name}, got {bad}"
            raise InputError(msg)
        parts |= {f"{head.name}@{site}": _Part(site, head.predictor(chain.classes), head.selector) for site in sites}
    if not parts:
        msg = f"heads: expected at least one at some site, got none; a chain of {len(chain)} blocks has by default"
        msg += " sites 1 to N - 1, and site 0 where sites=(0,) says so"
        raise InputError(msg)
    if len(parts) != sum(len(chain) - 1 if h.sites is None else len(h.sites) for h in heads):
        msg = f"heads: expected distinct names, got {[head.name for head in heads]}"
        raise InputError(msg)
    return parts


def _optimizer(config: FitConfig, n: int) -> optax.GradientTransformation:
    steps = max(1, config.epochs * (n // config.batch))
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, steps // 10, steps)
    if config.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=config.weight_decay)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, momentum=0.9))


def _init(
    chain: Chain, predictors: dict[str, _Part], images: np.ndarray, config: FitConfig
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Draw initial parameters, and take the constants that predictors read off their first activations."""

    @jax.jit
    def init(chain: Chain, images: Array) -> dict[str, PyTree]:
        sites, _ = chain.activations(chain.prepare(images))
        keys = jax.random.split(jax.random.key(config.seed), len(predictors))
        return {
            name: part.predictor.init(keys[i], sites[part.site]) for i, (name, part) in enumerate(predictors.items())
        }

    variables = init(chain, images)
    params = {name: v["params"] for name, v in variables.items()}
    return params, {name: {k: c for k, c in v.items() if k != "params"} for name, v in variables.items()}


def _train(
    chain: Chain,
    predictors: dict[str, _Part],
    images: np.ndarray,
    config: FitConfig,
    *,
    checkpoint: Path | None,
    identity: str,
    progress: bool,
) -> dict[str, PyTree]:
    """Train all predictors; return their variables.

    Raises:
        InputError: A predictor diverged.
    """
    optimizer = _optimizer(config, len(images))
    step = jax.jit(functools.partial(_step, dict(predictors), config, optimizer), donate_argnames="state")
    drawn = np.random.default_rng(config.seed).permutation(len(images))[:_INIT_ROWS]
    params, constants = _init(chain, predictors, images[drawn], config)
    state = run_loop(
        lambda state, rows: step(chain, constants, state=state, images=rows),
        LoopState(jnp.zeros((), jnp.int32), params, optimizer.init(params)),
        (images,),
        LoopConfig(epochs=config.epochs, batch=config.batch, seed=config.seed),
        checkpoint=checkpoint,
        identity=identity,
        description=f"fitting {len(predictors)} predictors",
        progress=progress,
    )
    _check_finite(state.params)
    return _merge(state.params, constants)


def _merge(params: dict[str, PyTree], constants: dict[str, PyTree]) -> dict[str, PyTree]:
    return {name: {"params": params[name], **constants[name]} for name in params}


def _step(
    predictors: dict[str, _Part],
    config: FitConfig,
    optimizer: optax.GradientTransformation,
    chain: Chain,
    constants: dict[str, PyTree],
    *,
    state: LoopState,
    images: Array,
) -> tuple[LoopState, Float[Array, ""]]:
    """Advance all predictors by one batch; the sum of losses keeps their gradients independent of one another."""
    key = jax.random.fold_in(jax.random.key(config.seed + 1), state.step)
    sites, base_logits = chain.activations(chain.prepare(config.augment(key, images)))

    def loss(params: PyTree) -> Float[Array, ""]:
        variables = _merge(params, constants)
        losses = [
            distillation_loss(
                call(part.predictor, variables[name], sites[part.site]),
                base_logits,
                alpha=config.alpha,
                temperature=config.temperature,
            )
            for name, part in predictors.items()
        ]
        return jnp.sum(jnp.stack(losses))

    value, gradients = jax.value_and_grad(loss)(state.params)
    params, opt_state = apply_gradients(optimizer, gradients, state.opt_state, state.params)
    return LoopState(state.step + 1, params, opt_state), value / len(predictors)


def _check_finite(params: dict[str, PyTree]) -> None:
    leaves = {name: jax.tree.leaves(tree) for name, tree in params.items()}
    if bad := [name for name, arrays in leaves.items() if not all(np.isfinite(a).all() for a in arrays)]:
        msg = f"fit: {', '.join(bad)} diverged: expected finite parameters; is the learning rate too high?"
        raise InputError(msg)


def _fit_selectors(
    chain: Chain,
    predictors: dict[str, _Part],
    params: PyTree,
    select: np.ndarray,
    fold: Int[np.ndarray, " n"],
    config: FitConfig,
) -> tuple[PyTree, ...]:
    @jax.jit
    def predict(chain: Chain, params: PyTree, images: Array) -> tuple[Array, dict[str, Array]]:
        sites, base_logits = chain.activations(chain.prepare(images))
        return base_logits, {
            name: call(part.predictor, params[name], sites[part.site]) for name, part in predictors.items()
        }

    batches = [predict(chain, params, select[i : i + config.batch]) for i in range(0, len(select), config.batch)]
    base_logits, logits = jax.tree.map(lambda *rows: jnp.concatenate(rows), *batches)
    answers = jnp.argmax(base_logits, -1)
    key = jax.random.key(config.seed + 2)
    return tuple(
        fit_selector_folds(
            part.selector, logits[name], jnp.argmax(logits[name], -1) == answers, fold, config.folds, key
        )
        for name, part in predictors.items()
    )


def _code(chain: Chain) -> str:
    """Write out what the chain computes: two chains with the same parameters may differ in their blocks."""
    spec = jax.ShapeDtypeStruct((1, *chain.input_spec.shape), chain.input_spec.dtype)
    return f"{chain.input_spec} {chain.normalization} {jax.make_jaxpr(Chain.__call__)(chain, spec)}"
