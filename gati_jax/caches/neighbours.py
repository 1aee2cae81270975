"""Freeze Inference's caches, which answer from stored points (arXiv:2002.02645), as ordinary predictors.

A key network's hidden vector is the key of an activation. ``Neighbours`` looks up the k nearest stored keys,
``Centres`` the nearest of a few centres. Both return the logarithms of the paper's scores as logits: their ``argmax``
is the answer, and the largest, which ``Confidence`` reads, is the confidence.

Points are in the collection "points" beside the key network's "params". A row without a point has label -1 and an
infinite norm, hence an infinite distance.
"""

from collections.abc import Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gati_jax.errors import InputError
from gati_jax.pytrees import tree_bytes

from .candidate import Activation, Candidate, Logits, Width
from .predictors import flatten_channels_first, grid_average

Keys = Float[Array, "batch units"]
Points = Float[Array, "points units"]
Norms = Float[Array, " points"]
StoredKeys = Float[Array | np.ndarray, "n units"]
StoredLabels = Int[Array | np.ndarray, " n"]

NO_POINT = -1  # the label of a row without a point
MIB = 2**20  # the paper's MB
REPEAT = 1e-4  # of the key's length: nearer points count as repeats, which differ by rounding only
TINY = 1e-12  # a key may be zero
LEAST = 1e-30  # score of a label that no neighbour has; its logarithm stays finite
_COUNT_BYTES = 4  # a k-NN cache's "count", see ``stored_points``


def key_features(activation: Activation, cells: int | None) -> Float[Array, "batch features"]:
    """Return the key network's input: the flattened activation, or means over ``cells`` x ``cells`` fields of it."""
    return flatten_channels_first(activation) if cells is None else grid_average(activation, cells)


def squared_distances(keys: Keys, points: Points, norms: Norms) -> Float[Array, "batch points"]:
    """Return |a|^2 - 2ab + |b|^2 of keys a and points b; ``norms`` are |b|^2, or infinity for a row without a point.

    It is one matrix product, and clipped at 0, below which rounding can push it.
    """
    own = jnp.sum(keys**2, -1, keepdims=True)
    return jnp.maximum(own - 2 * keys @ points.T + norms[None], 0)


def nearest(keys: Keys, points: Points, norms: Norms, k: int) -> tuple[Int[Array, "batch k"], Float[Array, "batch k"]]:
    """Return the indices of the k nearest points, nearest first (ties in order of the index), and their distances.

    The matrix product finds them; their distances are then recomputed from differences, because the product's rounding
    errors are as large as the distance to a near repeat. No distance is 0: exact repeats count as near ones. Arguments
    as for ``squared_distances``.
    """
    _, index = jax.lax.top_k(-squared_distances(keys, points, norms), k)
    apart = jnp.linalg.norm(keys[:, None] - points[index], axis=-1)
    floor = REPEAT * jnp.linalg.norm(keys, axis=-1, keepdims=True) + TINY
    return index, jnp.where(jnp.isinf(norms[index]), jnp.inf, jnp.maximum(apart, floor))


def vote(labels: Int[Array, "batch k"], distances: Float[Array, "batch k"], classes: int) -> Logits:
    """Return the logarithm of the paper's score of every label i: (m_i / k) x the sum of 1 / distance of its m_i.

    A row without a point (label -1, infinite distance) has no vote.
    """
    of = jax.nn.one_hot(labels, classes)
    weight = jnp.sum(of / distances[..., None], 1)
    score = of.mean(1) * weight
    return jnp.log(jnp.maximum(score, LEAST))


class _Keyed(nn.Module):
    """Shared by both caches: the key network, which is the hidden layer of FC(units) or of its pooled variant."""

    def _nearest(
        self, activation: Activation, rows: int, units: int, cells: int | None, k: int
    ) -> tuple[Int[Array, "batch k"], Float[Array, "batch k"], Int[Array, "batch k"]]:
        """Return the indices, distances and labels of the k nearest of ``rows`` points; ``init`` makes no points."""
        key = nn.relu(nn.Dense(units, name="hidden")(key_features(activation, cells)))
        keys = self.variable("points", "keys", lambda: jnp.zeros((rows, units), jnp.float32))
        labels = self.variable("points", "labels", lambda: jnp.full(rows, NO_POINT, jnp.int32))
        norms = self.variable("points", "norms", lambda: jnp.full(rows, jnp.inf, jnp.float32))
        index, distances = nearest(key, keys.value, norms.value, k)
        return index, distances, labels.value[index]


class Neighbours(_Keyed):
    """The paper's k-NN cache."""

    classes: int
    points: Width
    """Rows."""
    k: Width = 50
    units: Width = 1024
    """Length of a key."""
    cells: Width | None = None
    """None for the paper's key of the flattened activation; c for a cheaper key of means over c x c fields."""

    @nn.compact
    def __call__(self, activation: Activation) -> Logits:
        """Return log-scores."""
        if self.k > self.points:
            raise InputError(f"k: expected at most the {self.points} points, got {self.k}")
        self.variable("points", "count", lambda: jnp.zeros((), jnp.int32))
        _, distances, labels = self._nearest(activation, self.points, self.units, self.cells, self.k)
        return vote(labels, distances, self.classes)


class Centres(_Keyed):
    """The paper's k-means cache: the nearest centre answers; confidence = share of its majority label / distance."""

    classes: int
    centres: Width = 100
    units: Width = 1024
    cells: Width | None = None
    """As in ``Neighbours``."""

    @nn.compact
    def __call__(self, activation: Activation) -> Logits:
        """Return log-confidences: the majority label's, and a negligible one for all others."""
        share = self.variable("points", "share", lambda: jnp.zeros(self.centres, jnp.float32))
        index, distances, labels = self._nearest(activation, self.centres, self.units, self.cells, 1)
        confidence = share.value[index] / distances
        return jnp.log(jnp.maximum(jax.nn.one_hot(labels[:, 0], self.classes) * confidence, LEAST))


def stored_points(keys: StoredKeys, labels: StoredLabels) -> dict[str, Array]:
    """Return the collection "points" of a k-NN cache; a label of -1 makes a row without a point.

    Its "count", the number of points, is not read by a lookup: it is part of the format of saved bundles.
    """
    return {**_rows(keys, labels), "count": jnp.int32(len(keys))}


def stored_centres(keys: StoredKeys, labels: StoredLabels, share: Float[Array | np.ndarray, " n"]) -> dict[str, Array]:
    """Return the collection "points" of a k-means cache.

    Args:
        keys: The centres.
        labels: Majority label of each centre's points; -1 for a centre without points, which is never the nearest.
        share: Share of its points that have the majority label.
    """
    return {**_rows(keys, labels), "share": jnp.asarray(share, jnp.float32)}


def _rows(keys: StoredKeys, labels: StoredLabels) -> dict[str, Array]:
    keys, labels = jnp.asarray(keys, jnp.float32), jnp.asarray(labels, jnp.int32)
    norms = jnp.where(labels == NO_POINT, jnp.inf, jnp.sum(keys**2, -1))
    return {"keys": keys, "labels": labels, "norms": norms}


def point_bytes(units: int) -> int:
    """Return the bytes of one stored point: its key, its label and its norm."""
    return 4 * units + 4 + 4


def points_within(budget: int, units: int) -> int:
    """Return the number of points of ``units`` values that a k-NN cache of ``budget`` bytes can hold."""
    return max(0, budget - _COUNT_BYTES) // point_bytes(units)


class CacheMemory(NamedTuple):
    """The bytes of one neighbour cache."""

    name: str
    site: int
    key_network: int
    points: int

    @property
    def total(self) -> int:
        """Key network and points, as freeze.json has it."""
        return self.key_network + self.points


def memory_report(candidates: Iterable[Candidate]) -> tuple[CacheMemory, ...]:
    """Return the memory of each neighbour cache, its key network included.

    Raises:
        InputError: A candidate is no neighbour cache.
    """
    rows = []
    for c in candidates:
        if not isinstance(c.predictor, Neighbours | Centres):
            raise InputError(f"candidates: expected neighbour caches, got {c.name}, a {type(c.predictor).__name__}")
        key_network = tree_bytes(c.params["predictor"]["params"]["hidden"])
        rows.append(CacheMemory(c.name, c.site, key_network, c.bytes - key_network))
    return tuple(rows)
