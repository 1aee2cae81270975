"""Which points a k-NN cache keeps when it may not keep all of them."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gati_jax.caches import nearest, squared_distances, vote
from gati_jax.errors import InputError

Choice = Literal["random", "condensed", "spread"]
_ROUNDS = 4
_ROWS = 512  # of a matrix of distances at a time


def choose_points(
    keys: Float[np.ndarray, "n units"],
    labels: Int[np.ndarray, " n"],
    size: int,
    *,
    k: int,
    classes: int,
    how: Choice = "random",
    seed: int = 0,
) -> Int[np.ndarray, " size"]:
    """Return the rows to keep, rising.

    - "random": the same number of every class, as far as it has them.
    - "condensed": half of them so; then, in four rounds, those that a cache of the points so far gets wrong, the
      surest errors first; random ones where there are not enough errors.
    - "spread": of every class, one after another the point that is farthest from those already kept (k-centre).

    Args:
        keys: Of all points.
        labels: The base's answers to them.
        size: How many to keep.
        k: Neighbours that the cache asks; "condensed" asks them, too.
        classes: Of the base.
        how: See above; docs/freeze.md has a measurement, in which random ones were the best or as good.
        seed: Draws whatever is drawn.

    Raises:
        InputError: Not between 1 and n points, or an unknown way.
    """
    if not 1 <= size <= len(keys):
        raise InputError(f"points: expected 1 to {len(keys)}, got {size}")
    rng = np.random.default_rng(seed)
    shares = _shares(np.bincount(labels, minlength=classes), size)
    if how == "random":
        chosen = _random(labels, shares, rng)
    elif how == "condensed":
        chosen = _condensed(keys, labels, size, k, classes, rng)
    elif how == "spread":
        rows = [np.flatnonzero(labels == label) for label in range(classes)]
        parts = [_spread(keys[r], share) for r, share in zip(rows, shares.tolist(), strict=True)]
        chosen = np.concatenate([r[part] for r, part in zip(rows, parts, strict=True)])
    else:
        raise InputError(f"choice: expected random, condensed or spread, got {how!r}")
    return np.sort(chosen)


def _shares(counts: Int[np.ndarray, " classes"], size: int) -> Int[np.ndarray, " classes"]:
    """Share ``size`` equally among classes; what a small one cannot use goes to the others."""
    shares = np.zeros_like(counts)
    while (rest := size - int(shares.sum())) > 0:
        open_ = np.flatnonzero(shares < counts)
        each = rest // len(open_)
        extra = each or np.arange(len(open_)) < rest
        shares[open_] = np.minimum(counts[open_], shares[open_] + extra)
    return shares


def _random(
    labels: Int[np.ndarray, " n"], shares: Int[np.ndarray, " classes"], rng: np.random.Generator
) -> Int[np.ndarray, " size"]:
    parts = [rng.choice(np.flatnonzero(labels == i), share, replace=False) for i, share in enumerate(shares)]
    return np.concatenate(parts)


def _condensed(
    keys: Float[np.ndarray, "n units"],
    labels: Int[np.ndarray, " n"],
    size: int,
    k: int,
    classes: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, " size"]:
    counts = np.bincount(labels, minlength=classes)
    kept = _random(labels, _shares(counts, min(size, max(k, size // 2))), rng)
    for i in range(_ROUNDS):
        rest = np.setdiff1d(np.arange(len(keys)), kept)
        room = (size - len(kept)) // (_ROUNDS - i)
        if room == 0 or len(rest) == 0:
            continue
        scores = _scores(keys[rest], keys[kept], labels[kept], min(k, len(kept)), classes)
        wrong = scores.argmax(1) != labels[rest]
        order = np.argsort(-np.where(wrong, scores.max(1), -np.inf), kind="stable")
        kept = np.concatenate([kept, rest[order[: min(room, int(wrong.sum()))]]])
    rest = np.setdiff1d(np.arange(len(keys)), kept)
    return np.concatenate([kept, rng.choice(rest, size - len(kept), replace=False)])


def _scores(
    keys: Float[np.ndarray, "n units"],
    points: Float[np.ndarray, "points units"],
    labels: Int[np.ndarray, " points"],
    k: int,
    classes: int,
) -> Float[np.ndarray, "n classes"]:
    """Return what a k-NN cache of these points says to keys, a few rows at a time."""
    at, norms, of = jnp.asarray(points), jnp.sum(jnp.asarray(points) ** 2, -1), jnp.asarray(labels)

    @jax.jit
    def said(rows: Array, at: Array, norms: Array, of: Array) -> Array:
        index, distances = nearest(rows, at, norms, k)
        return vote(of[index], distances, classes)

    parts = [np.asarray(said(keys[i : i + _ROWS], at, norms, of)) for i in range(0, len(keys), _ROWS)]
    return np.concatenate(parts)


def _spread(keys: Float[np.ndarray, "n units"], size: int) -> Int[np.ndarray, " size"]:
    if size == 0:
        return np.zeros(0, int)
    return np.asarray(_farthest(jnp.asarray(keys), size))


@functools.partial(jax.jit, static_argnames="size")
def _farthest(keys: Float[Array, "n units"], size: int) -> Int[Array, " size"]:
    """Return the point nearest to the mean, and then always the one farthest from all those before."""
    norms = jnp.sum(keys**2, -1)
    first = jnp.argmin(squared_distances(keys.mean(0)[None], keys, norms)[0])

    def follow(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        chosen, distance = carry
        at = chosen[i - 1]
        distance = jnp.minimum(distance, squared_distances(keys[at][None], keys, norms)[0]).at[at].set(-jnp.inf)
        return chosen.at[i].set(jnp.argmax(distance)), distance

    start = jnp.zeros(size, jnp.int32).at[0].set(first), jnp.full(len(keys), jnp.inf)
    return jax.lax.fori_loop(1, size, follow, start)[0]
