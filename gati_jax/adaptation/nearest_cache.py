"""Freeze's stored points, grown with the traffic: a cache in front of the network, on the host, that needs no training.

A point is a request that the base has answered: its key, the pixels averaged over small fields; the base's answer; and
the base's margin, by how much its largest logit led. A request is answered by its nearest point. How far from a point
does its answer hold? As far as the margin lasts: logits move with the image, and a point near a boundary between
classes says little of its neighbours. So the score is log(margin / distance). On video, where requests nearly repeat
and the base itself wavers, that finds far more to answer at the same disagreement than the distance alone.

Only answers of the base are stored, never what a point answered: errors do not spread. One thread uses it.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Int64, Shaped

from gati_jax.errors import InputError

_NOTHING = -1  # the class of an empty row
_MOST_CHANCES = 3  # rounds of the hand that a point outlives unasked
_REPEAT = 0.01  # grey levels: a repeat is as far as this, so that no score is infinite
_MOST_CELLS = 16
_SMALLEST_MARGIN = 1e-6  # logits: a tie


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearestCacheConfig:
    """How many points there are, and what they are known by."""

    capacity: int = 2000
    """NearestCache."""
    cells: int | None = None
    """Keys average pixels over cells x cells fields; fewer are looked up faster, and tell less apart. None: as many as
    divide height and width, up to 16."""
    radius: float = 12.0
    """Grey levels, in root mean square over a key: beyond it no point says anything, whatever its margin. Of 2,000
    unrelated photographs (CIFAR-10) the nearest is hardly ever nearer than 20."""

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            InputError: A number is out of its bounds.
        """
        if self.capacity < 1 or (self.cells is not None and self.cells < 1):
            found = f"{self.capacity} and {self.cells}"
            raise InputError(f"capacity, cells: expected 1 or more of each, got {found}")
        if not self.radius > 0:
            raise InputError(f"radius: expected more than 0, got {self.radius}")


class Match(NamedTuple):
    """What the points say to each of n requests."""

    class_index: Int32[np.ndarray, " n"]
    """Of the nearest point; -1 where there is none at all."""
    score: Float32[np.ndarray, " n"]
    """log(margin / distance), the distance in root mean square grey levels; -inf with no point within the radius."""
    point: Int64[np.ndarray, " n"]
    """Its row, for ``used``."""


class NearestCache:
    """The latest points, and those often asked, in rows that are never moved."""

    def __init__(self, shape: tuple[int, int, int], base: str, config: NearestCacheConfig | None = None) -> None:
        """Know nothing yet.

        Args:
            shape: Of an image: height, width, channels.
            base: Which base is served: a digest of its parameters.
            config: How many points.

        Raises:
            InputError: The image does not divide into so many fields.
        """
        self.config = config = config or NearestCacheConfig()
        height, width, channels = shape
        divisors = [d for d in range(1, _MOST_CELLS + 1) if not (height % d or width % d)]
        self._cells = cells = config.cells or divisors[-1]
        if height % cells or width % cells:
            raise InputError(f"cells: expected a divisor of {height} and {width}, got {cells}")
        self.base, self._shape = base, shape
        self._keys = np.zeros((config.capacity, cells**2 * channels), np.float32)
        self._norms = np.zeros(config.capacity, np.float32)
        self._classes = np.full(config.capacity, _NOTHING, np.int32)
        self._margins = np.zeros(config.capacity, np.float32)
        self._chances = np.zeros(config.capacity, np.int8)
        self._size = self._hand = 0

    def __len__(self) -> int:
        """Return how many points there are."""
        return self._size

    def keys(self, images: Shaped[np.ndarray, "n h w c"]) -> Float32[np.ndarray, "n features"]:
        """Return what images are known by; keys of equal scale whatever the number of fields.

        Args:
            images: uint8, or of any other dtype in grey levels.
        """
        n, (height, width, channels), cells = len(images), self._shape, self._cells
        fields = images.reshape(n, cells, height // cells, cells, width // cells, channels)
        means = fields.mean((2, 4), dtype=np.float32).reshape(n, cells * cells * channels)
        return means * np.float32(1 / np.sqrt(means.shape[1]))  # so a distance is a root mean square

    def ask(self, keys: Float32[np.ndarray, "n features"]) -> Match:
        """Return what the nearest points say.

        A matrix product finds the nearest; its distance is then computed by differences, because rounding in the
        product is as large as the distance of a near repeat.
        """
        n = len(keys)
        if not self._size:
            return Match(np.full(n, _NOTHING, np.int32), np.full(n, -np.inf, np.float32), np.zeros(n, np.int64))
        nearest = np.argmin(self._norms[: self._size, None] - 2 * (self._keys[: self._size] @ keys.T), axis=0)
        apart = np.sqrt(np.square(keys - self._keys[nearest]).sum(1))
        score = np.log(self._margins[nearest] / (apart + np.float32(_REPEAT)))
        near = apart <= self.config.radius
        return Match(self._classes[nearest], np.where(near, score, np.float32(-np.inf)), nearest)

    def used(self, point: int) -> None:
        """Say that a point has answered: it outlives others that nobody asks.

        Args:
            point: See ``Match``.
        """
        self._chances[point] = min(_MOST_CHANCES, self._chances[point] + 1)

    def add(self, key: Float32[np.ndarray, " features"], logits: Float[np.ndarray, " classes"], *, base: str) -> None:
        """Store what the base answered; an answer of another base than the served one came too late, and is dropped.

        Args:
            key: Of the request.
            logits: Of the base.
            base: Which base answered.
        """
        if base != self.base or not np.isfinite(key).all() or not np.isfinite(logits).all():
            return
        row = self._row()
        largest = np.partition(logits, -2)[-2:]
        self._keys[row], self._norms[row] = key, np.square(key).sum()
        self._classes[row] = np.argmax(logits)
        self._margins[row] = max(_SMALLEST_MARGIN, largest[1] - largest[0])
        self._chances[row] = 0

    def _row(self) -> int:
        """Return an empty row, or that of the oldest point without a chance.

        The hand takes a chance from each point that it passes, and so goes round at most ``_MOST_CHANCES`` times.
        """
        if self._size < self.config.capacity:
            self._size += 1
            return self._size - 1
        while self._chances[self._hand]:
            self._chances[self._hand] -= 1
            self._hand = (self._hand + 1) % self._size
        row = self._hand
        self._hand = (row + 1) % self._size
        return row

    def serve(self, base: str) -> None:
        """Forget all points, if from now on another base is served; other caches on the same base change nothing."""
        if base != self.base:
            self.base = base
            self._size = self._hand = 0


def threshold_for(
    scores: Float[np.ndarray, " n"], wrong: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"], *, risk: float
) -> float:
    """Return the lowest threshold at which the points would have disagreed on a share ``risk`` of requests.

    The share is of all requests, hits or not, and reckons with one more that disagrees with the largest weight:
    conformal risk control (Angelopoulos et al., arXiv:2208.02814). It holds on average for requests like these; a
    certificate it is not.

    Args:
        scores: Of requests whose base answer is known.
        wrong: Where the nearest point disagrees with it.
        weights: 1 / the probability with which the base answer was to be known: 1 for misses, 1 / q for shadowed hits.
        risk: At most so large a share.

    Returns:
        Infinity where none is high enough.
    """
    if not len(scores):
        return np.inf
    order = np.argsort(-scores, kind="stable")
    ranked, most = scores[order], weights.max()
    share = (np.cumsum((weights * wrong)[order]) + most) / (weights.sum() + most)
    last = np.append(ranked[1:] < ranked[:-1], True)  # equal scores hit together
    allowed = np.flatnonzero((share <= risk) & last & np.isfinite(ranked))
    return float(ranked[allowed[-1]]) if len(allowed) else np.inf
