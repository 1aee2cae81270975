"""Freeze Inference's threshold rule: a cache is believed where it is surer than it ever was when wrong.

The rule looks at every cache alone and at zero errors on its rows; it promises nothing about other rows. A plan of
these thresholds can be certified like any other, which says what they are worth.
"""

import numpy as np
from jaxtyping import Float

from gati_jax._errors import InputError

from .planned import Plan
from .tables import CostTable, ReplayTable, cascade_ms, replay_plan


def zero_error_thresholds(table: ReplayTable) -> Float[np.ndarray, " candidates"]:
    """Return for each candidate the next float32 above its largest score of a wrong answer.

    "Hit iff the confidence is greater" is thereby the house's "at or above". A candidate that was never wrong is
    always believed: its threshold is the lowest number there is.

    Args:
        table: Of the requests on which nothing may go wrong.

    Raises:
        InputError: The table is empty.
    """
    if len(table) == 0:
        msg = "table: expected at least one request, got none"
        raise InputError(msg)
    lowest = np.finfo(np.float32).min
    wrong = np.where(table.agrees, -np.inf, table.scores).max(1, initial=-np.inf).astype(np.float32)
    return np.maximum(np.nextafter(wrong, np.float32(np.inf)), lowest)


def freeze_plan(table: ReplayTable, costs: CostTable) -> Plan:
    """Return the plan of one step that opens every candidate at its zero-error threshold.

    Args:
        table: Replay of the rows that set the thresholds, one candidate at a site.
        costs: Measured times of the same base and candidates.

    Raises:
        InputError: The table is empty, or two candidates share a site.
    """
    if len(set(table.sites)) < len(table.sites):
        msg = f"table: expected one candidate at a site, got {table.names} at {table.sites}"
        raise InputError(msg)
    table = table.take([table.names[i] for i in np.argsort(table.sites)])
    path = np.stack([np.full(len(table.names), np.inf, np.float32), zero_error_thresholds(table)])
    return Plan(
        names=table.names,
        sites=table.sites,
        depth=table.depth,
        path=path,
        disagreement=np.array([replay_plan(table, thresholds).disagreement for thresholds in path]),
        mean_ms=np.array([cascade_ms(table, thresholds, costs) for thresholds in path]),
        n=len(table),
        rows=table.rows,
        origin=table.origin,
    )
