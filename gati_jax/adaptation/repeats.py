"""The exact-repeat layer: who asks for the very bytes that the base has answered gets the base's answer again.

It stands in front of the network and knows inputs by a hash of dtype, shape and bytes. The hash is keyed by a secret of
the process, so nobody can prepare two inputs that it takes for one. Only answers of the base are stored, never those of
a cache, and only of the base that is served: its answers to a repeat cannot disagree. What caches answer is therefore
never stored; so that popular inputs do not go through them for ever, the base is asked once an input comes often.

One thread uses it.
"""

import collections
import dataclasses
import hashlib
import secrets
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from gati_jax._errors import InputError

_DIGEST_BYTES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepeatsConfig:
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


class Asked(NamedTuple):
    """What is known of a request."""

    class_index: int | None
    """The base's answer; None where it is not known, or no longer."""
    often: bool
    """The answer is not known, and would be worth it: let the base answer this request, not a cache."""


@dataclasses.dataclass
class _Input:
    asked: int = 0
    class_index: int | None = None
    until: float = 0.0


class Repeats:
    """Inputs by their hashes, least recently asked for first."""

    def __init__(self, base: str, config: RepeatsConfig | None = None) -> None:
        """Remember nothing yet.

        Args:
            base: Which base is served: a digest of its parameters.
            config: How much to remember.
        """
        self.config = config or RepeatsConfig()
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

    def ask(self, key: bytes, now: float) -> Asked:
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
            return Asked(known.class_index, often=False)
        known.class_index = None
        return Asked(None, often=known.asked >= self.config.often)

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
