"""A greedy walk: each step lowers one threshold, or opens one cache, where that saves most per new disagreement.

Requests are counted jointly: a hit at an early site takes its request away from all later ones.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from .tables import CostTable, ReplayTable, exit_ms, replay_plan

SMALL_MOVE = 0.1  # of the budget; taken first, for a certificate can only stop between moves
MAX_THRESHOLDS = 64  # for each candidate: more would fit the noise of a few thousand requests

Thresholds = Float[np.ndarray, " candidates"]


def walk(
    table: ReplayTable, costs: CostTable, *, start: Thresholds, floor: Thresholds, budget: int
) -> list[Thresholds]:
    """Return the steps from ``start`` on, not below ``floor``, to a budget of disagreements.

    Args:
        table: Candidates in the order of their sites.
        costs: Their times.
        start: Thresholds of the first step.
        floor: The lowest that each threshold may become.
        budget: Requests that may disagree.
    """
    grid = _Grid.of(table, floor)
    thresholds = start.astype(np.float32)
    path = [thresholds.copy()]
    small = max(1, int(budget * SMALL_MOVE))
    while True:
        move = _best_move(table, costs, grid, thresholds, budget, small)
        move = move or _best_move(table, costs, grid, thresholds, budget, budget)
        if move is None:
            return path
        thresholds[move.cache] = move.threshold
        path.append(thresholds.copy())


class _Move(NamedTuple):
    """A threshold that is lowered."""

    cache: int
    threshold: np.float32
    saved: float  # milliseconds, summed over requests
    wrong: int  # requests that come to disagree, less those that cease to


class _Grid(NamedTuple):
    """For each candidate the rows by falling score, and where thresholds may lie."""

    order: Int[np.ndarray, "candidates n"]
    cuts: tuple[Int[np.ndarray, "..."], ...]  # a threshold at cut i lets the first i + 1 rows of the order hit

    @classmethod
    def of(cls, table: ReplayTable, floor: Thresholds) -> "_Grid":
        order = np.argsort(-table.scores, axis=1, kind="stable")
        ranked = np.take_along_axis(table.scores, order, 1)
        last = np.concatenate([ranked[:, 1:] < ranked[:, :-1], np.ones((len(ranked), 1), bool)], axis=1)
        ends = [np.flatnonzero(row) for row in last]  # a cut may not split equal scores
        ends = [e[(row[e] >= lowest) & (row[e] > -np.inf)] for e, row, lowest in zip(ends, ranked, floor, strict=True)]
        thin = [np.unique(np.linspace(0, len(e) - 1, min(len(e), MAX_THRESHOLDS)).astype(int)) for e in ends]
        return cls(order, tuple(e[t] for e, t in zip(ends, thin, strict=True)))


def _best_move(
    table: ReplayTable, costs: CostTable, grid: _Grid, thresholds: Thresholds, budget: int, largest: int
) -> _Move | None:
    """Return the move that saves the most per new disagreement, or None if none saves within the budget.

    Moves that cost no disagreement come first, the largest saving first. No move costs more than ``largest``.
    """
    outcome = replay_plan(table, thresholds)
    on = np.isfinite(thresholds)
    now_ms = exit_ms(table, thresholds, costs)
    best: _Move | None = None
    spent = int(outcome.disagrees.sum())
    for c in range(len(table.names)):
        if not on[c] and table.sites[c] in np.asarray(table.sites)[on]:
            continue  # one cache at a site
        # A request that leaves at c or before keeps its exit; the others come to c if their score is high enough.
        later = outcome.exits > c
        lookup_ms = 0.0 if on[c] else costs.lookup_ms[table.names[c]]
        opening = lookup_ms * int(later.sum())
        order = grid.order[c]
        saved = np.cumsum(np.where(later, now_ms[outcome.exits] - now_ms[c], 0.0)[order]) - opening
        wrong = np.cumsum(np.where(later, (~table.agrees[c]).astype(int) - outcome.disagrees, 0)[order])
        cuts = grid.cuts[c]
        affordable = wrong[cuts] <= min(budget - spent, largest)
        cuts = cuts[(saved[cuts] > 1e-9 * len(table)) & affordable & (table.scores[c][order[cuts]] < thresholds[c])]
        if not len(cuts):
            continue
        free = cuts[wrong[cuts] <= 0]
        pick = free[np.argmax(saved[free])] if len(free) else cuts[np.argmax(saved[cuts] / wrong[cuts])]
        move = _Move(c, table.scores[c][order[pick]], float(saved[pick]), int(wrong[pick]))
        if best is None or _value(move) > _value(best):
            best = move
    return best


def _value(move: _Move) -> tuple[bool, float]:
    return (move.wrong <= 0, move.saved / max(move.wrong, 1))
