"""The request log: the latest requests, hits and misses alike, from which trials and refits take their rows.

Requests have order numbers, 0 for the first. One thread adds, others read: the lock is held for short copies only.
"""

import dataclasses
import threading
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from gati_jax.errors import InputError
from gati_jax.options import Count, check_options

EXACT = -1
"""The exit of requests that the exact cache answered, in front of the network."""
NEAREST = -2
"""The exit of requests that the nearest cache answered, in front of the network."""
UNKNOWN = -1  # a class, where there is none
LOST = -2
"""In place of the base's class: the request was to be shadowed, but its shadow was lost."""
_CHUNK = 512  # rows copied under the lock at once


class Observation(NamedTuple):
    """One served request, in the order of the answers."""

    exit: int
    """The site it left at, the base's depth for the base, ``EXACT`` or ``NEAREST`` for the input cache."""
    score: float
    """The selector's score there; infinity from the base."""
    class_index: int
    """The answer that the client got."""
    q: float
    """Probability, fixed before the request, with which its base answer is computed; 1 for a miss."""
    base_class: int | None
    """The base's answer where it is known: for every miss and every shadowed hit; ``LOST`` equals no class."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLogConfig:
    """How many requests are kept."""

    recent: Count = 20_000
    """The latest requests; fewer where their images would take more than ``most_bytes``."""
    most_bytes: int = 512 * 2**20
    """Memory for images."""

    def __post_init__(self) -> None:
        """Check the range."""
        check_options(self)


class Block(NamedTuple):
    """Logged requests in their order."""

    order: Int64[np.ndarray, " n"]
    images: UInt8[np.ndarray, "n ..."]
    cached: Int32[np.ndarray, " n"]
    """What the input cache answered; ``UNKNOWN`` where the network did."""


class RequestLog:
    """A ring buffer of requests."""

    def __init__(self, shape: tuple[int, ...], config: RequestLogConfig | None = None) -> None:
        """Allocate an empty log of uint8 images of this shape.

        Raises:
            InputError: Not even one image fits into ``config.most_bytes``.
        """
        config = config or RequestLogConfig()
        image_bytes = int(np.prod(shape, dtype=np.int64))
        if image_bytes > config.most_bytes:
            found = f"{config.most_bytes} for images of {list(shape)}"
            raise InputError(f"most_bytes: expected room for one image, {image_bytes} bytes, got {found}")
        self.capacity = min(config.recent, config.most_bytes // image_bytes)
        """Requests that are kept at most."""
        self._images = np.zeros((self.capacity, *shape), np.uint8)
        self._cached = np.full(self.capacity, UNKNOWN, np.int32)
        self._lock = threading.Lock()
        self._count = 0

    @property
    def count(self) -> int:
        """Requests so far; the next one gets this order number."""
        return self._count

    @property
    def oldest(self) -> int:
        """The order number of the oldest request that is kept."""
        return max(0, self._count - self.capacity)

    def add(self, image: UInt8[np.ndarray, "..."], cached: int = UNKNOWN) -> int:
        """Log a request, with the class that the input cache answered, if it did; return its order number."""
        with self._lock:
            order, row = self._count, self._count % self.capacity
            self._images[row], self._cached[row] = image, cached
            self._count += 1
        return order

    def recent(self, start: int, stop: int) -> Block:
        """Return the requests ``start`` .. ``stop - 1``, all of them.

        Raises:
            InputError: Some have not come yet, or are no longer kept.
        """
        block = self.kept(start, stop)
        if len(block.order) != stop - start or start < 0:
            found = f"{start} .. {stop} of {self.oldest} .. {self._count}"
            raise InputError(f"block: expected requests that are all kept, got {found}")
        return block

    def kept(self, start: int, stop: int) -> Block:
        """Return those of the requests ``start`` .. ``stop - 1`` that are still kept as they are copied."""
        stop = min(stop, self._count)
        begins = range(max(start, self.oldest), stop, _CHUNK)
        parts = [self._copy(begin, min(begin + _CHUNK, stop)) for begin in begins] or [self._copy(0, 0)]
        return Block(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _copy(self, start: int, stop: int) -> Block:
        with self._lock:
            order = np.arange(max(start, self.oldest), stop)
            rows = order % self.capacity
            return Block(order, self._images[rows], self._cached[rows])
