"""Lower bounds on the time of any completed composition, by Lagrangian relaxation.

What ties the sites together is that a request arrives at a site exactly if it passed the one before. Relaxed with a
multiplier for every request at every site, an estimate of the time that it still takes from there on, the sites
separate: each may accept only the requests that it serves in less than their multiplier, and is charged the next
site's multiplier for those that it passes on. The minima of the sites, summed, bound the time from below for any
multipliers, because the requests' real way is among those allowed. Budgets are relaxed in the same way. Subgradient
steps raise the bound.
"""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from .problem import Problem, within

MOMENTUM = 0.9
BUDGET_STEP = 1e-2  # of a budget's multiplier, against a flow's


class Multipliers(NamedTuple):
    """The variables of the dual problem."""

    flow: Float[np.ndarray, "later n"]  # ms still to take, at the sites behind the first undecided one
    wrong: float  # ms a wrong answer
    uses: Float[np.ndarray, " resources"]  # ms a unit


class Relaxation:
    """The undecided part of a problem: the sites from ``first`` on, for some of the requests."""

    def __init__(
        self,
        problem: Problem,
        first: int,
        rows: Int[np.ndarray, " n"],
        weights: Float[np.ndarray, " n"],
        room: Float[np.ndarray, " resources"],
        usable: Bool[np.ndarray, "all_candidates thresholds"],
    ) -> None:
        """Cut it out.

        Args:
            problem: The whole.
            first: The first undecided site.
            rows: The requests that are left.
            weights: How often each of them counts.
            room: What is left of the limits; a candidate that takes more is left out.
            usable: Which thresholds may be chosen.
        """
        ids = np.flatnonzero((problem.site >= first) & within(problem.uses, room) & usable.any(1))
        ends = np.searchsorted(problem.site[ids], np.arange(first, problem.sites + 1))
        place = np.arange(len(ids)) - ends[np.maximum(0, problem.site[ids] - first)]
        self.problem, self.first, self.rows, self.weights, self.ids = problem, first, rows, weights, ids
        self.parts = tuple(slice(a, b) for a, b in itertools.pairwise(ends.tolist()))
        """Of the candidates, for each site from ``first`` on."""
        self.level = problem.level[ids][:, rows]
        self.wrong = problem.wrong[ids][:, rows]
        self.usable = usable[ids]
        self._index = self.level + (problem.width + 1) * place[:, None]  # counted on from candidate to candidate

    def costs(
        self, s: int, multipliers: Multipliers
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "here n"], Float[np.ndarray, "here n"]]:
        """Return each request's cost at the s-th site, less its multiplier there: closed, at a miss, and at a hit.

        The first site accepts every request, so it has no multiplier.
        """
        part = self.parts[s]
        closed = np.full(len(self.rows), self.problem.span_ms[self.first + s])
        if s < len(multipliers.flow):
            closed += multipliers.flow[s]
        lookup = self.problem.lookup_ms[self.ids[part], None]
        hit = multipliers.wrong * self.wrong[part] + lookup
        if s == 0:
            return closed, lookup + closed, hit
        closed -= multipliers.flow[s - 1]
        miss = lookup + closed
        hit -= multipliers.flow[s - 1]
        return np.minimum(closed, 0), np.minimum(miss, 0, out=miss), np.minimum(hit, 0, out=hit)

    def value(
        self, multipliers: Multipliers, wrong_left: float, room: Float[np.ndarray, " resources"]
    ) -> tuple[float, Multipliers]:
        """Return the bound, less what the decided sites take, and a supergradient of it."""
        finite = np.isfinite(room)
        total = -multipliers.wrong * wrong_left - float(multipliers.uses[finite] @ room[finite])
        wrong, uses = -float(wrong_left), np.where(finite, -np.where(finite, room, 0), 0.0)
        surplus = np.zeros((len(self.parts) + 1, len(self.rows)))  # requests that arrive, less those accepted
        width = self.problem.width + 1
        for s, part in enumerate(self.parts):
            closed, miss, hit = self.costs(s, multipliers)
            least, taken, passing, c = float(closed @ self.weights), closed, None, 0
            if (many := part.stop - part.start) and width > 1:
                gain = np.bincount(self._index[part].ravel(), ((hit - miss) * self.weights).ravel(), width * many)
                values = gain.reshape(many, width)[:, :-1].cumsum(1)
                values += (miss @ self.weights + self.problem.uses[self.ids[part]] @ multipliers.uses)[:, None]
                values[~self.usable[part]] = np.inf
                c, t = divmod(int(values.argmin()), width - 1)
                if values[c, t] < least:
                    least, passing = float(values[c, t]), self.level[part.start + c] > t
                    taken = np.where(passing, miss[c], hit[c])
                    uses = uses + self.problem.uses[self.ids[part.start + c]]
            total += least
            flow = (taken < 0) * self.weights if s else self.weights
            surplus[s] -= flow
            if passing is None:
                surplus[s + 1] += flow
            else:
                surplus[s + 1] += flow * passing
                wrong += float(flow @ (~passing & self.wrong[part.start + c]))
        return total, Multipliers(surplus[1:-1], wrong, np.where(finite, uses, 0.0))


def ascend(
    relaxation: Relaxation,
    multipliers: Multipliers,
    *,
    target: float,
    wrong_left: float,
    room: Float[np.ndarray, " resources"],
    steps: tuple[float, ...],
) -> Multipliers:
    """Take subgradient steps until the bound is ``target``, and return the best multipliers on the way.

    Args:
        relaxation: Whose bound to raise.
        multipliers: To start from.
        target: A bound that suffices, in ms.
        wrong_left: What is left of the budget of disagreements.
        room: What is left of the limits.
        steps: Lengths of the steps, relative to Polyak's.
    """
    ms, slope = relaxation.value(multipliers, wrong_left, room)
    best_ms, best = ms, multipliers
    scale = 1 / np.maximum(relaxation.problem.uses.max(0, initial=0.0), 1e-12) ** 2
    moving: Multipliers | None = None
    for step in steps:
        if best_ms >= target:
            break
        if moving is None:
            moving = slope
        else:
            moving = Multipliers(
                slope.flow + MOMENTUM * moving.flow,
                slope.wrong + MOMENTUM * moving.wrong,
                slope.uses + MOMENTUM * moving.uses,
            )
        square = float((moving.flow**2).sum() + BUDGET_STEP * (moving.wrong**2 + (scale * moving.uses**2).sum()))
        if square <= 0:
            break
        length = step * (target - ms) / square
        multipliers = Multipliers(
            multipliers.flow + length * moving.flow,
            max(0.0, multipliers.wrong + length * BUDGET_STEP * moving.wrong),
            np.maximum(0.0, multipliers.uses + length * BUDGET_STEP * scale * moving.uses),
        )
        ms, slope = relaxation.value(multipliers, wrong_left, room)
        if ms > best_ms:
            best_ms, best = ms, multipliers
    return best
