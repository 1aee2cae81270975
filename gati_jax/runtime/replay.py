"""Replay: what the base and all candidates say to every request, in the float32 reference arithmetic."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from gati_jax._digest import tree_digest
from gati_jax._errors import InputError
from gati_jax._linen import call
from gati_jax.caches import Candidate, predict_all
from gati_jax.data import check_distinct_rows, row_digests
from gati_jax.fitting import Candidates
from gati_jax.models import Chain, check_images
from gati_jax.planning import Origin, ReplayTable

from .numerics import reference


def replay(
    chain: Chain,
    candidates: Candidates | Iterable[Candidate],
    images: Shaped[np.ndarray, "n ..."],
    *,
    labels: Int[np.ndarray, " n"] | None = None,
    batch: int = 128,
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

    Raises:
        InputError: Images that the chain does not take, or that the predictors were fitted on.
    """
    images = check_images(chain, images)
    items = tuple(candidates)
    if batch < 1:
        msg = f"batch: expected 1 or more, got {batch}"
        raise InputError(msg)
    if len(images) == 0:
        msg = "images: expected at least one, got none"
        raise InputError(msg)
    rows = row_digests(images)
    if isinstance(candidates, Candidates):
        if str(images.dtype) != candidates.dtype:  # rows could not be told apart
            msg = f"images: expected {candidates.dtype}, as in the fit, got {images.dtype}"
            raise InputError(msg)
        check_distinct_rows(rows, candidates.fit_rows, names=("images", "fit"))
        selectors, fold = candidates.fold_selectors, _unseen_fold(candidates, rows)
    else:
        selectors = tuple(jax.tree.map(lambda v: v[None], item.params["selector"]) for item in items)
        fold = np.zeros(len(rows), np.int32)
    parts = []
    for start in range(0, len(images), batch):
        chunk, chunk_fold = images[start : start + batch], fold[start : start + batch]
        short = batch - len(chunk)  # a full last batch, by repetition: one shape, one program
        padded = np.concatenate([chunk, np.repeat(chunk[:1], short, axis=0)])
        part = _replay_batch(chain, items, selectors, padded, np.append(chunk_fold, np.zeros(short, np.int32)))
        parts.append([np.asarray(column)[..., : len(chunk)] for column in part])
    answers, classes, scores = (np.concatenate(columns, axis=-1) for columns in zip(*parts, strict=True))
    return ReplayTable(
        names=tuple(c.name for c in items),
        sites=tuple(c.site for c in items),
        depth=len(chain),
        answers=answers,
        classes=classes,
        scores=scores,
        rows=rows,
        labels=None if labels is None else np.asarray(labels),
        origin=origin(chain, items, str(images.dtype)),
    )


def origin(chain: Chain, candidates: Iterable[Candidate], dtype: str) -> Origin:
    """Say which parameters a replay was, or would be, computed from."""
    digests = tuple((c.name, tree_digest(c.params)) for c in candidates)
    return Origin(base=tree_digest(chain.params), candidates=digests, dtype=dtype)


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
    """
    images, items = check_images(chain, images), tuple(candidates)
    parts = []
    for start in range(0, len(images), batch):
        rows = images[start : start + batch]
        padded = np.concatenate([rows, np.repeat(rows[:1], batch - len(rows), axis=0)])
        parts.append(np.asarray(_logits_batch(chain, items, padded))[:, : len(rows)])
    return np.concatenate(parts, axis=1)


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
) -> tuple[Int[Array, " batch"], Int[Array, "candidates batch"], Float[Array, "candidates batch"]]:
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
    )
