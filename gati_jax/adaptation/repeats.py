"""The exact-repeat layer: who asks for the very bytes that the base has answered gets the base's answer again.

It stands in front of the network and knows inputs by a hash of dtype, shape and bytes. The hash is keyed by a secret of
the process, so nobody can prepare two inputs that it takes for one. Only answers of the base are stored, never those of
a cache, and only of the base that is served: its answers to a repeat cannot disagree.

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

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            InputError: A number is out of its bounds.
        """
        if self.capacity < 1:
            raise InputError(f"capacity: expected 1 or more, got {self.capacity}")
        if not self.seconds > 0:
            raise InputError(f"seconds: expected more than 0, got {self.seconds}")


class _Stored(NamedTuple):
    class_index: int
    until: float


class Repeats:
    """The base's answers by the hash of their inputs, least recently asked for first."""

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
        self._stored: collections.OrderedDict[bytes, _Stored] = collections.OrderedDict()

    def __len__(self) -> int:
        """Return how many inputs are remembered, expired ones included."""
        return len(self._stored)

    def key(self, image: Shaped[np.ndarray, "..."]) -> bytes:
        """Return what an input is known by."""
        form = f"{image.dtype.str}{image.shape}".encode()
        digest = hashlib.blake2b(form, digest_size=_DIGEST_BYTES, key=self._secret)
        digest.update(np.ascontiguousarray(image).data)
        return digest.digest()

    def ask(self, key: bytes, now: float) -> int | None:
        """Return the base's answer, or None if it is not known, or no longer.

        Args:
            key: See ``key``.
            now: Seconds of a clock that never falls.
        """
        self.asked += 1
        stored = self._stored.get(key)
        if stored is None:
            return None
        if now >= stored.until:
            del self._stored[key]
            return None
        self._stored.move_to_end(key)
        self.hits += 1
        return stored.class_index

    def store(self, key: bytes, class_index: int, now: float, *, base: str) -> None:
        """Remember an answer; that of another base than the served one came too late, and is dropped.

        Args:
            key: See ``key``.
            class_index: What the base answered.
            now: Seconds of the same clock.
            base: Which base answered.
        """
        if base != self.base:
            return
        self._stored[key] = _Stored(class_index, now + self.config.seconds)
        self._stored.move_to_end(key)
        if len(self._stored) > self.config.capacity:
            self._stored.popitem(last=False)

    def serve(self, base: str) -> None:
        """Forget all answers, if from now on another base is served; other caches on the same base change nothing."""
        if base != self.base:
            self.base = base
            self._stored.clear()
