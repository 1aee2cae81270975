"""Replay: what the base and all candidates say to every request, in the float32 reference arithmetic."""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from gati_jax.caches import Candidate, predict_all, replay_source
from gati_jax.data import check_distinct_rows, full_batches, row_digests
from gati_jax.errors import InputError
from gati_jax.models import Chain, check_images
from gati_jax.models.chain import reference
from gati_jax.planning import ReplayTable
from gati_jax.pytrees import call

from .fit import Candidates


def replay(
    chain: Chain,
    candidates: Candidates | Iterable[Candidate],
    images: Shaped[np.ndarray, "n ..."],
    *,
    labels: Int[np.ndarray, " n"] | None = None,
    batch: int = 128,
    pause: Callable[[], None] | None = None,
) -> ReplayTable:
    """Run the base and every candidate over ``images``.

    Rows that a selector was fitted on are recognised by content and scored out of fold: by the selector of the fold
    that has not seen them.

    Args:
        chain: The base.
        candidates: A fit's, or single ones (whose scores are then never out of fold).
        images: uint8 or prepared inputs.
        labels: Ground truth, if there is any.
        batch: Images in a step.
        pause: Called after every step: whoever replays in the background rests there.

    Raises:
        InputError: Images that the chain does not take, or that the predictors were fitted on.
    """
    images = check_images(chain, images)
    items = tuple(candidates)
    _check_batch(batch)
    if len(images) == 0:
        raise InputError("images: expected at least one, got none")
    rows = row_digests(images)
    if isinstance(candidates, Candidates):
        if str(images.dtype) != candidates.dtype:  # rows could not be told apart
            raise InputError(f"images: expected {candidates.dtype}, as in the fit, got {images.dtype}")
        check_distinct_rows(rows, candidates.fit_rows, names=("images", "fit"))
        selectors, fold = candidates.fold_selectors, _unseen_fold(candidates, rows)
    else:
        selectors = tuple(jax.tree.map(lambda v: v[None], item.params["selector"]) for item in items)
        fold = np.zeros(len(rows), np.int32)
    answers, classes, scores, _ = _outputs(chain, items, selectors, images, fold, batch=batch, pause=pause)
    return ReplayTable(
        names=tuple(c.name for c in items),
        sites=tuple(c.site for c in items),
        depth=len(chain),
        answers=answers,
        classes=classes,
        scores=scores,
        rows=rows,
        labels=None if labels is None else np.asarray(labels),
        source=replay_source(chain, items, str(images.dtype)),
    )


class Outputs(NamedTuple):
    """What the base and some candidates say to requests."""

    answers: Int[np.ndarray, " n"]
    classes: Int[np.ndarray, "candidates n"]
    scores: Float[np.ndarray, "candidates n"]  # never out of fold
    logits: Float[np.ndarray, "classes n"]  # of the base


def evaluate(
    chain: Chain,
    candidates: Iterable[Candidate],
    images: Shaped[np.ndarray, "n ..."],
    *,
    batch: int = 128,
    pause: Callable[[], None] | None = None,
) -> Outputs:
    """Return the columns of a replay alone: for requests that come in small parts, one after another.

    Args:
        chain: The base.
        candidates: Whose final selectors score.
        images: uint8 or prepared inputs, at least one.
        batch: Images in a step.
        pause: As for ``replay``.

    Raises:
        InputError: As ``replay``.
    """
    images, items = check_images(chain, images), tuple(candidates)
    _check_batch(batch)
    selectors = tuple(jax.tree.map(lambda v: v[None], item.params["selector"]) for item in items)
    return _outputs(chain, items, selectors, images, np.zeros(len(images), np.int32), batch=batch, pause=pause)


def _outputs(
    chain: Chain,
    items: tuple[Candidate, ...],
    selectors: tuple[PyTree, ...],
    images: np.ndarray,
    fold: Int[np.ndarray, " n"],
    *,
    batch: int,
    pause: Callable[[], None] | None,
) -> Outputs:
    parts = []
    for rows in full_batches(len(images), batch):
        part = _replay_batch(chain, items, selectors, images[rows], fold[rows])
        parts.append([np.asarray(column) for column in part])
        if pause is not None:
            pause()
    n = len(images)
    return Outputs(*(np.concatenate(columns, axis=-1)[..., :n] for columns in zip(*parts, strict=True)))


def _unseen_fold(candidates: Candidates, rows: np.ndarray) -> Int[np.ndarray, " n"]:
    """Return for each row a selector that has not seen it: its fold's, or the last, fitted on all, for new rows."""
    order = np.argsort(candidates.select_rows)
    known = candidates.select_rows[order]
    at = np.minimum(np.searchsorted(known, rows), len(known) - 1)
    leaves = jax.tree.leaves(candidates.fold_selectors)
    folds = leaves[0].shape[0] - 1 if leaves else 0  # selectors without parameters have seen nothing
    return np.where(known[at] == rows, candidates.select_fold[order][at], folds).astype(np.int32)


def replay_logits(
    chain: Chain, candidates: Iterable[Candidate], images: Shaped[np.ndarray, "n ..."], *, batch: int = 128
) -> Float[np.ndarray, "candidates n classes"]:
    """Return the logits of every candidate's predictor: what other rules than its selector's would leave by.

    Args:
        chain: The base.
        candidates: Whose.
        images: uint8 or prepared inputs.
        batch: Images in a step.

    Raises:
        InputError: No candidates, images that the chain does not take, or a batch of no rows.
    """
    images, items = check_images(chain, images), tuple(candidates)
    _check_batch(batch)
    if not (items and len(images)):
        raise InputError(f"candidates, images: expected at least one of each, got {len(items)} and {len(images)}")
    parts = [np.asarray(_logits_batch(chain, items, images[rows])) for rows in full_batches(len(images), batch)]
    return np.concatenate(parts, axis=1)[:, : len(images)]


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise InputError(f"batch: expected 1 or more, got {batch}")


@jax.jit
@reference
def _logits_batch(
    chain: Chain, items: tuple[Candidate, ...], images: Array
) -> Float[Array, "candidates batch classes"]:
    sites, _ = chain.activations(chain.prepare(images))
    by_name = {item.name: item for item in items}
    logits = predict_all(by_name, {name: item.params["predictor"] for name, item in by_name.items()}, sites)
    return jnp.stack(list(logits.values()))


@jax.jit
@reference
def _replay_batch(
    chain: Chain, items: tuple[Candidate, ...], selectors: tuple[PyTree, ...], images: Array, fold: Int[Array, " batch"]
) -> tuple[
    Int[Array, " batch"],
    Int[Array, "candidates batch"],
    Float[Array, "candidates batch"],
    Float[Array, "classes batch"],
]:
    sites, logits = chain.activations(chain.prepare(images))
    classes, scores = [], []
    by_name = {item.name: item for item in items}
    logits_of = predict_all(by_name, {name: item.params["predictor"] for name, item in by_name.items()}, sites)
    for item, selector in zip(items, selectors, strict=True):
        said = logits_of[item.name]
        classes.append(jnp.argmax(said, -1))
        if not jax.tree.leaves(selector):  # nothing was fitted
            scores.append(call(item.selector, selector, said))
            continue
        by_fold = jax.vmap(functools.partial(call, item.selector), (0, None))(selector, said)  # float[folds + 1, batch]
        scores.append(jnp.take_along_axis(by_fold, fold[None], axis=0)[0])
    none = jnp.zeros((0, len(images)))
    return (
        jnp.argmax(logits, -1),
        jnp.stack(classes) if items else none.astype(jnp.int32),
        jnp.stack(scores) if items else none,
        logits.T,
    )
