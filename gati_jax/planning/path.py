"""Plans: the composed caches, and a path of thresholds through the composition to the disagreement asked for."""

import itertools
from collections.abc import Mapping

import numpy as np

from gati_jax._errors import InputError

from .binomial import largest_passing
from .compose import Budget, Composition, check_tables, compose
from .greedy import Thresholds, walk
from .planned import Plan
from .tables import CostTable, ReplayTable, cascade_ms, replay_plan

SECONDS = 30.0


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
    """Return a plan as `plan` does, and the composition that it goes through, with its proof and what it refused.

    A search that runs out of time ends elsewhere on a busier machine. ``composed``, from an earlier call with the same
    arguments, is gone through again instead, and gives the same plan.

    Raises:
        InputError: As `plan`.
    """
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            msg = f"{name}: expected a number between 0 and 1, got {value}"
            raise InputError(msg)
    check_tables(table, costs)
    # The caches are chosen for what a split as large as this one could certify; the path goes on to epsilon, for luck.
    target = max(0, largest_passing(len(table), epsilon, delta))
    budget = Budget(disagreements=target, memory_bytes=memory_bytes, worst_ms=worst_ms, sites=sites)
    composition = composed or compose(table, costs, budget, bytes=bytes, seconds=seconds)
    part = table.take(composition.names)
    goal = np.array(composition.thresholds, np.float32)
    path = _refined(_path(part, costs, goal, target, int(epsilon * len(table) + 1e-9)), part, costs)
    opened = np.isfinite(path[-1])  # one that never saves anything by itself may be left over
    kept = part.take([name for name, is_on in zip(part.names, opened, strict=True) if is_on])
    steps = [thresholds[opened] for thresholds in path]
    made = Plan(
        names=kept.names,
        sites=kept.sites,
        depth=table.depth,
        path=np.stack(steps),
        disagreement=np.array([replay_plan(kept, thresholds).disagreement for thresholds in steps]),
        mean_ms=np.array([cascade_ms(kept, thresholds, costs) for thresholds in steps]),
        n=len(table),
        rows=table.rows,
        origin=kept.origin,
    )
    return made, composition


def _path(table: ReplayTable, costs: CostTable, goal: Thresholds, target: int, last: int) -> list[Thresholds]:
    """Walk from nothing to the composition, which leads through nothing below it, and on to the last budget."""
    path = walk(table, costs, start=np.full_like(goal, np.inf), floor=goal, budget=target)
    if cascade_ms(table, goal, costs) < cascade_ms(table, path[-1], costs):
        path.append(goal)  # no single move led there
    return path + walk(table, costs, start=path[-1], floor=np.full_like(goal, -np.inf), budget=last)[1:]


def _refined(coarse: list[Thresholds], table: ReplayTable, costs: CostTable) -> list[Thresholds]:
    """Put steps between those of a path, one for each request that comes to disagree.

    A certificate can only stop at a step, and fixed-sequence testing pays nothing for more of them.
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
