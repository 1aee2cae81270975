"""Fit the candidates of one base: predictors, then the selectors that say when to trust them."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped, UInt64

from gati_jax.caches import Candidate, choose, predict_all
from gati_jax.caches.candidate import Part, fitted_rows
from gati_jax.data import Images, Source, check_distinct_rows, fingerprint, full_batches, read_batches, row_digests
from gati_jax.devices import ONE, Devices, sharing
from gati_jax.errors import InputError, check_kind, listed
from gati_jax.models import Chain, check_chain, warn_of_inputs
from gati_jax.models.chain import reference
from gati_jax.pytrees import Static, call, tree_digest

from .base import open_images, rows_at_once
from .heads import Head, default_heads, more_selectors, parts_of
from .loop import Pause, logged, no_pause
from .predictors import DEFAULT_CONFIG, FitConfig, Trained, apply_gradients, train_predictors

_STEPS, _RATE, _DECAY = 400, 0.02, 1e-3  # of a selector's fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """The candidates of a fit, and the rows that they were fitted on. Iterating yields the candidates."""

    items: tuple[Candidate, ...]
    """With their final selectors, fitted on all select rows."""
    fold_selectors: tuple[PyTree, ...]
    """Of each candidate: the selectors' variables[folds + 1, ...], the f-th fitted without fold f, the last on all.
    ``replay`` scores a select row by the one that has not seen it."""
    select_rows: UInt64[np.ndarray, " n"]  # digests
    select_fold: Int[np.ndarray, " n"]
    fit_rows: UInt64[np.ndarray, " m"]  # digests
    dtype: str
    """Of the images: rows are recognised by their bytes."""
    epochs: float | None = None
    """Passes over the fit split that the predictors had; None where none was trained."""

    def __repr__(self) -> str:
        """Describe it in a line."""
        names = listed([item.name for item in self.items], most=8, room=150) or "none"
        return f"Candidates({names}; fitted on {len(self.fit_rows)} rows, selected on {len(self.select_rows)})"

    def __iter__(self) -> Iterator[Candidate]:
        """Iterate over the candidates."""
        return iter(self.items)

    def __len__(self) -> int:
        """Return their number."""
        return len(self.items)

    def take(self, names: Sequence[str]) -> "Candidates":
        """Return the candidates of these names, in this order.

        Raises:
            InputError: A name is not among them.
        """
        items = choose(self.items, names)
        index = [self.items.index(item) for item in items]
        return dataclasses.replace(self, items=items, fold_selectors=tuple(self.fold_selectors[i] for i in index))


def fit(
    chain: Chain,
    images: Shaped[np.ndarray, "n ..."] | Source,
    *,
    select: Shaped[np.ndarray, "m ..."] | Source,
    heads: Sequence[Head] | None = None,
    config: FitConfig = DEFAULT_CONFIG,
    checkpoint: Path | str | None = None,
    progress: bool = True,
) -> Candidates:
    """Fit caches that reproduce the answers of a frozen base. No labels are needed.

    Predictors are trained on the fit split, unless a head comes with its variables; then all selectors are fitted on
    the select split.

    Args:
        chain: The base.
        images: The fit split: uint8 or prepared inputs[n, ...], or a source of them that need not fit into memory: see
            ``gati_jax.data.Source``.
        select: The select split[m, ...], disjoint from it.
        heads: What to train, and at which sites; by default means over a grid at every site but the input, and for a
            transformer of this library the class token, too.
        config: How to train it.
        checkpoint: A folder; an interrupted fit that is called again with the same arguments resumes from there.
        progress: Whether to draw a progress bar on a terminal.

    Raises:
        InputError: Images that the chain does not take, overlapping splits, a site that the chain does not have, a
            head that no bundle can hold, or a chain whose logits are not finite or depend on the batch.
    """
    check_kind("config", config, FitConfig, "gati_jax.FitConfig(...)")
    splits = check_splits(chain, images, select)
    check_chain(chain, splits.images)
    warn_of_inputs(chain, splits.images)
    heads = default_heads(chain) if heads is None else heads
    parts = parts_of(chain, heads)
    fold = deal_folds(splits.select_rows, config)
    to_train = {name: part for name, part in parts.items() if part.variables is None}
    epochs = None
    if to_train:
        trained = train(chain, to_train, splits, config, checkpoint, progress=progress)
        parts, epochs = parts | trained.parts, trained.epochs
    parts = more_selectors(parts, heads)
    fold_selectors = fit_selectors(chain, parts, splits.select, fold, config, devices=sharing(config.batch))
    items = tuple(
        Candidate(
            name,
            part.site,
            part.predictor,
            part.selector,
            {"predictor": part.variables, "selector": last_selector(variables)},
            part.previous,
        )
        for (name, part), variables in zip(parts.items(), fold_selectors, strict=True)
    )
    return splits.candidates(items, fold_selectors, fold, epochs)


class CheckedSplits(NamedTuple):
    """The fit and the select split, as images that the chain takes, and their digests."""

    images: Images
    select: Images
    fit_rows: UInt64[np.ndarray, " n"]
    select_rows: UInt64[np.ndarray, " m"]

    def candidates(
        self,
        items: tuple[Candidate, ...],
        fold_selectors: tuple[PyTree, ...],
        fold: Int[np.ndarray, " m"],
        epochs: float | None,
    ) -> Candidates:
        """Return the candidates that were fitted on these splits; those of a refit remember their first fit's, too."""
        rows = np.concatenate([fitted_rows(items), self.fit_rows, self.select_rows])
        return Candidates(
            items=tuple(dataclasses.replace(item, fitted_rows=rows) for item in items),
            fold_selectors=fold_selectors,
            select_rows=self.select_rows,
            select_fold=fold,
            fit_rows=self.fit_rows,
            dtype=str(self.images.dtype),
            epochs=epochs,
        )


def check_splits(chain: Chain, images: np.ndarray | Source, select: np.ndarray | Source) -> CheckedSplits:
    """Check that two splits are of the chain's inputs and one dtype, and share no rows.

    Raises:
        InputError: They are not, or do.
    """
    fit_images, select_images = open_images(chain, images), open_images(chain, select, argument="select")
    if fit_images.dtype != select_images.dtype:
        raise InputError(f"select: expected {fit_images.dtype}, as images, got {select_images.dtype}")
    checked = CheckedSplits(fit_images, select_images, row_digests(fit_images), row_digests(select_images))
    check_distinct_rows(checked.select_rows, checked.fit_rows, names=("select", "fit"))
    return checked


def train(
    chain: Chain,
    parts: dict[str, Part],
    splits: CheckedSplits,
    config: FitConfig,
    checkpoint: Path | str | None,
    *,
    progress: bool,
) -> Trained:
    """Train predictors on the fit split; a checkpoint is resumed only by a fit of the same base, rows and options."""
    # Two chains with the same parameters may differ in their blocks, hence the program.
    spec = jax.ShapeDtypeStruct((1, *chain.input_spec.shape), chain.input_spec.dtype)
    base = f"{chain.input_spec} {chain.normalization} {jax.make_jaxpr(Chain.__call__)(chain, spec)}"
    identity = f"{config} {parts} {base} {fingerprint(splits.fit_rows)} {tree_digest(chain.params)}"
    folder = Path(checkpoint) if checkpoint else None
    return train_predictors(
        chain, parts, splits.images, config, checkpoint=folder, identity=identity, progress=progress
    )


def deal_folds(select_rows: UInt64[np.ndarray, " n"], config: FitConfig) -> Int[np.ndarray, " n"]:
    """Deal the select rows evenly into folds 0 .. folds - 1; equal rows share one.

    Raises:
        InputError: There are fewer distinct rows than folds.
    """
    unique, copy_of = np.unique(select_rows, return_inverse=True)
    n = len(unique)
    if n < config.folds:
        raise InputError(f"select: expected at least one distinct row for each of {config.folds} folds, got {n}")
    fold = np.random.default_rng((config.seed, n)).permutation(np.arange(n) % config.folds)
    return fold.astype(np.int32)[copy_of]


def fit_selectors(
    chain: Chain,
    parts: Mapping[str, Part],
    select: Images,
    fold: Int[np.ndarray, " n"],
    config: FitConfig,
    *,
    pause: Pause = no_pause,
    devices: Devices = ONE,
) -> tuple[PyTree, ...]:
    """Fit the selectors of trained predictors on the select split, whose rows are dealt into folds.

    Devices share what takes the time, the base's answers; selectors are small.

    Returns:
        For each part, the variables[folds + 1, ...] of the selectors fitted without each fold, and on all rows.
    """
    trained = {name: part.variables for name, part in parts.items()}
    static = Static(tuple(parts.items()))
    batches, found = [], []
    size = devices.count * rows_at_once(chain, config.batch // devices.count)
    base, shared = devices.copy((chain, trained))
    read = read_batches((select,), full_batches(len(select), size))
    for (images,) in logged(read, -(-len(select) // size), "fitting selectors: the base's answers"):
        outputs = _predict(base, shared, devices.split(images), parts=static, devices=devices)
        batches.append(jax.block_until_ready(devices.collect(outputs)))
        pause()
    base_logits, logits = jax.tree.map(lambda *rows: jnp.concatenate(rows)[: len(select)], *batches)
    answers = jnp.argmax(base_logits, -1)
    key = jax.random.key(config.seed + 2)
    weights = np.stack([fold != f for f in range(config.folds + 1)]).astype(np.float32)  # the last sees all rows
    for name, part in parts.items():
        agrees = jnp.argmax(logits[name], -1) == answers
        fit_folds = jax.vmap(functools.partial(fit_selector, part.selector, logits[name], agrees, key=key))
        found.append(jax.block_until_ready(fit_folds(weights)))
        pause()
    return tuple(found)


def last_selector(variables: PyTree) -> PyTree:
    """Return the final one of a candidate's fold selectors."""
    return jax.tree.map(lambda v: v[-1], variables)


@functools.partial(jax.jit, static_argnames=("parts", "devices"))
@reference
def _predict(
    chain: Chain, variables: PyTree, images: Array, *, parts: Static, devices: Devices
) -> tuple[Array, dict[str, Array]]:
    sites, base_logits = chain.activations(chain.prepare(devices.as_rows(images)))
    return devices.as_copies((base_logits, predict_all(dict(parts.values), variables, sites)))


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
