"""What is kept of the traffic: the latest requests, and a sample of all that came before.

Every request is kept, hit or miss, for those that missed are not like the others. Its base answer is known for free if
it missed, and if it was shadowed; of the rest the updater computes it later, and may write it down with ``answer``.
Requests have order numbers, 0 for the first: blocks by order are what certificates of later traffic need.

One thread adds, others read: a lock is held for short copies only.
"""

import dataclasses
import threading
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Int64, Shaped

from gati_jax.errors import InputError

REPEATED = -1


"""The exit of requests that the exact-repeat layer answered, in front of the network."""


POINTS = -2


"""The exit of requests that a stored point answered, in front of the network."""


class Observation(NamedTuple):
    """One served request, in the order of its answer."""

    exit: int
    """The site it left at; the base's depth for the base; ``REPEATED`` or ``POINTS`` in front."""
    score: float
    """The selector's score there; infinity from the base."""
    class_index: int
    """What the client got."""
    q: float
    """Probability, fixed before, with which its base answer is computed; 1 for a miss."""
    base_class: int | None
    """The base's answer where it is known: of every miss and of every shadowed hit."""


UNKNOWN = -1  # the base's answer, where nobody has computed it
_NOBODY = -1  # the order number of an empty row
_CHUNK = 512  # rows copied under the lock at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestLogConfig:
    """How much is kept."""

    recent: int = 20_000
    """The latest requests."""
    old: int = 5_000
    """A uniform sample of those before them (algorithm R; Vitter 1985)."""
    most_bytes: int = 512 * 2**20
    """That images may take."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            InputError: A number is out of its bounds.
        """
        if self.recent < 1 or self.old < 0:
            raise InputError(f"recent, old: expected at least 1 and 0, got {self.recent} and {self.old}")


class Block(NamedTuple):
    """Requests in their order."""

    order: Int64[np.ndarray, " n"]
    images: Shaped[np.ndarray, "n ..."]
    answers: Int32[np.ndarray, " n"]
    """Of the base; ``UNKNOWN`` where nobody has computed it."""
    front: Int32[np.ndarray, " n"]
    """What was answered in front of the network; ``UNKNOWN`` where nothing was."""


class RequestLog:
    """The kept requests; rows 0 .. recent - 1 are a ring, the others the sample."""

    def __init__(self, shape: tuple[int, ...], config: RequestLogConfig | None = None, *, dtype: str = "uint8") -> None:
        """Keep nothing yet.

        Args:
            shape: Of an image.
            config: How much to keep.
            dtype: Of images.

        Raises:
            InputError: So many images take more memory than they may.
        """
        self.config = config = config or RequestLogConfig()
        rows = config.recent + config.old
        size = rows * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if size > config.most_bytes:
            found = f"{rows} images of {list(shape)}, {size} bytes"
            raise InputError(f"most_bytes: expected room for all that is kept, got {config.most_bytes} for {found}")
        self._images = np.zeros((rows, *shape), dtype)
        self._order = np.full(rows, _NOBODY, np.int64)
        self._answers = np.full(rows, UNKNOWN, np.int32)
        self._front = np.full(rows, UNKNOWN, np.int32)
        self._row_of_old: dict[int, int] = {}
        self._random = np.random.default_rng(config.seed)
        self._lock = threading.Lock()
        self._count = 0

    @property
    def count(self) -> int:
        """How many requests have come; the next has this order number."""
        return self._count

    @property
    def oldest_recent(self) -> int:
        """From this order number on, nothing is missing."""
        return max(0, self._count - self.config.recent)

    def add(self, image: Shaped[np.ndarray, "..."], answer: int = UNKNOWN, front: int = UNKNOWN) -> int:
        """Keep a request and return its order number.

        Args:
            image: What was asked.
            answer: Of the base, if it is known.
            front: What was answered in front of the network, if anything was.
        """
        with self._lock:
            order, row = self._count, self._count % self.config.recent
            if order >= self.config.recent:
                self._sample(row)
            self._images[row], self._order[row], self._answers[row] = image, order, answer
            self._front[row] = front
            self._count += 1
        return order

    def _sample(self, row: int) -> None:
        """Offer the request that leaves the ring to the sample: the m-th is taken with probability old / m."""
        offered = int(self._order[row])  # m - 1, since requests leave the ring in their order
        place = offered if offered < self.config.old else int(self._random.integers(offered + 1))
        if place >= self.config.old:
            return
        to = self.config.recent + place
        self._row_of_old.pop(int(self._order[to]), None)
        for column in (self._images, self._order, self._answers, self._front):
            column[to] = column[row]
        self._row_of_old[offered] = to

    def answer(self, order: Int[np.ndarray, " n"], answers: Int[np.ndarray, " n"]) -> None:
        """Write down what the base says to requests, as far as they are still kept.

        Args:
            order: Their order numbers.
            answers: Of the base.
        """
        with self._lock:
            for number, answer in zip(order.tolist(), answers.tolist(), strict=True):
                row = self._row(number)
                if row is not None:
                    self._answers[row] = answer

    def _row(self, number: int) -> int | None:
        return number % self.config.recent if number >= self.oldest_recent else self._row_of_old.get(number)

    def recent(self, start: int, stop: int) -> Block:
        """Return the requests ``start`` .. ``stop - 1``, all of them.

        Raises:
            InputError: Some have not come yet, or are no longer kept.
        """
        block = self.kept(start, stop)
        if len(block.order) != stop - start or start < 0:
            found = f"{start} .. {stop} of {self.oldest_recent} .. {self._count}"
            raise InputError(f"block: expected requests that are all kept, got {found}")
        return block

    def kept(self, start: int, stop: int) -> Block:
        """Return what is kept of the requests ``start`` .. ``stop - 1``; old ones are a sample."""
        with self._lock:
            rows = np.flatnonzero((self._order >= start) & (self._order < stop) & (self._order != _NOBODY))
            rows = rows[np.argsort(self._order[rows])]
            wanted = self._order[rows]
        parts = [self._copy(rows[i : i + _CHUNK], wanted[i : i + _CHUNK]) for i in range(0, len(rows), _CHUNK)]
        if not parts:
            return self._copy(rows, wanted)
        return Block(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _copy(self, rows: Int64[np.ndarray, " m"], wanted: Int64[np.ndarray, " m"]) -> Block:
        """Copy rows but for those that have been overwritten meanwhile."""
        with self._lock:
            rows = rows[self._order[rows] == wanted]
            return Block(self._order[rows], self._images[rows], self._answers[rows], self._front[rows])

    def parts(self, *, select: int, gap: int) -> tuple[Block, Block]:
        """Return what to fit on, and the later contiguous block to select on.

        Args:
            select: The latest so many requests are to select on.
            gap: So many before them are left out: neighbours in time are alike.

        Raises:
            InputError: So many are not kept, or nothing is before them.
        """
        stop = self._count
        chosen = self.recent(stop - select, stop)
        fit = self.kept(0, stop - select - gap)
        if not len(fit.order):
            raise InputError(f"select, gap: expected fewer than the {stop} requests so far, got {select} and {gap}")
        return fit, chosen
