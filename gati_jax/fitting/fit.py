"""Fit the candidates of one base: predictors, then the selectors that say when to believe them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped, UInt64

from gati_jax.caches import Candidate, choose, predict_all
from gati_jax.data import check_distinct_rows, fingerprint, full_batches, row_digests
from gati_jax.errors import InputError
from gati_jax.models import Chain, check_images
from gati_jax.pytrees import Static, call, tree_digest

from .heads import DEFAULT_HEADS, Head, Part, more_selectors, parts_of
from .predictors import DEFAULT_CONFIG, FitConfig, apply_gradients, train_predictors


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
    epochs: float | None = None
    """Passes over the fit split that the predictors had; None where none was trained."""

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
    config: FitConfig = DEFAULT_CONFIG,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> Candidates:
    """Make caches that reproduce the answers of a frozen base. No labels are needed.

    Predictors are trained, unless a head brings its variables; then all selectors are fitted.

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
    images, select, fit_rows, select_rows = check_splits(chain, images, select)
    parts = parts_of(chain, heads)
    fold = deal(select_rows, config)
    to_train = {name: part for name, part in parts.items() if part.variables is None}
    epochs = None
    if to_train:
        identity = f"{config} {to_train} {chain_code(chain)} {fingerprint(fit_rows)} {tree_digest(chain.params)}"
        folder = Path(checkpoint) if checkpoint else None
        trained, epochs = train_predictors(
            chain, to_train, images, config, checkpoint=folder, identity=identity, progress=progress
        )
        parts |= trained
    parts = more_selectors(parts, heads)
    fold_selectors = fit_selectors(chain, parts, select, fold, config)
    items = tuple(
        Candidate(
            name,
            part.site,
            part.predictor,
            part.selector,
            {"predictor": part.variables, "selector": jax.tree.map(lambda v: v[-1], variables)},
            part.previous,
        )
        for (name, part), variables in zip(parts.items(), fold_selectors, strict=True)
    )
    return Candidates(
        items=items,
        fold_selectors=fold_selectors,
        select_rows=select_rows,
        select_fold=fold,
        fit_rows=fit_rows,
        dtype=str(images.dtype),
        epochs=epochs,
    )


def deal(select_rows: UInt64[np.ndarray, " n"], config: FitConfig) -> Int[np.ndarray, " n"]:
    """Deal the select rows into folds; equal rows share one.

    Raises:
        InputError: There are fewer distinct ones than folds.
    """
    unique, copy_of = np.unique(select_rows, return_inverse=True)
    if len(unique) < config.folds:
        raise InputError(
            f"select: expected at least one distinct row for each of {config.folds} folds, got {len(unique)}"
        )
    return deal_folds(len(unique), config.folds, config.seed)[copy_of]


class CheckedSplits(NamedTuple):
    """The fit and the select split, as arrays that the chain takes, and their digests."""

    images: Shaped[np.ndarray, "n ..."]
    select: Shaped[np.ndarray, "m ..."]
    fit_rows: UInt64[np.ndarray, " n"]
    select_rows: UInt64[np.ndarray, " m"]


def check_splits(chain: Chain, images: np.ndarray, select: np.ndarray) -> CheckedSplits:
    """Check that two splits are of the chain's inputs and one dtype, and share no rows.

    Raises:
        InputError: They are not, or do.
    """
    images, select = check_images(chain, images), check_images(chain, select, argument="select")
    if images.dtype != select.dtype:
        raise InputError(f"select: expected {images.dtype}, as images, got {select.dtype}")
    checked = CheckedSplits(images, select, row_digests(images), row_digests(select))
    check_distinct_rows(checked.select_rows, checked.fit_rows, names=("select", "fit"))
    return checked


def fit_selectors(
    chain: Chain,
    parts: Mapping[str, Part],
    select: np.ndarray,
    fold: Int[np.ndarray, " n"],
    config: FitConfig,
    pause: Callable[[], None] | None = None,
) -> tuple[PyTree, ...]:
    """Return, for each part, the variables of its selectors of all folds; ``pause`` is called after every step."""
    trained = {name: part.variables for name, part in parts.items()}
    batches, found = [], []
    for rows in full_batches(len(select), config.batch):
        said = _predict(chain, trained, select[rows], parts=Static(tuple(parts.items())))
        batches.append(jax.block_until_ready(said))
        _rest(pause)
    base_logits, logits = jax.tree.map(lambda *rows: jnp.concatenate(rows)[: len(select)], *batches)
    answers = jnp.argmax(base_logits, -1)
    key = jax.random.key(config.seed + 2)
    for name, part in parts.items():
        agrees = jnp.argmax(logits[name], -1) == answers
        fitted = fit_selector_folds(part.selector, logits[name], agrees, fold, config.folds, key)
        found.append(jax.block_until_ready(fitted))
        _rest(pause)
    return tuple(found)


def _rest(pause: Callable[[], None] | None) -> None:
    if pause is not None:
        pause()


@functools.partial(jax.jit, static_argnames="parts")
def _predict(chain: Chain, variables: PyTree, images: Array, *, parts: Static) -> tuple[Array, dict[str, Array]]:
    sites, base_logits = chain.activations(chain.prepare(images))
    return base_logits, predict_all(dict(parts.values), variables, sites)


def chain_code(chain: Chain) -> str:
    """Write out what the chain computes: two chains with the same parameters may differ in their blocks."""
    spec = jax.ShapeDtypeStruct((1, *chain.input_spec.shape), chain.input_spec.dtype)
    return f"{chain.input_spec} {chain.normalization} {jax.make_jaxpr(Chain.__call__)(chain, spec)}"


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
