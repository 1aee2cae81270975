"""Lower bounds on what a composition can still reach: Lagrangian relaxation of the requests' way through the sites.

Every request has a *toll* at every site, a guess at what it still takes from there on. A site may refuse requests
for which it would take longer than the toll, and pays the toll of those that it passes on. Then the sites no longer
depend on each other: the least of each, summed, is a lower bound whatever the tolls, for the way that requests really
go is one of those allowed. Budgets become prices in the same manner. Subgradient steps raise the bound.
"""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from .problem import Problem

MOMENTUM = 0.9
PRICE_STEP = 1e-2  # of a price of the budget, against a toll's


class Prices(NamedTuple):
    """The variables of the relaxation."""

    tolls: Float[np.ndarray, "later n"]  # at the sites behind the first undecided one
    wrong: float  # ms a wrong answer
    uses: Float[np.ndarray, " resources"]  # ms a unit


class Value(NamedTuple):
    """The bound at some prices, less the constant part, and where it rises."""

    ms: float
    tolls: Float[np.ndarray, "later n"]
    wrong: float
    uses: Float[np.ndarray, " resources"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relaxation:
    """The sites from ``first`` on, for some of the requests, each with a weight."""

    options: Problem
    first: int
    rows: Int[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]
    ids: Int[np.ndarray, " candidates"]
    parts: tuple[slice, ...]  # of the candidates, for each site from ``first`` on
    level: Int[np.ndarray, "candidates n"]
    wrong: Bool[np.ndarray, "candidates n"]
    index: Int[np.ndarray, "candidates n"]  # levels, counted on from candidate to candidate of a site
    usable: Bool[np.ndarray, "candidates thresholds"]

    @classmethod
    def of(
        cls,
        options: Problem,
        first: int,
        rows: Int[np.ndarray, " n"],
        weights: Float[np.ndarray, " n"],
        room: Float[np.ndarray, " resources"],
        usable: Bool[np.ndarray, "all_candidates thresholds"],
    ) -> "Relaxation":
        """Cut the undecided part out of a problem; ``room`` is what is left of the limits."""
        ids = np.flatnonzero((options.site >= first) & (options.uses <= room * (1 + 1e-12)).all(1) & usable.any(1))
        level = options.level[ids][:, rows]
        ends = np.searchsorted(options.site[ids], np.arange(first, options.sites + 1))
        width = options.width + 1
        place = np.arange(len(ids)) - ends[np.maximum(0, options.site[ids] - first)]
        return cls(
            options=options,
            first=first,
            rows=rows,
            weights=weights,
            ids=ids,
            parts=tuple(slice(a, b) for a, b in itertools.pairwise(ends.tolist())),
            level=level,
            wrong=options.wrong[ids][:, rows],
            index=level + width * place[:, None],
            usable=usable[ids],
        )

    def costs(
        self, s: int, prices: Prices
    ) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "here n"], Float[np.ndarray, "here n"]]:
        """Return each request's cost less its toll at the s-th site: where it is closed, at a miss, and at a hit.

        The first site refuses nobody and asks no toll.
        """
        part = self.parts[s]
        closed = np.full(len(self.rows), self.options.span_ms[self.first + s])
        if s < len(prices.tolls):
            closed += prices.tolls[s]
        lookup = self.options.lookup_ms[self.ids[part], None]
        hit = prices.wrong * self.wrong[part] + lookup
        if s == 0:
            return closed, lookup + closed, hit
        closed -= prices.tolls[s - 1]
        miss = lookup + closed
        hit -= prices.tolls[s - 1]
        return np.minimum(closed, 0), np.minimum(miss, 0, out=miss), np.minimum(hit, 0, out=hit)

    def value(self, prices: Prices, wrong_left: float, room: Float[np.ndarray, " resources"]) -> Value:
        """Return the bound and a supergradient."""
        finite = np.isfinite(room)
        total = -prices.wrong * wrong_left - float(prices.uses[finite] @ room[finite])
        wrong, uses = -float(wrong_left), np.where(finite, -np.where(finite, room, 0), 0.0)
        tolls = np.zeros((len(self.parts) + 1, len(self.rows)))
        width = self.options.width + 1
        for s, part in enumerate(self.parts):
            closed, miss, hit = self.costs(s, prices)
            least, taken, passing, c = float(closed @ self.weights), closed, None, 0
            if (many := part.stop - part.start) and width > 1:
                gain = np.bincount(self.index[part].ravel(), ((hit - miss) * self.weights).ravel(), width * many)
                values = gain.reshape(many, width)[:, :-1].cumsum(1)
                values += (miss @ self.weights + self.options.uses[self.ids[part]] @ prices.uses)[:, None]
                values[~self.usable[part]] = np.inf
                c, t = divmod(int(values.argmin()), width - 1)
                if values[c, t] < least:
                    least, passing = float(values[c, t]), self.level[part.start + c] > t
                    taken = np.where(passing, miss[c], hit[c])
                    uses = uses + self.options.uses[self.ids[part.start + c]]
            total += least
            flow = (taken < 0) * self.weights if s else self.weights
            tolls[s] -= flow
            if passing is None:
                tolls[s + 1] += flow
            else:
                tolls[s + 1] += flow * passing
                wrong += float(flow @ (~passing & self.wrong[part.start + c]))
        return Value(total, tolls[1:-1], wrong, np.where(finite, uses, 0.0))


class Ascent(NamedTuple):
    """The best prices found, and their bound."""

    ms: float
    prices: Prices


def ascend(
    relaxation: Relaxation,
    prices: Prices,
    *,
    target: float,
    wrong_left: float,
    room: Float[np.ndarray, " resources"],
    steps: tuple[float, ...],
) -> Ascent:
    """Take subgradient steps towards ``target``; ``steps`` are their lengths by Polyak's measure."""
    value = relaxation.value(prices, wrong_left, room)
    best = Ascent(value.ms, prices)
    scale = 1 / np.maximum(relaxation.options.uses.max(0, initial=0.0), 1e-12) ** 2
    moving: Value | None = None
    for step in steps:
        if best.ms >= target:
            break
        if moving is None:
            moving = value
        else:
            moving = Value(
                0.0,
                value.tolls + MOMENTUM * moving.tolls,
                value.wrong + MOMENTUM * moving.wrong,
                value.uses + MOMENTUM * moving.uses,
            )
        square = float((moving.tolls**2).sum() + PRICE_STEP * (moving.wrong**2 + (scale * moving.uses**2).sum()))
        if square <= 0:
            break
        length = step * (target - value.ms) / square
        prices = Prices(
            prices.tolls + length * moving.tolls,
            max(0.0, prices.wrong + length * PRICE_STEP * moving.wrong),
            np.maximum(0.0, prices.uses + length * PRICE_STEP * scale * moving.uses),
        )
        value = relaxation.value(prices, wrong_left, room)
        if value.ms > best.ms:
            best = Ascent(value.ms, prices)
    return best
