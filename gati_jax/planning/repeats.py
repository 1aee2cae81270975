"""Equal rows among those that certify: requests that came again, or copies of one request?

A certificate's test reckons with n independent requests. From traffic that repeats itself they are drawn independently
even where they are equal, and each counts. To leave the repeats out would judge other traffic, in which the popular
requests are as rare as all others, and be too kind to a cascade that is wrong about just these. But a copy, from a data
set that was oversampled or joined with itself, is no draw: 600 copies of one row say no more than the row does.

The rows look the same either way, so whoever drew them must say. If nobody does, the odd duplicate of real data passes
with a warning: so few hardly move a p-value, copies or not. More are refused.
"""

import warnings

import numpy as np
from jaxtyping import UInt64

from gati_jax._errors import InputError

REPEATED_ROWS = 0.01  # as large a share may two splits have in common


def count_repeats(rows: UInt64[np.ndarray, " n"], *, drawn: bool) -> int:
    """Return how many rows equal one before them.

    Args:
        rows: Digests.
        drawn: Whether it is known that each was drawn by itself.

    Raises:
        InputError: More than 1 % do, and nothing is known of them.
    """
    again = len(rows) - len(np.unique(rows))
    if again and not drawn:
        if again > REPEATED_ROWS * len(rows):
            msg = f"table: expected distinct rows, got {again} of {len(rows)} that repeat another; leave copies out, or"
            msg += " say by repeats that all were drawn one by one from traffic that repeats itself"
            raise InputError(msg)
        warnings.warn(
            f"{again} of {len(rows)} certify rows repeat another, and were counted all the same", stacklevel=4
        )
    return again
