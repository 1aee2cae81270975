"""Replay: the outputs of the base and of all candidates for every request, in the float32 reference arithmetic."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from gati_jax.caches import Candidate, predict_all, replay_source
from gati_jax.caches.candidate import fitted_rows
from gati_jax.data import ImageRows, Images, Source, check_distinct_rows, full_batches, read_batches, row_digests
from gati_jax.errors import InputError
from gati_jax.models import Chain, check_chain
from gati_jax.models.chain import reference
from gati_jax.planning import ReplayTable
from gati_jax.pytrees import call

from .base import open_images, rows_at_once
from .fit import Candidates
from .loop import Pause, logged, no_pause


def replay(
    chain: Chain,
    candidates: Candidates | Iterable[Candidate],
    images: Shaped[np.ndarray, "n ..."] | Source,
    *,
    labels: Int[np.ndarray, " n"] | None = None,
    batch: int = 128,
    pause: Pause | None = None,
) -> ReplayTable:
    """Run the base and every candidate over ``images``.

    Select rows of a fit are recognised by their content and scored out of fold: by the selector that was fitted without
    them.

    Args:
        chain: The base.
        candidates: A fit's, or single ones, whose final selectors then score all rows.
        images: uint8 or prepared inputs[n, ...], or a source of them, see ``gati_jax.data.Source``.
        labels: Ground truth, if there is any; by default that of the source, if its rows have labels.
        batch: Images in a step; fewer, if their activations would not fit into memory.
        pause: Called after every step.

    Raises:
        InputError: Images that the chain does not take, or that the predictors were fitted on; or a chain whose logits
            are not finite or depend on the batch.
    """
    images, items = open_images(chain, images), tuple(candidates)
    if len(images) == 0:
        raise InputError("images: expected at least one, got none")
    check_chain(chain, images)
    rows = row_digests(images)
    if labels is None and isinstance(images, ImageRows):
        labels = images.scan().labels
    if isinstance(candidates, Candidates):
        if str(images.dtype) != candidates.dtype:  # rows could not be told apart
            raise InputError(f"images: expected {candidates.dtype}, as in the fit, got {images.dtype}")
        check_distinct_rows(rows, candidates.fit_rows, names=("images", "fit"))
        selectors, fold = candidates.fold_selectors, _unseen_fold(candidates, rows)
    else:
        selectors, fold = _final_selectors(items), np.zeros(len(rows), np.int32)
    outputs = _outputs(chain, items, selectors, images, fold, batch=batch, pause=pause)
    if wrong := int((~np.isfinite(outputs.logits)).any(0).sum()):
        raise InputError(f"chain: expected finite logits, got NaN or infinity for {wrong} of {len(images)} images")
    return ReplayTable(
        names=tuple(c.name for c in items),
        sites=tuple(c.site for c in items),
        depth=len(chain),
        answers=outputs.answers,
        classes=outputs.classes,
        scores=outputs.scores,
        rows=rows,
        labels=None if labels is None else np.asarray(labels),
        source=replay_source(chain, items, str(images.dtype)),
        fitted_rows=fitted_rows(items),
    )


class Outputs(NamedTuple):
    """The outputs of the base and of candidates for n requests."""

    answers: Int[np.ndarray, " n"]
    classes: Int[np.ndarray, "candidates n"]
    scores: Float[np.ndarray, "candidates n"]  # never out of fold
    logits: Float[np.ndarray, "classes n"]  # of the base


def evaluate(
    chain: Chain,
    candidates: Iterable[Candidate],
    images: Shaped[np.ndarray, "n ..."] | Source,
    *,
    batch: int = 128,
    pause: Pause | None = None,
) -> Outputs:
    """Return the columns of a replay without a table: for requests that arrive in small parts, at least one at a time.

    Arguments and errors as for ``replay``; the candidates' final selectors score all rows.
    """
    images, items = open_images(chain, images), tuple(candidates)
    fold = np.zeros(len(images), np.int32)
    return _outputs(chain, items, _final_selectors(items), images, fold, batch=batch, pause=pause)


def _outputs(
    chain: Chain,
    items: tuple[Candidate, ...],
    selectors: tuple[PyTree, ...],
    images: Images,
    fold: Int[np.ndarray, " n"],
    *,
    batch: int,
    pause: Pause | None,
) -> Outputs:
    _check_batch(batch)
    pause, parts, n = pause or no_pause, [], len(images)
    size = rows_at_once(chain, batch)
    read = read_batches((images, fold), full_batches(n, size))
    for some, of_fold in logged(read, -(-n // size), "replaying"):
        parts.append(jax.device_get(_replay_batch(chain, items, selectors, some, of_fold)))
        pause()
    return Outputs(*(np.concatenate(columns, axis=-1)[..., :n] for columns in zip(*parts, strict=True)))


def _final_selectors(items: tuple[Candidate, ...]) -> tuple[PyTree, ...]:
    return tuple(jax.tree.map(lambda v: v[None], item.params["selector"]) for item in items)


def _unseen_fold(candidates: Candidates, rows: np.ndarray) -> Int[np.ndarray, " n"]:
    """Return for each row a selector that has not seen it: its fold's, or for a new row the last, fitted on all."""
    order = np.argsort(candidates.select_rows)
    known = candidates.select_rows[order]
    at = np.minimum(np.searchsorted(known, rows), len(known) - 1)
    leaves = jax.tree.leaves(candidates.fold_selectors)
    folds = leaves[0].shape[0] - 1 if leaves else 0  # selectors without parameters have seen nothing
    return np.where(known[at] == rows, candidates.select_fold[order][at], folds).astype(np.int32)


def replay_logits(
    chain: Chain, candidates: Iterable[Candidate], images: Shaped[np.ndarray, "n ..."] | Source, *, batch: int = 128
) -> Float[np.ndarray, "candidates n classes"]:
    """Return the logits of every candidate's predictor, for exit rules other than its selector's.

    Arguments as for ``replay``.

    Raises:
        InputError: No candidates, images that the chain does not take, or a batch of no rows.
    """
    images, items = open_images(chain, images), tuple(candidates)
    _check_batch(batch)
    if not (items and len(images)):
        raise InputError(f"candidates, images: expected at least one of each, got {len(items)} and {len(images)}")
    read = read_batches((images,), full_batches(len(images), rows_at_once(chain, batch)))
    parts = [np.asarray(_logits_batch(chain, items, some)) for (some,) in read]
    return np.concatenate(parts, axis=1)[:, : len(images)]


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise InputError(f"batch: expected 1 or more, got {batch}")


def _forward(chain: Chain, items: tuple[Candidate, ...], images: Array) -> tuple[Array, dict[str, Array]]:
    """Return the base's logits, and every predictor's by name."""
    sites, base_logits = chain.activations(chain.prepare(images))
    variables = {item.name: item.params["predictor"] for item in items}
    return base_logits, predict_all({item.name: item for item in items}, variables, sites)


@jax.jit
@reference
def _logits_batch(chain: Chain, items: tuple[Candidate, ...], images: Array) -> Float[Array, "candidates n classes"]:
    return jnp.stack(list(_forward(chain, items, images)[1].values()))


@jax.jit
@reference
def _replay_batch(
    chain: Chain, items: tuple[Candidate, ...], selectors: tuple[PyTree, ...], images: Array, fold: Int[Array, " batch"]
) -> tuple[Array, ...]:
    """Return one batch's columns of ``Outputs``; ``fold`` chooses each row's selector."""
    base_logits, logits = _forward(chain, items, images)
    answers = jnp.argmax(base_logits, -1)
    if not items:
        none = jnp.zeros((0, len(images)))
        return answers, none.astype(jnp.int32), none, base_logits.T
    scores = []
    for item, variables in zip(items, selectors, strict=True):
        if not jax.tree.leaves(variables):  # a selector without parameters
            scores.append(call(item.selector, variables, logits[item.name]))
            continue
        by_fold = jax.vmap(functools.partial(call, item.selector), (0, None))(variables, logits[item.name])
        scores.append(jnp.take_along_axis(by_fold, fold[None], axis=0)[0])  # of float[folds + 1, batch]
    classes = jnp.stack([jnp.argmax(logits[item.name], -1) for item in items])
    return answers, classes, jnp.stack(scores), base_logits.T
