"""Freeze Inference's caches: they answer from stored points (arXiv:2002.02645), behind the interface of learned ones.

The hidden vector of a key network stands for an activation. ``Neighbours`` asks the k nearest stored keys, ``Centres``
the nearest of a few centres. Both give the logarithms of the paper's scores as logits, so that their ``argmax`` is the
answer and the largest of them, read by ``Confidence``, the confidence.

Points lie in the collection "points" beside the key network's "params". Their number is fixed: new points of a cache
never recompile a program. A row that holds none has label -1 and an infinite norm, hence an infinite distance.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gati_jax.errors import InputError

from .candidate import Candidate
from .predictors import adaptive_average, flatten_channels_first

NO_POINT = -1  # the label of a row without a point
_REPEAT = 1e-4  # of the key's length: nearer ones are taken for repeats, which differ in rounding alone
_TINY = 1e-12  # a key may be zero
_LEAST = 1e-30  # score of a label that no neighbour has; its logarithm stays finite


class Confidence(nn.Module):
    """The largest logit as it is: for predictors whose logits are log-confidences. It has no parameters."""

    @nn.compact
    def __call__(self, logits: Float[Array, "batch classes"]) -> Float[Array, " batch"]:
        """Return scores."""
        return logits.max(-1)


def key_features(activation: Float[Array, "batch *site"], cells: int | None) -> Float[Array, "batch features"]:
    """Return what the key network sees: the flattened activation, or means over ``cells`` x ``cells`` fields of it."""
    if cells is None:
        return flatten_channels_first(activation)
    for axis in range(1, activation.ndim - 1):
        activation = adaptive_average(activation, min(cells, activation.shape[axis]), axis)
    return activation.reshape(activation.shape[0], -1)


def squared_distances(
    keys: Float[Array, "batch units"], points: Float[Array, "points units"], norms: Float[Array, " points"]
) -> Float[Array, "batch points"]:
    """Return |a|^2 - 2ab + |b|^2, one matrix product; rounding can push it below 0, where it is held.

    Args:
        keys: a.
        points: b.
        norms: |b|^2; infinity keeps a row away from everyone.
    """
    own = jnp.sum(keys**2, -1, keepdims=True)
    return jnp.maximum(own - 2 * keys @ points.T + norms[None], 0)


def nearest(
    keys: Float[Array, "batch units"],
    points: Float[Array, "points units"],
    norms: Float[Array, " points"],
    k: int,
) -> tuple[Int[Array, "batch k"], Float[Array, "batch k"]]:
    """Return the k nearest points, nearest first (the first of equal ones), and their distances.

    The matrix product finds them; their distances are then computed by differences, because the product's rounding
    errors are as large as the distance to a near repeat. No distance is 0: exact repeats are as far as near ones.
    """
    _, index = jax.lax.top_k(-squared_distances(keys, points, norms), k)
    apart = jnp.linalg.norm(keys[:, None] - points[index], axis=-1)
    floor = _REPEAT * jnp.linalg.norm(keys, axis=-1, keepdims=True) + _TINY
    return index, jnp.where(jnp.isinf(norms[index]), jnp.inf, jnp.maximum(apart, floor))


def vote(
    labels: Int[Array, "batch k"], distances: Float[Array, "batch k"], classes: int
) -> Float[Array, "batch classes"]:
    """Return the logarithm of the paper's score of every label i: (m_i / k) x the sum of 1 / distance of its m_i.

    What is no point (label -1, infinitely far) has no vote.
    """
    of = jax.nn.one_hot(labels, classes)
    weight = jnp.sum(of / distances[..., None], 1)
    score = of.mean(1) * weight
    return jnp.log(jnp.maximum(score, _LEAST))


class _Keyed(nn.Module):
    """What both caches share; the key network is the first layer of FC(units), or of its pooled variant."""

    def _key(
        self, activation: Float[Array, "batch *site"], units: int, cells: int | None
    ) -> Float[Array, "batch units"]:
        return nn.relu(nn.Dense(units, name="hidden")(key_features(activation, cells)))

    def _points(self, rows: int, units: int) -> tuple[Array, Array, Array]:
        """Return keys, labels and norms; ``init`` makes rows that hold no point."""
        empty = empty_points(rows, units)
        keys, labels, norms = (
            self.variable("points", name, lambda name=name: jnp.asarray(empty[name]))
            for name in ("keys", "labels", "norms")
        )
        return keys.value, labels.value, norms.value


class Neighbours(_Keyed):
    """The paper's k-NN cache; "points" also holds "count", how many were ever added, up to 2^31: see ``extend``."""

    classes: int
    points: int
    """Room for so many."""
    k: int = 50
    units: int = 1024
    cells: int | None = None
    """None for the paper's key of the flattened activation; c to average over c x c fields first, which is cheaper."""

    @nn.compact
    def __call__(self, activation: Float[Array, "batch *site"]) -> Float[Array, "batch classes"]:
        """Return log-scores."""
        if self.k > self.points:
            raise InputError(f"k: expected at most the {self.points} points, got {self.k}")
        key = self._key(activation, self.units, self.cells)
        keys, labels, norms = self._points(self.points, self.units)
        self.variable("points", "count", lambda: jnp.zeros((), jnp.int32))
        index, distances = nearest(key, keys, norms, self.k)
        return vote(labels[index], distances, self.classes)


class Centres(_Keyed):
    """The paper's k-means cache: the nearest centre answers; confidence = share of its majority label / distance."""

    classes: int
    centres: int = 100
    units: int = 1024
    cells: int | None = None
    """As in ``Neighbours``."""

    @nn.compact
    def __call__(self, activation: Float[Array, "batch *site"]) -> Float[Array, "batch classes"]:
        """Return log-confidences: the majority label's, and next to nothing for all others."""
        key = self._key(activation, self.units, self.cells)
        keys, labels, norms = self._points(self.centres, self.units)
        share = self.variable("points", "share", lambda: jnp.zeros(self.centres))
        index, distances = nearest(key, keys, norms, 1)
        confidence = share.value[index] / distances
        return jnp.log(jnp.maximum(jax.nn.one_hot(labels[index[:, 0]], self.classes) * confidence, _LEAST))


def empty_points(rows: int, units: int) -> dict[str, np.ndarray]:
    """Return the arrays of ``rows`` rows that hold no point."""
    return {
        "keys": np.zeros((rows, units), np.float32),
        "labels": np.full(rows, NO_POINT, np.int32),
        "norms": np.full(rows, np.inf, np.float32),
    }


def stored_points(
    keys: Float[Array | np.ndarray, "n units"], labels: Int[Array | np.ndarray, " n"], capacity: int
) -> dict[str, Array]:
    """Return the collection "points" of a k-NN cache with room for ``capacity``."""
    points = {name: jnp.asarray(rows) for name, rows in empty_points(capacity, keys.shape[1]).items()}
    return _added({**points, "count": jnp.zeros((), jnp.int32)}, keys, labels)


def stored_centres(
    keys: Float[Array | np.ndarray, "n units"],
    labels: Int[Array | np.ndarray, " n"],
    share: Float[Array | np.ndarray, " n"],
) -> dict[str, Array]:
    """Return the collection "points" of a k-means cache; a centre of label -1 is nobody's nearest."""
    keys, labels = jnp.asarray(keys, jnp.float32), jnp.asarray(labels, jnp.int32)
    norms = jnp.where(labels == NO_POINT, jnp.inf, jnp.sum(keys**2, -1))
    return {"keys": keys, "labels": labels, "norms": norms, "share": jnp.asarray(share, jnp.float32)}


def keys_of(candidate: Candidate, activation: Float[Array, "batch *site"]) -> Float[Array, "batch units"]:
    """Return the keys of activations, as the candidate's lookup computes them.

    Raises:
        InputError: The candidate is no neighbour cache.
    """
    predictor = candidate.predictor
    if not isinstance(predictor, Neighbours | Centres):
        raise InputError(f"candidate: expected a neighbour cache, got {candidate.name}, a {type(predictor).__name__}")
    hidden = candidate.params["predictor"]["params"]["hidden"]
    return nn.relu(key_features(activation, predictor.cells) @ hidden["kernel"] + hidden["bias"][None])


def extend(
    candidate: Candidate, keys: Float[Array | np.ndarray, "n units"], labels: Int[Array | np.ndarray, " labels"]
) -> Candidate:
    """Return the candidate with more points; shapes stay, so no program is compiled anew.

    Empty rows are filled first; then the oldest points make room, in the order in which they came.

    Args:
        candidate: A k-NN cache.
        keys: Of the new points, see ``keys_of``.
        labels: The base's answers to them, as many.

    Raises:
        InputError: Another kind of cache, keys of another length, not finite or too long, or labels that are no
            classes.
    """
    predictor = candidate.predictor
    if not isinstance(predictor, Neighbours):
        raise InputError(f"candidate: expected a k-NN cache, got {candidate.name}, a {type(predictor).__name__}")
    if keys.shape[1:] != (predictor.units,) or labels.shape != keys.shape[:1]:
        expected = f"[n, {predictor.units}] and n labels"
        raise InputError(f"keys: expected {expected}, got {list(keys.shape)} and labels of shape {list(labels.shape)}")
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sum(np.square(np.asarray(keys, np.float32)), -1)
    if not np.isfinite(norms).all():  # an infinite norm says that a row holds no point
        raise InputError("keys: expected values with a finite sum of squares, got NaN, infinity or too large ones")
    if bad := sorted(set(np.asarray(labels).tolist()) - set(range(predictor.classes))):
        raise InputError(f"labels: expected classes 0 to {predictor.classes - 1}, got {bad}")
    variables: dict[str, Any] = candidate.params["predictor"]
    grown = {**variables, "points": _added(variables["points"], keys, labels)}
    return dataclasses.replace(candidate, params={**candidate.params, "predictor": grown})


def _counted(count: int, capacity: int) -> int:
    """Return a count that int32 holds; where it starts over, the ring stays full and goes on where it is."""
    return count if count < 2**31 else capacity + count % capacity


def _added(
    points: dict[str, Array], keys: Float[Array | np.ndarray, "n units"], labels: Int[Array | np.ndarray, " n"]
) -> dict[str, Array]:
    """Write new points into the ring; of more than it holds, the last ones stay."""
    capacity, count = len(points["labels"]), int(points["count"])
    last = min(len(keys), capacity)
    new = jnp.asarray(keys[len(keys) - last :], jnp.float32)
    at = (count + len(keys) - last + np.arange(last)) % capacity
    return {
        "keys": points["keys"].at[at].set(new),
        "labels": points["labels"].at[at].set(jnp.asarray(labels[len(labels) - last :], jnp.int32)),
        "norms": points["norms"].at[at].set(jnp.sum(new**2, -1)),
        "count": jnp.int32(_counted(count + len(keys), capacity)),
    }


MIB = 2**20  # the paper's MB


COUNT_BYTES = 4  # a k-NN cache's own number of points


def point_bytes(units: int) -> int:
    """Return the bytes of one stored point: its key, its label and its norm."""
    return 4 * units + 4 + 4


def points_within(budget: int, units: int) -> int:
    """Return for how many points a k-NN cache has room in ``budget`` bytes, its count of them included."""
    return max(0, budget - COUNT_BYTES) // point_bytes(units)


class CacheMemory(NamedTuple):
    """The bytes of one neighbour cache."""

    name: str
    site: int
    key_network: int
    points: int

    @property
    def total(self) -> int:
        """Both."""
        return self.key_network + self.points


def memory_report(candidates: Iterable[Candidate]) -> tuple[CacheMemory, ...]:
    """Count the bytes of neighbour caches, key networks included.

    Two caches at one site may share a key network; each is charged with it, as if it stood alone.

    Raises:
        InputError: A candidate is no neighbour cache.
    """
    rows = []
    for c in candidates:
        if not isinstance(c.predictor, Neighbours | Centres):
            raise InputError(f"candidates: expected neighbour caches, got {c.name}, a {type(c.predictor).__name__}")
        hidden = c.params["predictor"]["params"]["hidden"]
        key_network = sum(leaf.size * leaf.dtype.itemsize for leaf in hidden.values())
        rows.append(CacheMemory(c.name, c.site, key_network, c.bytes - key_network))
    return tuple(rows)


class PublishedMemory(NamedTuple):
    """One figure of the paper, and what arithmetic gives."""

    what: str
    published_mb: float | None
    """None where the paper leaves it out."""
    arithmetic: str
    bytes: int

    @property
    def mb(self) -> float:
        """Of 2^20 bytes: only then do the published figures come out."""
        return self.bytes / MIB


def published_memory(
    shapes: Sequence[Sequence[int]], *, points: int = 40_000, units: int = 1024, centres: int = 100
) -> tuple[PublishedMemory, ...]:
    """Return the paper's memory table beside the arithmetic.

    Args:
        shapes: Of the activation behind every block of the paper's ResNet-18, 32x32x64 to 4x4x512.
        points: Stored; the published figures come out for the 35,000 and the 5,000 images together.
        units: Of a key.
        centres: Of a k-means cache.
    """
    blocks, numbers = len(shapes), sum(math.prod(shape) for shape in shapes)
    return (
        PublishedMemory(
            "raw k-NN",
            37_500.0,
            f"{points:,} points x {numbers:,} numbers in all blocks x 4 bytes",
            points * numbers * 4,
        ),
        PublishedMemory(
            "reduced k-NN",
            2_500.0,
            f"{points:,} points x {units:,} numbers x {blocks} blocks x 8 bytes",
            points * units * blocks * 8,
        ),
        PublishedMemory(
            "k-means",
            12.5,
            f"{centres:,} centres x {units:,} numbers x {blocks} blocks x 8 bytes",
            centres * units * blocks * 8,
        ),
        PublishedMemory(
            "k-means, ResNet-50",
            25.0,
            f"{centres:,} centres x {units:,} numbers x {2 * blocks} blocks x 8 bytes",
            centres * units * 2 * blocks * 8,
        ),
        PublishedMemory(
            "key networks",
            None,
            f"{numbers:,} numbers in all blocks x {units:,} units x 4 bytes",
            numbers * units * 4,
        ),
    )
