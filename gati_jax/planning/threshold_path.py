"""Plans: the composed caches, and a path of thresholds through the composition to the disagreement asked for.

A certificate can only stop at a step of the path, so the path is made fine: it starts at the bare base, opens caches
and lowers thresholds one at a time, and has a step before every request that comes to disagree.
"""

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt64

from gati_jax.display import html_table
from gati_jax.errors import InputError, check_share, listed, text_table

from .binomial import largest_passing, rows_needed, samples_needed
from .compose import Budget, Composition, check_tables, compose, least_disagreement
from .problem import MAX_THRESHOLDS
from .tables import NO_ROWS, CostTable, ReplaySource, ReplayTable, cascade_ms, exit_ms, replay_plan

SECONDS = 30.0  # of search
SMALL_MOVE = 0.1  # of the budget; taken first, for a certificate can only stop between moves

_log = logging.getLogger(__name__)

Thresholds = Float[np.ndarray, " candidates"]


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
    source: ReplaySource = ReplaySource()  # noqa: RUF009 (frozen)
    fitted_rows: UInt64[np.ndarray, " fitted"] = dataclasses.field(default_factory=lambda: NO_ROWS, repr=False)
    """Digests of the rows that its caches were fitted on, where they are known; a saved plan leaves them out."""

    def __post_init__(self) -> None:
        """Check that the columns belong together; thresholds are compared with float32 scores.

        Raises:
            InputError: Names the field.
        """
        object.__setattr__(self, "path", np.asarray(self.path, np.float32))
        steps, caches = len(self.disagreement), len(self.names)
        if self.path.shape != (steps, caches) or len(self.mean_ms) != steps or len(self.sites) != caches or steps == 0:
            raise InputError(f"path: expected shape [steps, caches] = [{steps}, {caches}], got {list(self.path.shape)}")
        if self.rows.shape != (self.n,):
            raise InputError(f"rows: expected the digests of n = {self.n} requests, got shape {list(self.rows.shape)}")
        if np.isnan(self.path).any() or (self.path == -np.inf).any():
            raise InputError("path: expected thresholds or infinity, got NaN or -infinity")
        if np.isfinite(self.path[0]).any():
            raise InputError(f"path: expected its first step to be the bare base, all infinite, got {self.path[0]}")

    @property
    def hash(self) -> str:
        """Digest of what must be fixed before the certify split is opened; certificates name ``rows`` separately."""
        # Certificates hold this digest, so its text must not change: it still calls the source "Origin".
        source = repr(self.source).replace(ReplaySource.__name__, "Origin", 1)
        text = f"({self.names!r}, {self.sites!r}, {self.depth!r}, {self.path.shape!r}, {source})"
        digest = hashlib.sha256(text.encode())
        digest.update(np.ascontiguousarray(self.path).tobytes())
        return digest.hexdigest()

    def thresholds(self, step: int) -> Float[np.ndarray, " caches"]:
        """Return step ``step``'s thresholds; all off where nothing was certified (step -1)."""
        return self.path[step] if step >= 0 else np.full(len(self.names), np.inf, np.float32)

    @property
    def least_disagreement(self) -> float:
        """What composition saw on the first step that opens a cache; 0 if none does."""
        opened = np.isfinite(self.path).any(axis=1)
        return float(self.disagreement[np.argmax(opened)]) if opened.any() else 0.0

    def summary(self, step: int | None = None) -> str:
        """Return the plan as text: its caches with their thresholds, and what composition saw.

        Args:
            step: Of the path, such as a certificate's; None: the last one.
        """
        if not self.names:
            return f"EMPTY PLAN: it has no cache, the base answers every request (composed on {self.n} rows)"
        step = len(self.path) - 1 if step is None else step
        return f"{text_table(*self._table(step))}\n  {self._seen(step)}"

    def _repr_html_(self) -> str:
        """Return it as a notebook shows it: its caches at the last step of the path."""
        last = len(self.path) - 1
        if not self.names:
            return html_table("Plan", (), [(self.summary(),)])
        loosest = "These are the loosest thresholds, of the last step; a certificate says how far they may be used."
        return html_table(*self._table(last), notes=[loosest, self._seen(last)])

    def _table(self, step: int) -> tuple[str, tuple[str, ...], list[tuple[object, ...]]]:
        shown = [(t if np.isfinite(t) else "off") for t in self.thresholds(step).tolist()]
        title = f"Plan: caches at {len(self.names)} of {self.depth} sites, composed on {self.n} rows"
        return title, ("cache", "site", "threshold"), list(zip(self.names, self.sites, shown, strict=True))

    def _seen(self, step: int) -> str:
        at = max(step, 0)
        seen = f"{self.disagreement[at]:.2%} of these rows disagree; {self.mean_ms[at]:.4g} ms, without caches"
        return f"step {step} of {len(self.path) - 1}: {seen} {self.mean_ms[0]:.4g}"

    def __repr__(self) -> str:
        """Describe it in a line."""
        caches = listed(self.names, room=150) or "no cache"
        last = f"{len(self.path)} steps to {self.disagreement[-1]:.2%}"
        return f"Plan({caches}; {self.depth} blocks, {last} on {self.n} rows)"


def plan(
    table: ReplayTable,
    costs: CostTable,
    *,
    epsilon: float,
    delta: float = 0.05,
    max_sites: int | None = None,
    memory_bytes: int | None = None,
    worst_ms: float | None = None,
    bytes: Mapping[str, int] | None = None,  # noqa: A002
    seconds: float = SECONDS,
) -> Plan:
    """Compose a cascade on the ``select`` split.

    Args:
        table: Replay of the select split, with out-of-fold scores.
        costs: Measured times of the same base and candidates.
        epsilon: The disagreement to be certified; the path ends there.
        delta: The certificate's; the choice of caches aims at what a split as large as this one could certify.
        max_sites: At most so many caches.
        memory_bytes: At most so many for all caches together; needs ``bytes``.
        worst_ms: At most so long for a request that no cache answers.
        bytes: For each candidate by name.
        seconds: To search for the best caches.

    Raises:
        InputError: Tables of different bases, epsilon or delta outside (0, 1).
    """
    return compose_plan(
        table, costs, epsilon=epsilon, delta=delta, memory_bytes=memory_bytes, worst_ms=worst_ms, sites=max_sites,
        bytes=bytes, seconds=seconds,
    )[0]  # fmt: skip


def compose_plan(
    table: ReplayTable,
    costs: CostTable,
    *,
    epsilon: float,
    delta: float = 0.05,
    memory_bytes: int | None = None,
    worst_ms: float | None = None,
    sites: int | None = None,
    bytes: Mapping[str, int] | None = None,  # noqa: A002
    seconds: float = SECONDS,
    composed: Composition | None = None,
) -> tuple[Plan, Composition]:
    """Return a plan as `plan` does, with the same arguments, and the composition that its path leads through.

    ``composed``, from an earlier call with the same arguments, takes the place of a search and gives the same plan
    again; a search that runs out of time ends elsewhere on a busier machine.

    Raises:
        InputError: As `plan`.
    """
    check_share("epsilon", epsilon)
    check_share("delta", delta)
    check_tables(table, costs)
    # The caches are chosen for what a split as large as this one could certify; the path goes on to epsilon, in case
    # the certify split turns out better.
    target = max(0, largest_passing(len(table), epsilon, delta))
    budget = Budget(disagreements=target, memory_bytes=memory_bytes, worst_ms=worst_ms, sites=sites)
    composition = composed or compose(table, costs, budget, bytes=bytes, seconds=seconds)
    part = table.take(composition.names)
    goal = np.array(composition.thresholds, np.float32)
    path = _refined(_path(part, costs, goal, target, int(epsilon * len(table) + 1e-9)), part, costs)
    opened = np.isfinite(path[-1])  # a cache of the composition that never saves time by itself stays off
    kept = part.take([name for name, is_on in zip(part.names, opened, strict=True) if is_on])
    steps = [thresholds[opened] for thresholds in path]
    if not kept.names:
        _log.warning(
            "plan: EMPTY, the base answers every request: %s", _why_empty(table, costs, epsilon, delta, composition)
        )
    return Plan(
        names=kept.names,
        sites=kept.sites,
        depth=table.depth,
        path=np.stack(steps),
        disagreement=np.array([replay_plan(kept, thresholds).disagreement for thresholds in steps]),
        mean_ms=np.array([cascade_ms(kept, thresholds, costs) for thresholds in steps]),
        n=len(table),
        rows=table.rows,
        source=kept.source,
        fitted_rows=kept.fitted_rows,
    ), composition


def _why_empty(table: ReplayTable, costs: CostTable, epsilon: float, delta: float, composition: Composition) -> str:
    """Say why no cache was chosen, and how many rows it would take."""
    rate = least_disagreement(table, costs)
    if rate is None:
        return "no candidate saves time at any threshold, for lookups take longer than the blocks behind them"
    needed = samples_needed(rate, epsilon, delta)
    if needed is not None and needed <= len(table):  # rows are not what is missing
        return next((f"{name}: {why}" for name, why in composition.refused.items()), "no cache is within the budgets")
    takes = rows_needed(rate, epsilon, delta)
    return f"none that saves time can be certified at {epsilon:.2%} by {len(table)} rows: {takes}"


def _path(table: ReplayTable, costs: CostTable, goal: Thresholds, target: int, last: int) -> list[Thresholds]:
    """Walk from the bare base down to the composition, and from there on to the last budget."""
    path = walk(table, costs, start=np.full_like(goal, np.inf), floor=goal, budget=target)
    if cascade_ms(table, goal, costs) < cascade_ms(table, path[-1], costs):
        path.append(goal)  # no single move leads there
    return path + walk(table, costs, start=path[-1], floor=np.full_like(goal, -np.inf), budget=last)[1:]


def _refined(coarse: list[Thresholds], table: ReplayTable, costs: CostTable) -> list[Thresholds]:
    """Put steps between those of a path, one for each request that comes to disagree.

    They cost no confidence: fixed-sequence testing needs no correction for the number of steps.
    """
    path = [coarse[0]]
    for before, after in itertools.pairwise(coarse):
        most = max(replay_plan(table, thresholds).disagreement for thresholds in (before, after))
        for thresholds in _between(table, before, after):
            faster = cascade_ms(table, thresholds, costs) < cascade_ms(table, path[-1], costs)
            if faster and replay_plan(table, thresholds).disagreement <= most:
                path.append(thresholds)
        path.append(after)
    return path


def _between(table: ReplayTable, before: Thresholds, after: Thresholds) -> list[Thresholds]:
    """Lower one threshold from ``before`` to ``after``, stopping short of every request that comes to disagree."""
    changed = np.flatnonzero(before != after)
    if len(changed) != 1:
        return []
    cache = int(changed[0])
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


def walk(
    table: ReplayTable, costs: CostTable, *, start: Thresholds, floor: Thresholds, budget: int
) -> list[Thresholds]:
    """Return the steps of a greedy walk from ``start`` on, not below ``floor``, to a budget of disagreements.

    Each step lowers one threshold, or opens one cache, where that saves most per new disagreement. Requests are counted
    jointly: a hit at an early site takes its request away from all later ones.

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
