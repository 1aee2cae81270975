"""What a base and sets of caches say to a trace's images: computed once each, when first asked for."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Shaped

from gati_jax.caches import Candidate
from gati_jax.models import Chain
from gati_jax.runtime import hear

BATCH = 64


class Heard:
    """By set of caches; the reference arithmetic."""

    def __init__(self, chain: Chain, images: Shaped[np.ndarray, "items ..."]) -> None:
        """Know nothing yet.

        Args:
            chain: The base.
            images: Of the trace.
        """
        self._chain, self._images = chain, images
        self._by_caches: dict[tuple[int, ...], Column] = {}  # by the caches' identities: who serves may regroup them

    def of(self, caches: tuple[Candidate, ...], items: Int[np.ndarray, " m"]) -> "Column":
        """Return what is said to these items, and to others that were asked for before."""
        key = tuple(id(cache) for cache in caches)
        column = self._by_caches.get(key)
        if column is None:
            column = self._by_caches[key] = Column(caches, len(self._images), self._chain.classes)
        missing = np.unique(items[~column.known[items]])
        if len(missing):
            said = hear(self._chain, caches, self._images[missing], batch=BATCH)
            column.logits[missing], column.known[missing] = said.logits.T, True
            column.classes[:, missing], column.scores[:, missing] = said.classes, said.scores
        return column


@dataclasses.dataclass(eq=False)
class Column:
    """What one set of caches, and the base, say to items; only those that are known."""

    caches: tuple[Candidate, ...]
    """Kept, so that their identities are nobody else's."""
    items: int
    outputs: int

    def __post_init__(self) -> None:
        """Make room."""
        self.known = np.zeros(self.items, bool)
        self.logits: Float[np.ndarray, "items classes"] = np.zeros((self.items, self.outputs), np.float32)
        self.classes: Int[np.ndarray, "caches items"] = np.zeros((len(self.caches), self.items), np.int32)
        self.scores: Float[np.ndarray, "caches items"] = np.zeros((len(self.caches), self.items), np.float32)
