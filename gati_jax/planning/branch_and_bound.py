"""Branch and bound over the sites from the first to the last, best bound first.

A node is a prefix: what is open up to a site is decided, so the requests that are left, the time and the wrong answers
are exact; `bound` says what the rest takes at least. Nodes that share all but their last decision are bounded together,
with prices that suit their mean.
"""

import heapq
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from .lagrangian import Prices, Relaxation, ascend
from .local_search import Found, polish
from .problem import Choice, Problem, cost_to_go, evaluate

TOLERANCE = 1e-9  # relative: bounds are sums of floats
ROOT_STEPS, ROOT_RANGE = 1500, (1.5, 0.02)
NODE_STEPS, NODE_RANGE = 12, (0.6, 0.1)


class Result(NamedTuple):
    """What a search ended with."""

    found: Found
    bound_ms: float  # no choice takes less
    nodes: int
    prices: Prices  # that bound all choices together


class _Family(NamedTuple):
    """A decided prefix and those of its next site's options that may lead to something better."""

    left: UInt8[np.ndarray, " packed"]
    choice: Choice
    ms: float
    wrong: int
    room: Float[np.ndarray, " resources"]
    candidates: Int[np.ndarray, " members"]  # -1: closed
    levels: Int[np.ndarray, " members"]
    rows: Int[np.ndarray, " n"]  # the requests that the prices are about
    prices: Prices
    usable: Bool[np.ndarray, "candidates thresholds"]  # what may be chosen behind it


class _Members(NamedTuple):
    """A family's members, evaluated exactly."""

    left: Float[np.ndarray, "members n"]
    choices: list[Choice]
    ms: Float[np.ndarray, " members"]
    wrong: Int[np.ndarray, " members"]
    room: Float[np.ndarray, "members resources"]


def solve(
    options: Problem,
    start: Found,
    prices: Prices,
    *,
    out_of_time: Callable[[], bool],
    progress: Callable[[int, float, float], None],
) -> Result:
    """Find the best choice, or a bound on it where the time runs out.

    Args:
        options: The problem.
        start: A choice within the budgets.
        prices: To start from, see `first_prices`; or those that a search with other thresholds ended with.
        out_of_time: Asked between nodes.
        progress: Told nodes, the best time and the bound.
    """
    ticket = itertools.count()
    everything = np.arange(options.n)
    whole = _Family(
        np.packbits(np.ones(options.n, bool)), (), options.start_ms, 0, options.limits,
        np.array([-1]), np.array([0]), everything, prices, options.usable,
    )  # fmt: skip
    best, nodes, node_steps = start, 0, _schedule(NODE_STEPS, NODE_RANGE)
    bound, families = _expand(options, whole, _root(options), best, _schedule(ROOT_STEPS, ROOT_RANGE), out_of_time)
    prices = families[0][1].prices if families else prices
    heap = [(key, next(ticket), family) for key, family in families]
    heapq.heapify(heap)
    while heap and heap[0][0] < best.ms - TOLERANCE * best.ms:
        bound = max(bound, heap[0][0])
        if out_of_time():
            return Result(best, min(bound, best.ms), nodes, prices)
        key, _, family = heapq.heappop(heap)
        members = _members(options, family, best)
        nodes += len(members.choices)
        best = _improve(options, members, best)
        if len(family.choice) + 1 < options.sites:
            _, found = _expand(options, family, members, best, node_steps, out_of_time)
            for child_key, child in found:
                heapq.heappush(heap, (max(key, child_key), next(ticket), child))
        progress(nodes, best.ms, min(bound, best.ms))
    return Result(best, best.ms, nodes, prices)


def _schedule(steps: int, ends: tuple[float, float]) -> tuple[float, ...]:
    return tuple(np.geomspace(*ends, steps).tolist())


def first_prices(options: Problem, choice: Choice, price: float) -> Prices:
    """Return prices from what the requests take under a good choice: its own bound would be its own time.

    Args:
        options: The problem.
        choice: A good one.
        price: About what a wrong answer is worth, in ms.
    """
    ms, _ = cost_to_go(options, choice, price)
    return Prices(ms[1:-1], price, np.zeros(len(options.limits)))


def _root(options: Problem) -> _Members:
    one = np.ones((1, options.n))
    return _Members(one, [()], np.array([options.start_ms]), np.array([0]), options.limits[None])


def _members(options: Problem, family: _Family, best: Found) -> _Members:
    """Decide a family's site in each of the ways that are left."""
    site = len(family.choice)
    left = np.unpackbits(family.left, count=options.n).astype(bool)
    c, t = family.candidates, family.levels
    opened = (c >= 0)[:, None]
    hits = (options.level[c][:, left] <= t[:, None]) & opened
    wrong = family.wrong + (hits & options.wrong[c][:, left]).sum(1)
    on = np.zeros((len(c), options.n))
    on[:, left] = ~hits
    lookup = np.where(c >= 0, options.lookup_ms[c], 0.0)
    ms = family.ms + lookup * left.sum() + options.span_ms[site] * on.sum(1)
    keep = (wrong <= options.disagreements) & (ms < best.ms - TOLERANCE * best.ms)
    room = family.room - np.where(opened, options.uses[c], 0.0)
    chosen = [None if i < 0 else (int(i), int(j)) for i, j in zip(c[keep], t[keep], strict=True)]
    return _Members(on[keep], [(*family.choice, o) for o in chosen], ms[keep], wrong[keep], room[keep])


def _improve(options: Problem, members: _Members, best: Found) -> Found:
    """Try every member with nothing open behind it."""
    if not len(members.ms):
        return best
    sites = len(members.choices[0])
    ms = members.ms + options.span_ms[sites:].sum() * members.left.sum(1)
    i = int(ms.argmin())
    if ms[i] < best.ms - TOLERANCE * best.ms:
        choice = (*members.choices[i], *(None,) * (options.sites - sites))
        best = min(polish(options, choice), Found(evaluate(options, choice)[0], choice), key=lambda found: found.ms)
    return best


def _expand(
    options: Problem, family: _Family, members: _Members, best: Found, steps: tuple[float, ...],
    out_of_time: Callable[[], bool],
) -> tuple[float, list[tuple[float, _Family]]]:  # fmt: skip
    """Bound the members, and return a family for each that may lead to something better."""
    if not len(members.ms) or len(members.choices[0]) == options.sites:
        return best.ms, []
    first = len(members.choices[0])
    mean = members.left.mean(0)
    rows = np.flatnonzero(mean)
    if not len(rows):
        return best.ms, []  # nobody is left to be served: `_improve` has seen these
    room, fixed = members.room.max(0), float(members.ms.mean())
    relaxation = Relaxation.of(options, first, rows, mean[rows], room, family.usable)
    decided = first - (options.sites - 1 - len(family.prices.tolls))  # sites of which no toll is asked any more
    tolls = family.prices.tolls[decided:, np.searchsorted(family.rows, rows)]
    prices = family.prices._replace(tolls=tolls)
    wrong_left = options.disagreements - float(members.wrong.mean())
    for i in range(0, len(steps), 100):
        if out_of_time() and i:
            break
        found = ascend(
            relaxation, prices, target=best.ms - fixed, wrong_left=wrong_left, room=room, steps=steps[i : i + 100]
        )
        prices = found.prices
    return _bounded(options, relaxation, members, prices, best)


def _bounded(
    options: Problem, relaxation: Relaxation, members: _Members, prices: Prices, best: Found
) -> tuple[float, list[tuple[float, _Family]]]:
    """Bound each member by itself at common prices."""
    left = members.left[:, relaxation.rows]
    finite = np.isfinite(members.room[0])
    base = members.ms + prices.wrong * (members.wrong - options.disagreements)
    base = base - members.room[:, finite] @ prices.uses[finite]
    extra = options.uses[relaxation.ids] @ prices.uses
    thresholds = np.arange(options.width)
    columns: list[np.ndarray] = []  # for each site, what each option comes to, the closed site first
    for s, part in enumerate(relaxation.parts):
        closed, miss, hit = relaxation.costs(s, prices)
        values = [(left @ closed)[:, None]]
        for c in range(part.start, part.stop):
            one = c - part.start
            stops = thresholds[relaxation.usable[c]]
            gain = (hit[one] - miss[one])[:, None] * (relaxation.level[c][:, None] <= stops)
            values.append((left @ miss[one])[:, None] + left @ gain + extra[c])
        columns.append(np.concatenate(values, axis=1))
        if s:
            base += columns[s].min(1)
    keys = base[:, None] + columns[0]
    bounds = keys.min(1)
    limit = best.ms - TOLERANCE * best.ms
    # What would lift a member's bound to the best time need not be looked at behind it.
    behind = [c - c.min(1, keepdims=True) + bounds[:, None] < limit for c in columns[1:]]
    usable = np.zeros((len(base), *options.usable.shape), bool)
    sites = [relaxation.usable[part] for part in relaxation.parts]
    for part, at, open_ in zip(relaxation.parts[1:], sites[1:], behind, strict=True):
        some = np.zeros((len(base), *at.shape), bool)
        some[:, at] = open_[:, 1:]
        usable[:, relaxation.ids[part]] = some
    here, levels = np.nonzero(sites[0])
    candidates = np.concatenate([[-1], relaxation.ids[relaxation.parts[0]][here]])
    levels = np.concatenate([[0], levels])
    fitting = (options.uses[candidates][None] <= members.room[:, None] * (1 + 1e-12)).all(2) | (candidates < 0)
    alive = fitting & (keys < limit)
    families = [
        (
            float(keys[i][alive[i]].min()),
            _Family(
                np.packbits(members.left[i] > 0), members.choices[i], float(members.ms[i]), int(members.wrong[i]),
                members.room[i], candidates[alive[i]], levels[alive[i]], relaxation.rows, prices, usable[i],
            ),
        )
        for i in np.flatnonzero(alive.any(1))
    ]  # fmt: skip
    return float(keys.min(initial=best.ms)), families
