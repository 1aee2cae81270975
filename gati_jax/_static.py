"""Static parts of pytrees, hashed once."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Static:
    """A tuple of hashable values that remembers its hash.

    ``jax.jit`` hashes the static part of every argument on every call. A ResNet-56 is 27 block modules deep, and
    hashing them anew would cost as much as running several of its blocks.
    """

    values: tuple[Any, ...]
    hash_value: int = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Hash once."""
        object.__setattr__(self, "hash_value", hash(self.values))

    def __hash__(self) -> int:
        """Return the remembered hash."""
        return self.hash_value

    def __eq__(self, other: object) -> bool:
        """Compare by value; the same object compares at once."""
        return self is other or (isinstance(other, Static) and self.values == other.values)
