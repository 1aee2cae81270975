"""What may answer in front of the network: exact repeats, then stored points. Both know only what the base has said.

Exact repeats need no trial, for they are the base's own answers. Stored points answer once a trial has shown from
which score on they may: until then they only say what they would have answered, and learn. See ``NearestTrial``.
"""

import collections
import dataclasses
import hashlib
import math
import secrets
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Shaped

from gati_jax.errors import InputError

from .nearest_cache import NearestCache
from .request_log import POINTS, REPEATED


@dataclasses.dataclass
class _Input:
    asked: int = 0
    class_index: int | None = None
    until: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactCacheConfig:
    """How much is remembered."""

    capacity: int = 100_000
    """Inputs; of more, those that nobody has asked for longest are forgotten. About 200 bytes each."""
    seconds: float = 3600.0
    """An answer is forgotten so long after the base gave it, however often it was asked for."""
    often: int = 2
    """Let the base, not a cache, answer what has been asked for so many times, this one included."""

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            InputError: A number is out of its bounds.
        """
        if self.capacity < 1 or self.often < 1:
            found = f"{self.capacity} and {self.often}"
            raise InputError(f"capacity, often: expected 1 or more of each, got {found}")
        if not self.seconds > 0:
            raise InputError(f"seconds: expected more than 0, got {self.seconds}")


class Known(NamedTuple):
    """What is known of a request."""

    class_index: int | None
    """The base's answer; None where it is not known, or no longer."""
    often: bool
    """The answer is not known, and would be worth it: let the base answer this request, not a cache."""


class ExactCache:
    """Inputs by their hashes, least recently asked for first."""

    def __init__(self, base: str, config: ExactCacheConfig | None = None) -> None:
        """Remember nothing yet.

        Args:
            base: Which base is served: a digest of its parameters.
            config: How much to remember.
        """
        self.config = config or ExactCacheConfig()
        self.base = base
        self.hits = self.asked = 0
        self._secret = secrets.token_bytes(_DIGEST_BYTES)
        self._inputs: collections.OrderedDict[bytes, _Input] = collections.OrderedDict()

    def __len__(self) -> int:
        """Return how many inputs are remembered, answered or not."""
        return len(self._inputs)

    def key(self, image: Shaped[np.ndarray, "..."]) -> bytes:
        """Return what an input is known by."""
        form = f"{image.dtype.str}{image.shape}".encode()
        digest = hashlib.blake2b(form, digest_size=_DIGEST_BYTES, key=self._secret)
        digest.update(np.ascontiguousarray(image).data)
        return digest.digest()

    def ask(self, key: bytes, now: float) -> Known:
        """Return what is known of an input, and remember that it was asked for.

        Args:
            key: See ``key``.
            now: Seconds of a clock that never falls.
        """
        known = self._latest(key)
        known.asked += 1
        self.asked += 1
        if known.class_index is not None and now < known.until:
            self.hits += 1
            return Known(known.class_index, often=False)
        known.class_index = None
        return Known(None, often=known.asked >= self.config.often)

    def store(self, key: bytes, class_index: int, now: float, *, base: str) -> None:
        """Remember an answer; that of another base than the served one came too late, and is dropped.

        Args:
            key: See ``key``.
            class_index: What the base answered.
            now: Seconds of the same clock.
            base: Which base answered.
        """
        if base == self.base:
            known = self._latest(key)
            known.class_index, known.until = class_index, now + self.config.seconds

    def _latest(self, key: bytes) -> _Input:
        """Return an input, new or old, as the most recent; the least recent one of too many is forgotten."""
        known = self._inputs.setdefault(key, _Input())
        self._inputs.move_to_end(key)
        if len(self._inputs) > self.config.capacity:
            self._inputs.popitem(last=False)
        return known

    def serve(self, base: str) -> None:
        """Forget all answers, if from now on another base is served; other caches on the same base change nothing."""
        if base != self.base:
            self.base = base
            self._inputs.clear()


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way, and what the front knows of it."""

    number: int
    """In the order in which requests came."""
    image: Shaped[np.ndarray, "..."]
    q: float
    """The probability with which the base's answer is to be computed if it hits; fixed before it came."""
    look: bool
    """What the coin said, whoever answers."""
    version: int
    """The monitor's, as it came: what an older cascade has answered says nothing of the present one."""
    key: bytes = b""
    features: Float32[np.ndarray, " features"] | None = None
    point_class: int = -1
    point_score: float = math.nan
    """NaN where the points were not asked."""
    early: "Early | None" = None
    """The answer, if the front has one."""
    often: bool = False
    """Let the base answer: it comes often, and would then be known."""


class Early(NamedTuple):
    """An answer in front of the network."""

    exit: int
    """``REPEATED`` or ``POINTS``."""
    class_index: int
    score: float


class InputCache:
    """Exact repeats and stored points, each of which may be left out. One thread, or one lock."""

    def __init__(self, repeats: ExactCache | None, points: NearestCache | None) -> None:
        """Know nothing; points are closed."""
        self.repeats, self.points = repeats, points
        self.threshold = math.inf
        """Score from which on points answer."""

    def ask(self, ticket: Ticket, now: float, *, points: bool = True) -> None:
        """Look a request up; ``ticket.early`` is the answer, if there is one.

        Args:
            ticket: Filled in.
            now: Seconds.
            points: Whether points are asked; what the base answers is stored all the same.
        """
        if self.repeats is not None:
            ticket.key = self.repeats.key(ticket.image)
            known = self.repeats.ask(ticket.key, now)
            if known.class_index is not None:
                ticket.early = Early(REPEATED, known.class_index, math.inf)
                return
            ticket.often = known.often
        if self.points is not None:
            keys = self.points.keys(ticket.image[None])
            ticket.features = keys[0]
            if not points:
                return
            found = self.points.ask(keys)
            ticket.point_class, ticket.point_score = int(found.class_index[0]), float(found.score[0])
            if ticket.point_score >= self.threshold and not ticket.often:
                ticket.early = Early(POINTS, ticket.point_class, ticket.point_score)
                self.points.used(int(found.point[0]))

    def learn(
        self, ticket: Ticket, logits: Float[np.ndarray, " classes"], now: float, *, base: str, store: bool = True
    ) -> None:
        """Take what the base has answered.

        Args:
            ticket: The request.
            logits: Of the base.
            now: Seconds.
            base: Which base, see ``NearestCache``.
            store: Whether it becomes a point.
        """
        if self.repeats is not None and ticket.key:
            self.repeats.store(ticket.key, int(np.argmax(logits)), now, base=base)
        if self.points is not None and ticket.features is not None and store:
            self.points.add(ticket.features, logits, base=base)


_DIGEST_BYTES = 16
