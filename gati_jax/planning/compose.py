"""Composition: which caches, with which thresholds (GATI's composition phase).

A plan is a *path* of threshold vectors, from nothing that is known to go wrong to the disagreement asked for. It is
fixed and hashed before the ``certify`` split is opened; the certificate says how far along it one may go.

The path is greedy: every step lowers one threshold, or opens one cache, where that saves the most time for each request
that it makes disagree. Requests are counted jointly: a hit at an early site takes its request away from all later ones.
"""

import dataclasses
import hashlib
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt64

from gati_jax._errors import InputError

from .binomial import largest_passing
from .origin import Origin
from .tables import CostTable, ReplayTable, cascade_ms, replay_plan

SMALL_MOVE = 0.1  # of the budget; taken first, for a certificate can only stop between moves
MAX_THRESHOLDS = 64  # for each candidate: more would fit the noise of a few thousand requests


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
        if np.isnan(self.path).any() or (self.path == -np.inf).any():
            msg = "path: expected thresholds or infinity, got NaN or -infinity"
            raise InputError(msg)
        if np.isfinite(self.path[0]).any():
            msg = f"path: expected its first step to be the bare base, all infinite, got {self.path[0]}"
            raise InputError(msg)

    @property
    def hash(self) -> str:
        """Digest of all that must be fixed before ``certify`` is opened."""
        digest = hashlib.sha256(repr((self.names, self.sites, self.depth, self.path.shape, self.origin)).encode())
        digest.update(np.ascontiguousarray(self.path).tobytes())
        return digest.hexdigest()

    def thresholds(self, step: int) -> Float[np.ndarray, " caches"]:
        """Return step ``step``'s thresholds; all off where nothing was certified (step -1)."""
        return self.path[step] if step >= 0 else np.full(len(self.names), np.inf, np.float32)


def plan(
    table: ReplayTable, costs: CostTable, *, epsilon: float, delta: float = 0.05, max_sites: int | None = None
) -> Plan:
    """Compose a cascade on the ``select`` split.

    Args:
        table: Replay of the select split, with out-of-fold scores.
        costs: Measured times of the same base and candidates.
        epsilon: The disagreement to be certified; the path ends there.
        delta: The certificate's; the choice of caches aims at what a split as large as this one could certify.
        max_sites: At most so many caches.

    Raises:
        InputError: Tables of different bases, epsilon or delta outside (0, 1).
    """
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            msg = f"{name}: expected a number between 0 and 1, got {value}"
            raise InputError(msg)
    if table.depth != len(costs.blocks_ms) or not set(table.names) <= set(costs.lookup_ms):
        got = f"{len(costs.blocks_ms)} and {tuple(costs.lookup_ms)}"
        msg = f"costs: expected times of {table.depth} blocks and of {table.names}, got {got}"
        raise InputError(msg)
    if len(table) == 0:
        msg = "table: expected at least one request, got none"
        raise InputError(msg)
    table = table.take([table.names[i] for i in np.argsort(table.sites, kind="stable")])
    # The caches are chosen for what a split as large as this one could certify; the path goes on to epsilon, for luck.
    target = max(0, largest_passing(len(table), epsilon, delta))
    budgets = (target, int(epsilon * len(table) + 1e-9))
    best = _greedy(table, costs, budgets)
    best_ms = _ms_at(best, target)
    while best.names:
        smaller = [_greedy(table.take([n for n in best.names if n != name]), costs, budgets) for name in best.names]
        ms = [_ms_at(p, target) for p in smaller]
        too_many = max_sites is not None and len(best.names) > max_sites
        if not too_many and min(ms) > best_ms:
            break
        best, best_ms = smaller[int(np.argmin(ms))], min(ms)
    return _refined(best, table.take(best.names), costs)


def _refined(coarse: Plan, table: ReplayTable, costs: CostTable) -> Plan:
    """Put steps between those of a path, one for each request that comes to disagree.

    A certificate can only stop at a step, and fixed-sequence testing pays nothing for more of them.
    """
    path = [coarse.path[0]]
    for before, after in itertools.pairwise(coarse.path):
        most = max(replay_plan(table, thresholds).disagreement for thresholds in (before, after))
        for thresholds in _between(table, before, after):
            faster = cascade_ms(table, thresholds, costs) < cascade_ms(table, path[-1], costs)
            if faster and replay_plan(table, thresholds).disagreement <= most:
                path.append(thresholds)
        path.append(after)
    return dataclasses.replace(
        coarse,
        path=np.stack(path),
        disagreement=np.array([replay_plan(table, thresholds).disagreement for thresholds in path]),
        mean_ms=np.array([cascade_ms(table, thresholds, costs) for thresholds in path]),
    )


def _between(
    table: ReplayTable, before: Float[np.ndarray, " caches"], after: Float[np.ndarray, " caches"]
) -> list[Float[np.ndarray, " caches"]]:
    """Lower one threshold from ``before`` to ``after``, stopping short of every request that comes to disagree."""
    (cache,) = np.flatnonzero(before != after)
    then, now = replay_plan(table, before), replay_plan(table, after)
    moved = (now.exits == cache) & (then.exits != cache)
    scores = table.scores[cache]
    stops = []
    for wrong in np.unique(scores[moved & now.disagrees & ~then.disagrees])[::-1]:
        if len(short_of := scores[moved & (scores > wrong)]):
            stop = after.copy()
            stop[cache] = short_of.min()
            stops.append(stop)
    return stops


def _ms_at(candidate_plan: Plan, target: int) -> float:
    """Return the mean time at the last step before the first with more than ``target`` disagreements."""
    beyond = np.flatnonzero(candidate_plan.disagreement > (target + 0.5) / candidate_plan.n)
    return float(candidate_plan.mean_ms[beyond[0] - 1 if len(beyond) else -1])


class _Move(NamedTuple):
    """A step of the greedy path."""

    cache: int
    threshold: np.float32
    saved: float  # milliseconds, summed over requests
    wrong: int  # requests that come to disagree, less those that cease to


def _greedy(table: ReplayTable, costs: CostTable, budgets: tuple[int, ...]) -> Plan:
    """Walk the path to each budget of disagreements in turn, then keep the caches that it opened."""
    m, n = table.scores.shape
    grid = _Grid.of(table)
    thresholds = np.full(m, np.inf, np.float32)
    path, disagreement, mean = [thresholds.copy()], [0.0], [costs.full_ms]
    for budget in budgets:
        small = max(1, int(budget * SMALL_MOVE))
        while True:
            move = _best_move(table, costs, grid, thresholds, budget, small)
            move = move or _best_move(table, costs, grid, thresholds, budget, budget)
            if move is None:
                break
            thresholds[move.cache] = move.threshold
            path.append(thresholds.copy())
            disagreement.append(replay_plan(table, thresholds).disagreement)
            mean.append(cascade_ms(table, thresholds, costs))
    on = np.isfinite(thresholds)
    keep = [name for name, is_on in zip(table.names, on, strict=True) if is_on]
    kept = table.take(keep)
    return Plan(
        names=kept.names,
        sites=kept.sites,
        depth=table.depth,
        path=np.stack(path)[:, on],
        n=n,
        rows=table.rows,
        origin=kept.origin,
        disagreement=np.asarray(disagreement),
        mean_ms=np.asarray(mean),
    )


class _Grid(NamedTuple):
    """For each candidate the rows from its most to its least certain one, and where thresholds may lie."""

    order: Int[np.ndarray, "candidates n"]
    cuts: tuple[Int[np.ndarray, " thresholds"], ...]  # a threshold at cut i lets the first i + 1 rows of the order hit

    @classmethod
    def of(cls, table: ReplayTable) -> "_Grid":
        order = np.argsort(-table.scores, axis=1, kind="stable")
        ranked = np.take_along_axis(table.scores, order, 1)
        last = np.concatenate([ranked[:, 1:] < ranked[:, :-1], np.ones((len(ranked), 1), bool)], axis=1)
        ends = [np.flatnonzero(row) for row in last]  # a cut may not split equal scores
        thin = [np.unique(np.linspace(0, len(e) - 1, min(len(e), MAX_THRESHOLDS)).astype(int)) for e in ends]
        return cls(order, tuple(e[t] for e, t in zip(ends, thin, strict=True)))


def _best_move(
    table: ReplayTable,
    costs: CostTable,
    grid: _Grid,
    thresholds: Float[np.ndarray, " candidates"],
    budget: int,
    largest: int,
) -> _Move | None:
    """Return the move that saves the most for each new disagreement, or None if none saves within the budget.

    Moves that cost no disagreement come first, the largest saving first. No move costs more than ``largest``.
    """
    m, n = table.scores.shape
    if m == 0:
        return None
    outcome = replay_plan(table, thresholds)
    on = np.isfinite(thresholds)
    looked = np.cumsum(np.where(on, [costs.lookup_ms[name] for name in table.names], 0.0))
    blocks = np.array([costs.until(site) for site in (*table.sites, table.depth)])
    now_ms = blocks + np.append(looked, looked[-1])
    best: _Move | None = None
    spent = int(outcome.disagrees.sum())
    for c in range(m):
        if not on[c] and table.sites[c] in np.asarray(table.sites)[on]:
            continue  # one cache at a site
        # A request that leaves at c or before keeps its exit; the others come to c if their score is high enough.
        later = outcome.exits > c
        lookup_ms = 0.0 if on[c] else costs.lookup_ms[table.names[c]]
        opening = lookup_ms * int(later.sum())
        here_ms = blocks[c] + looked[c]
        order = grid.order[c]
        saved = np.cumsum(np.where(later, now_ms[outcome.exits] - here_ms, 0.0)[order]) - opening
        wrong = np.cumsum(np.where(later, (~table.agrees[c]).astype(int) - outcome.disagrees, 0)[order])
        cuts = grid.cuts[c]
        affordable = wrong[cuts] <= min(budget - spent, largest)
        cuts = cuts[(saved[cuts] > 1e-9 * n) & affordable & (table.scores[c][order[cuts]] < thresholds[c])]
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
