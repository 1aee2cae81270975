"""The input cache, in front of the network: exact repeats first, then the nearest stored input.

Both store answers of the base alone, never what a cache answered, so errors do not spread. The exact cache needs no
trial, for its answers are the base's own. The nearest cache answers once a trial has shown from which score on it may
(see ``trials.NearestTrial``); until then it is only asked and filled.

**The nearest cache** is Freeze's: it needs no training and grows with the traffic. An entry is a request that the base
has answered: its key (the pixels averaged over a grid of cells), the base's class, and the base's margin, by which its
largest logit led. Logits move with the image, so an entry's answer holds the farther away the larger its margin is: the
score is log(margin / distance). On video, where requests nearly repeat and the base itself wavers, that finds far more
to answer at the same disagreement than the distance alone.
"""

import collections
import dataclasses
import hashlib
import math
import secrets
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32, Int64, Shaped
from pydantic import Field

from gati_jax.errors import InputError
from gati_jax.options import Count, check_options

from .request_log import EXACT, NEAREST, Observation

_DIGEST_BYTES = 16
_NO_CLASS = -1
_MOST_CHANCES = 3  # times that the clock's hand passes an entry that is not asked any more before it is replaced
_SMALLEST_DISTANCE = 0.01  # grey levels, added to every distance, so that no score is infinite
_MOST_CELLS = 16
_SMALLEST_MARGIN = 1e-6  # logits: a tie


# --- Exact repeats ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactCacheConfig:
    """Size and lifetime of the exact cache."""

    capacity: Count = 100_000
    """Inputs, about 200 bytes each; beyond it, the least recently asked ones are forgotten."""
    seconds: Annotated[float, Field(gt=0)] = 3600.0
    """Lifetime of an answer from when the base gave it, however often it was asked for."""
    often: Count = 2
    """An unknown input is frequent once asked this many times: the base then answers it, so that it is known."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_options(self)


class Known(NamedTuple):
    """What the exact cache knows of a request."""

    class_index: int | None
    """The base's answer; None where it is not known, or no longer."""
    frequent: bool
    """The answer is not known and worth knowing: the base, not a cache, should answer this request."""


@dataclasses.dataclass(slots=True)
class _Input:
    asked: int = 0
    class_index: int | None = None
    until: float = 0.0


class ExactCache:
    """Answers by the inputs' keyed hashes, least recently asked first."""

    # An OrderedDict and not cachetools: its TLRUCache would forget with an answer how often the input was asked for,
    # and keeps three more containers per entry; its LRUCache would replace the two lines of ``_latest`` alone.

    def __init__(self, config: ExactCacheConfig | None = None) -> None:
        """Start empty."""
        self.config = config or ExactCacheConfig()
        self._secret = secrets.token_bytes(_DIGEST_BYTES)  # so that no client can prepare a collision
        self._inputs: collections.OrderedDict[bytes, _Input] = collections.OrderedDict()

    def __len__(self) -> int:
        """Return how many inputs are remembered, answered or not."""
        return len(self._inputs)

    def key(self, image: Shaped[np.ndarray, "..."]) -> bytes:
        """Return an input's hash: of its dtype, shape and values."""
        form = f"{image.dtype.str}{image.shape}".encode()
        digest = hashlib.blake2b(form, digest_size=_DIGEST_BYTES, key=self._secret)
        digest.update(np.ascontiguousarray(image).data)
        return digest.digest()

    def ask(self, key: bytes, now: float) -> Known:
        """Return what is known of an input, and count that it was asked for; ``now`` is in seconds of any clock."""
        entry = self._latest(key)
        entry.asked += 1
        if entry.class_index is not None and now < entry.until:
            return Known(entry.class_index, frequent=False)
        entry.class_index = None
        return Known(None, frequent=entry.asked >= self.config.often)

    def store(self, key: bytes, class_index: int, now: float) -> None:
        """Store an answer of the base."""
        entry = self._latest(key)
        entry.class_index, entry.until = class_index, now + self.config.seconds

    def _latest(self, key: bytes) -> _Input:
        """Return an input's entry, old or new, as the most recent; drop the least recent one of too many."""
        entry = self._inputs.setdefault(key, _Input())
        self._inputs.move_to_end(key)
        if len(self._inputs) > self.config.capacity:
            self._inputs.popitem(last=False)
        return entry


# --- Near repeats -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearestCacheConfig:
    """Size and keys of the nearest cache."""

    capacity: Count = 2000
    """Entries."""
    cells: Annotated[int | None, Field(ge=1)] = None
    """Keys average pixels over cells x cells fields; fewer are looked up faster and tell less apart. None: as many as
    divide height and width, up to 16."""
    radius: Annotated[float, Field(gt=0)] = 12.0
    """Grey levels, in root mean square over a key: beyond it no entry answers, whatever its margin. Of 2,000 unrelated
    photographs (CIFAR-10) the nearest is hardly ever nearer than 20."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_options(self)


class Match(NamedTuple):
    """The nearest entries of n requests."""

    class_index: Int32[np.ndarray, " n"]
    """-1 where there is no entry at all."""
    score: Float32[np.ndarray, " n"]
    """log(margin / distance), the distance in root mean square grey levels; -inf with no entry within the radius."""
    entry: Int64[np.ndarray, " n"]
    """Its row, for ``used``."""
    changes: int = 0
    """``NearestCache.changes`` as the lookup began."""


class NearestCache:
    """The latest entries, and those that answer often, in rows that are never moved."""

    def __init__(self, shape: tuple[int, int, int], config: NearestCacheConfig | None = None) -> None:
        """Start empty.

        Raises:
            InputError: An image of this height, width and channels does not divide into so many cells.
        """
        self.config = config = config or NearestCacheConfig()
        height, width, channels = shape
        divisors = [d for d in range(1, _MOST_CELLS + 1) if not (height % d or width % d)]
        self._cells = cells = config.cells or divisors[-1]
        if height % cells or width % cells:
            raise InputError(f"cells: expected a divisor of {height} and {width}, got {cells}")
        self._shape = shape
        self._keys = np.zeros((config.capacity, cells**2 * channels), np.float32)
        self._norms = np.zeros(config.capacity, np.float32)
        self._classes = np.full(config.capacity, _NO_CLASS, np.int32)
        self._margins = np.full(config.capacity, _SMALLEST_MARGIN, np.float32)
        self._chances = np.zeros(config.capacity, np.int8)
        self._size = self._hand = 0
        self.changes = 0
        """Odd while an entry is written; a lookup that began and ended at the same even number has read whole rows."""

    def __len__(self) -> int:
        """Return the number of entries."""
        return self._size

    def keys(self, images: Shaped[np.ndarray, "n h w c"]) -> Float32[np.ndarray, "n features"]:
        """Return the keys of images in grey levels; of equal scale whatever the number of cells."""
        n, (height, width, channels), cells = len(images), self._shape, self._cells
        fields = images.reshape(n, cells, height // cells, cells, width // cells, channels)
        means = fields.mean((2, 4), dtype=np.float32).reshape(n, cells * cells * channels)
        return means * np.float32(1 / np.sqrt(means.shape[1]))  # so a distance is a root mean square

    def ask(self, keys: Float32[np.ndarray, "n features"]) -> Match:
        """Look up the nearest entries.

        A matrix product finds them; their distances are then computed by differences, because rounding in the product
        is as large as the distance of a near repeat. Another thread may store entries meanwhile: see ``confirm``.
        """
        n, changes, size = len(keys), self.changes, self._size
        if not size:
            return Match(np.full(n, _NO_CLASS, np.int32), np.full(n, -np.inf, np.float32), np.zeros(n, int), changes)
        nearest = np.argmin(self._norms[:size, None] - 2 * (self._keys[:size] @ keys.T), axis=0)
        apart = np.sqrt(np.square(keys - self._keys[nearest]).sum(1))
        score = np.log(self._margins[nearest] / (apart + np.float32(_SMALLEST_DISTANCE)))
        near = apart <= self.config.radius
        return Match(self._classes[nearest], np.where(near, score, np.float32(-np.inf)), nearest, changes)

    def confirm(self, keys: Float32[np.ndarray, "n features"], found: Match) -> Match:
        """Return what a lookup finds now: the same, unless entries have been stored since it began.

        Called where nothing else changes the cache, while ``ask`` may run beside the thread that does.
        """
        return found if found.changes == self.changes else self.ask(keys)

    def used(self, entry: int) -> None:
        """Count an answer of an entry: it outlives others that are not asked."""
        self._chances[entry] = min(_MOST_CHANCES, self._chances[entry] + 1)

    def add(self, key: Float32[np.ndarray, " features"], logits: Float[np.ndarray, " classes"]) -> None:
        """Store the base's logits for a key, unless either is not finite."""
        if not np.isfinite(key).all() or not np.isfinite(logits).all():
            return
        self.changes += 1
        row = self._row()
        largest = np.partition(logits, -2)[-2:]
        self._keys[row], self._norms[row] = key, np.square(key).sum()
        self._classes[row] = np.argmax(logits)
        self._margins[row] = max(_SMALLEST_MARGIN, largest[1] - largest[0])
        self._chances[row] = 0
        self._size = max(self._size, row + 1)
        self.changes += 1

    def _row(self) -> int:
        """Return an empty row, or that of the oldest entry without a chance (the clock algorithm)."""
        if self._size < self.config.capacity:
            return self._size
        while self._chances[self._hand]:  # goes round at most _MOST_CHANCES times
            self._chances[self._hand] -= 1
            self._hand = (self._hand + 1) % self._size
        row = self._hand
        self._hand = (row + 1) % self._size
        return row


# --- Both -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way, and what the input cache knows of it."""

    number: int
    """In the order in which requests came."""
    image: Shaped[np.ndarray, "..."]
    q: float
    """The probability with which it is shadowed if it hits; fixed before it came."""
    shadow: bool
    """The outcome of that coin, whatever answers."""
    search: bool
    """Whether the nearest cache is asked, too; what the base answers is stored all the same."""
    version: int
    """The monitor's as it came: what an older cascade has answered says nothing about the present one."""
    observation: Observation | None = None
    """The answer that the client got, once there is one."""
    complete: bool = False
    """Whether there is no more to come: an answer, with the base's where it is shadowed, or the request is lost."""
    key: bytes = b""
    features: Float32[np.ndarray, " features"] | None = None
    nearest_class: int = _NO_CLASS
    nearest_score: float = math.nan
    """NaN where the nearest cache was not asked."""
    cached: Observation | None = None
    """The answer, if the input cache has one; its exit is ``EXACT`` or ``NEAREST``."""
    frequent: bool = False
    """Whether the base is to answer, see ``Known``."""


class InputCache:
    """An exact and a nearest cache, each of which may be left out.

    A request's images go through ``keys``, ``ask_exact``, ``search`` and ``resolve``. The first and the third compute
    much and change no state, so that a server can call them without its lock; the others are short.
    """

    def __init__(self, exact: ExactCache | None, nearest: NearestCache | None) -> None:
        """Start with the nearest cache closed."""
        self.exact, self.nearest = exact, nearest
        self.threshold = math.inf
        """Score from which on the nearest cache answers."""

    def keys(self, images: Shaped[np.ndarray, "n ..."]) -> list[bytes]:
        """Return the images' hashes; empty ones without an exact cache."""
        return [b"" if self.exact is None else self.exact.key(image) for image in images]

    def ask_exact(self, ticket: Ticket, now: float) -> None:
        """Look a request up in the exact cache by its key; sets ``cached`` or ``frequent``."""
        if self.exact is not None:
            known = self.exact.ask(ticket.key, now)
            ticket.frequent = known.frequent
            if known.class_index is not None:
                ticket.cached = Observation(EXACT, math.inf, known.class_index, 1.0, known.class_index)

    def search(self, tickets: Sequence[Ticket]) -> Match | None:
        """Look up the nearest entries of the requests that the exact cache has not answered; sets ``features``."""
        unknown = [ticket for ticket in tickets if ticket.cached is None]
        if self.nearest is None or not unknown:
            return None
        keys = self.nearest.keys(np.stack([ticket.image for ticket in unknown]))
        for ticket, key in zip(unknown, keys, strict=True):
            ticket.features = key
        asked = [ticket.search for ticket in unknown]
        return self.nearest.ask(keys[asked]) if any(asked) else None

    def resolve(self, tickets: Sequence[Ticket], found: Match | None) -> None:
        """Take what ``search`` returned; sets ``cached`` where the nearest cache answers."""
        if self.nearest is None or found is None:
            return
        asked = [(t, t.features) for t in tickets if t.cached is None and t.search and t.features is not None]
        found = self.nearest.confirm(np.stack([features for _, features in asked]), found)
        columns = (found.class_index.tolist(), found.score.tolist(), found.entry.tolist())
        for (ticket, _), class_index, score, entry in zip(asked, *columns, strict=True):
            ticket.nearest_class, ticket.nearest_score = class_index, score
            if score >= self.threshold and not ticket.frequent:
                ticket.cached = Observation(NEAREST, score, class_index, ticket.q, None)
                self.nearest.used(entry)

    def learn(
        self, ticket: Ticket, logits: Float[np.ndarray, " classes"], now: float, *, store_nearest: bool = True
    ) -> None:
        """Take an answer of the base; it becomes an entry of the nearest cache if ``store_nearest``."""
        if self.exact is not None:
            self.exact.store(ticket.key, int(np.argmax(logits)), now)
        if self.nearest is not None and ticket.features is not None and store_nearest:
            self.nearest.add(ticket.features, logits)
