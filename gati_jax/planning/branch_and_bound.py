"""Branch and bound over the sites from the first to the last, best bound first.

A node is a prefix: what is open up to a site is decided, so the requests that are left, the time and the wrong answers
are exact; the Lagrangian relaxation bounds what the rest takes. Nodes that share all but their last decision are
bounded together, with multipliers that suit their mean.
"""

import heapq
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from .lagrangian import Multipliers, Relaxation, ascend
from .local_search import Found, polish
from .problem import Choice, Problem, cost_to_go, evaluate, within

TOLERANCE = 1e-9  # relative: bounds are sums of floats
ROOT_STEPS, ROOT_RANGE = 1500, (1.5, 0.02)
NODE_STEPS, NODE_RANGE = 12, (0.6, 0.1)


class Result(NamedTuple):
    """Where a search ended."""

    found: Found
    bound_ms: float  # no choice takes less
    nodes: int
    multipliers: Multipliers  # of the root, so of all choices


class _Family(NamedTuple):
    """A decided prefix, and the options of its next site that may lead to something better."""

    left: UInt8[np.ndarray, " packed"]
    choice: Choice
    ms: float
    wrong: int
    room: Float[np.ndarray, " resources"]
    candidates: Int[np.ndarray, " members"]  # -1: closed
    levels: Int[np.ndarray, " members"]
    rows: Int[np.ndarray, " n"]  # the requests that have multipliers
    multipliers: Multipliers
    usable: Bool[np.ndarray, "candidates thresholds"]  # what may be chosen at later sites


class _Members(NamedTuple):
    """A family's members, evaluated exactly."""

    left: Float[np.ndarray, "members n"]
    choices: list[Choice]
    ms: Float[np.ndarray, " members"]
    wrong: Int[np.ndarray, " members"]
    room: Float[np.ndarray, "members resources"]


def solve(
    problem: Problem,
    start: Found,
    multipliers: Multipliers,
    *,
    out_of_time: Callable[[float], bool],
    progress: Callable[[int, float, float], None],
) -> Result:
    """Find the best choice, or a bound on it where the time runs out.

    Args:
        problem: What to solve.
        start: A choice within the budgets.
        multipliers: To start from: `initial_multipliers`, or those that a search with other thresholds ended with.
        out_of_time: Called between nodes with the gap: the share of the best time that might still be saved.
        progress: Called with the number of nodes, the best time and the bound.
    """
    ticket = itertools.count()
    whole = _Family(
        np.packbits(np.ones(problem.n, bool)), (), problem.start_ms, 0, problem.limits,
        np.array([-1]), np.array([0]), np.arange(problem.n), multipliers, problem.usable,
    )  # fmt: skip
    best, nodes, node_steps = start, 0, _schedule(NODE_STEPS, NODE_RANGE)
    root_steps = _schedule(ROOT_STEPS, ROOT_RANGE)
    bound, families = _expand(problem, whole, _root(problem), best, root_steps, lambda: out_of_time(1.0))
    bound = max(bound, problem.start_ms)
    multipliers = families[0][1].multipliers if families else multipliers
    heap = [(key, next(ticket), family) for key, family in families]
    heapq.heapify(heap)
    while heap and (bound := max(bound, heap[0][0])) < best.ms - TOLERANCE * best.ms:
        if out_of_time(1 - bound / best.ms):
            return Result(best, min(bound, best.ms), nodes, multipliers)
        key, _, family = heapq.heappop(heap)
        members = _members(problem, family, best)
        nodes += len(members.choices)
        best = _improve(problem, members, best)
        _, children = _expand(problem, family, members, best, node_steps, lambda: False)
        for child_key, child in children:
            heapq.heappush(heap, (max(key, child_key), next(ticket), child))
        progress(nodes, best.ms, min(bound, best.ms))
    return Result(best, best.ms, nodes, multipliers)


def _schedule(steps: int, ends: tuple[float, float]) -> tuple[float, ...]:
    return tuple(np.geomspace(*ends, steps).tolist())


def initial_multipliers(problem: Problem, choice: Choice, penalty: float) -> Multipliers:
    """Return multipliers from what the requests take under a good choice: they bound that choice by its own time.

    Args:
        problem: What to solve.
        choice: A good one.
        penalty: About the time that one more wrong answer would save, in ms.
    """
    ms, _ = cost_to_go(problem, choice, penalty)
    return Multipliers(ms[1:-1], penalty, np.zeros(len(problem.limits)))


def _root(problem: Problem) -> _Members:
    one = np.ones((1, problem.n))
    return _Members(one, [()], np.array([problem.start_ms]), np.array([0]), problem.limits[None])


def _members(problem: Problem, family: _Family, best: Found) -> _Members:
    """Decide a family's site in each of the ways that are left."""
    site = len(family.choice)
    left = np.unpackbits(family.left, count=problem.n).astype(bool)
    c, t = family.candidates, family.levels
    opened = (c >= 0)[:, None]
    hits = (problem.level[c][:, left] <= t[:, None]) & opened
    wrong = family.wrong + (hits & problem.wrong[c][:, left]).sum(1)
    on = np.zeros((len(c), problem.n))
    on[:, left] = ~hits
    lookup = np.where(c >= 0, problem.lookup_ms[c], 0.0)
    ms = family.ms + lookup * left.sum() + problem.span_ms[site] * on.sum(1)
    keep = (wrong <= problem.disagreements) & (ms < best.ms - TOLERANCE * best.ms)
    room = family.room - np.where(opened, problem.uses[c], 0.0)
    chosen = [None if i < 0 else (int(i), int(j)) for i, j in zip(c[keep], t[keep], strict=True)]
    return _Members(on[keep], [(*family.choice, o) for o in chosen], ms[keep], wrong[keep], room[keep])


def _improve(problem: Problem, members: _Members, best: Found) -> Found:
    """Try every member with all later sites closed."""
    if not len(members.ms):
        return best
    sites = len(members.choices[0])
    ms = members.ms + problem.span_ms[sites:].sum() * members.left.sum(1)
    i = int(ms.argmin())
    if ms[i] < best.ms - TOLERANCE * best.ms:
        choice = (*members.choices[i], *(None,) * (problem.sites - sites))
        best = min(polish(problem, choice), Found(evaluate(problem, choice)[0], choice), key=lambda found: found.ms)
    return best


def _expand(
    problem: Problem, family: _Family, members: _Members, best: Found, steps: tuple[float, ...],
    out_of_time: Callable[[], bool],
) -> tuple[float, list[tuple[float, _Family]]]:  # fmt: skip
    """Bound the members, and return a family for each that may lead to something better."""
    if not len(members.ms) or len(members.choices[0]) == problem.sites:
        return best.ms, []
    first = len(members.choices[0])
    mean = members.left.mean(0)
    rows = np.flatnonzero(mean)
    if not len(rows):
        return best.ms, []  # no request is left: `_improve` has seen these members
    room, fixed = members.room.max(0), float(members.ms.mean())
    relaxation = Relaxation(problem, first, rows, mean[rows], room, family.usable)
    decided = first - (problem.sites - 1 - len(family.multipliers.flow))  # sites that need no multipliers any more
    multipliers = family.multipliers._replace(
        flow=family.multipliers.flow[decided:, np.searchsorted(family.rows, rows)]
    )
    wrong_left = problem.disagreements - float(members.wrong.mean())
    for i in range(0, len(steps), 100):
        if out_of_time():
            break
        multipliers = ascend(
            relaxation, multipliers, target=best.ms - fixed, wrong_left=wrong_left, room=room, steps=steps[i : i + 100]
        )
    return _bounded(relaxation, members, multipliers, best)


def _option_costs(relaxation: Relaxation, members: _Members, multipliers: Multipliers) -> list[np.ndarray]:
    """Return for each site float[members, options]: what each option comes to, the closed site first."""
    left = members.left[:, relaxation.rows]
    extra = relaxation.problem.uses[relaxation.ids] @ multipliers.uses
    columns = []
    for s, part in enumerate(relaxation.parts):
        closed, miss, hit = relaxation.costs(s, multipliers)
        values = [(left @ closed)[:, None]]
        for i, c in enumerate(range(part.start, part.stop)):
            stops = np.flatnonzero(relaxation.usable[c])
            gain = (hit[i] - miss[i])[:, None] * (relaxation.level[c][:, None] <= stops)
            values.append((left @ miss[i])[:, None] + left @ gain + extra[c])
        columns.append(np.concatenate(values, axis=1))
    return columns


def _bounded(
    relaxation: Relaxation, members: _Members, multipliers: Multipliers, best: Found
) -> tuple[float, list[tuple[float, _Family]]]:
    """Bound each member by itself, at multipliers common to all."""
    problem, columns = relaxation.problem, _option_costs(relaxation, members, multipliers)
    finite = np.isfinite(members.room[0])
    base = members.ms + multipliers.wrong * (members.wrong - problem.disagreements)
    base = base - members.room[:, finite] @ multipliers.uses[finite] + sum(column.min(1) for column in columns[1:])
    keys = base[:, None] + columns[0]
    bounds = keys.min(1)
    limit = best.ms - TOLERANCE * best.ms
    # An option that would lift a member's bound to the best time need not be considered at its later sites.
    behind = [c - c.min(1, keepdims=True) + bounds[:, None] < limit for c in columns[1:]]
    usable = np.zeros((len(base), *problem.usable.shape), bool)
    sites = [relaxation.usable[part] for part in relaxation.parts]
    for part, at, open_ in zip(relaxation.parts[1:], sites[1:], behind, strict=True):
        some = np.zeros((len(base), *at.shape), bool)
        some[:, at] = open_[:, 1:]
        usable[:, relaxation.ids[part]] = some
    here, levels = np.nonzero(sites[0])
    candidates = np.concatenate([[-1], relaxation.ids[relaxation.parts[0]][here]])
    levels = np.concatenate([[0], levels])
    fitting = within(problem.uses[candidates], members.room[:, None]) | (candidates < 0)
    alive = fitting & (keys < limit)
    families = [
        (
            float(keys[i][alive[i]].min()),
            _Family(
                np.packbits(members.left[i] > 0), members.choices[i], float(members.ms[i]), int(members.wrong[i]),
                members.room[i], candidates[alive[i]], levels[alive[i]], relaxation.rows, multipliers, usable[i],
            ),
        )
        for i in np.flatnonzero(alive.any(1))
    ]  # fmt: skip
    return float(keys.min(initial=best.ms)), families
