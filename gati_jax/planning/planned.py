"""What composition ends with: the chosen caches and the path of their thresholds.

A plan is a *path* of threshold vectors, from nothing that is known to go wrong to the disagreement asked for. It is
fixed and hashed before the ``certify`` split is opened; the certificate says how far along it one may go.
"""

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Float, UInt64

from gati_jax._errors import InputError

from .origin import Origin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The chosen caches in order, and the path of their thresholds.

    ``path[i, c]`` is cache c's threshold on step i, infinity where it is off. ``disagreement`` and ``mean_ms`` are
    what composition saw on each step, on out-of-fold scores of the select split.
    """

    names: tuple[str, ...]
    sites: tuple[int, ...]
    depth: int
    path: Float[np.ndarray, "steps caches"]
    disagreement: Float[np.ndarray, " steps"]
    mean_ms: Float[np.ndarray, " steps"]
    n: int
    """Requests of the table that it was composed on."""
    rows: UInt64[np.ndarray, " n"] = dataclasses.field(repr=False)  # their digests
    origin: Origin = Origin()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        """Check that the columns belong together; thresholds are compared with float32 scores.

        Raises:
            InputError: Names the field.
        """
        object.__setattr__(self, "path", np.asarray(self.path, np.float32))
        steps, caches = len(self.disagreement), len(self.names)
        if self.path.shape != (steps, caches) or len(self.mean_ms) != steps or len(self.sites) != caches or steps == 0:
            msg = f"path: expected shape [steps, caches] = [{steps}, {caches}], got {list(self.path.shape)}"
            raise InputError(msg)
        if self.rows.shape != (self.n,):
            msg = f"rows: expected the digests of n = {self.n} requests, got shape {list(self.rows.shape)}"
            raise InputError(msg)
        if np.isnan(self.path).any() or (self.path == -np.inf).any():
            msg = "path: expected thresholds or infinity, got NaN or -infinity"
            raise InputError(msg)
        if np.isfinite(self.path[0]).any():
            msg = f"path: expected its first step to be the bare base, all infinite, got {self.path[0]}"
            raise InputError(msg)

    @property
    def hash(self) -> str:
        """Digest of all that must be fixed before ``certify`` is opened; ``rows`` a certificate names by themselves."""
        digest = hashlib.sha256(repr((self.names, self.sites, self.depth, self.path.shape, self.origin)).encode())
        digest.update(np.ascontiguousarray(self.path).tobytes())
        return digest.hexdigest()

    def thresholds(self, step: int) -> Float[np.ndarray, " caches"]:
        """Return step ``step``'s thresholds; all off where nothing was certified (step -1)."""
        return self.path[step] if step >= 0 else np.full(len(self.names), np.inf, np.float32)
