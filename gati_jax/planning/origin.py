"""Where a table comes from: a plan and its certificate hold for these very parameters and no others."""

import dataclasses
from collections.abc import Sequence

from gati_jax._errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What a replay was computed from; empty where nobody said, as in tables made by hand.

    Args:
        base: Digest of the base's parameters.
        candidates: Name and digest of every candidate's.
        dtype: Of the images: rows are told apart by their bytes, so uint8 pixels and prepared inputs do not mix.
    """

    base: str = ""
    candidates: tuple[tuple[str, str], ...] = ()
    dtype: str = ""

    def take(self, names: Sequence[str]) -> "Origin":
        """Return the origin of these candidates only, in this order."""
        digests = dict(self.candidates)
        return dataclasses.replace(self, candidates=tuple((name, digests[name]) for name in names if name in digests))

    def check(self, other: "Origin", argument: str) -> None:
        """Compare with what else claims to be of this origin.

        Raises:
            InputError: Names what differs.
        """
        differ = [
            what
            for what, one, two in (("the base", self.base, other.base), ("the images' dtype", self.dtype, other.dtype))
            if one != two
        ]
        mine, others = dict(self.candidates), dict(other.candidates)
        differ += sorted(name for name in mine.keys() | others.keys() if mine.get(name) != others.get(name))
        if differ:
            msg = f"{argument}: expected the parameters and images of the plan, got other ones: {', '.join(differ)}"
            raise InputError(msg)
