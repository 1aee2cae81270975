"""A path for conditional certificates: on each of its steps every open exit has enough requests, and few that disagree.

The greedy path of ``plan`` watches the disagreement of all requests together: an early cache opens for a handful of
them, and may be wrong on more than its share. ``certify_conditional`` would stop there.
"""

import numpy as np
from jaxtyping import Float
from scipy.special import bdtr

from gati_jax._errors import InputError

from .greedy import MAX_THRESHOLDS
from .planned import Plan
from .tables import CostTable, Outcome, ReplayTable, cascade_ms, replay_plan

LEVELS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0)
"""Times delta, what every exit's p-value may be on the select split: sure steps first, and some for luck at the end."""
ROUNDS = 3  # over all caches, on each level; more find hardly anything


def conditional_plan(
    plan: Plan, table: ReplayTable, costs: CostTable, alpha: float, delta: float = 0.05, *, n: int | None = None
) -> Plan:
    """Lay a new path through a plan's caches for ``certify_conditional``; on ``select``, before ``certify`` is opened.

    Caches open from the deepest to the earliest, as in the testing stage of Ringel et al. (ICML 2024): where an early
    exit fails, the late ones stay. Each step moves one threshold to where the mean time is the smallest among those at
    which every exit would pass on the select split, first with a wide margin, then with less and less.

    Args:
        plan: Names the caches.
        table: Replay of the select split with them, with out-of-fold scores.
        costs: Measured times.
        alpha: The disagreement to be certified at every exit.
        delta: The certificate's, after division by looks and plans.
        n: Requests of the certify split, if not as many as of this one.

    Raises:
        InputError: alpha, delta or n is out of range; the table lacks a cache or is empty.
    """
    for name, value in (("alpha", alpha), ("delta", delta)):
        if not 0 < value < 1:
            msg = f"{name}: expected a number between 0 and 1, got {value}"
            raise InputError(msg)
    if len(table) == 0 or (n is not None and n < 1):
        msg = f"table, n: expected at least one request, got {len(table)} and {n}"
        raise InputError(msg)
    table = table.take(plan.names)
    scale = (n or len(table)) / len(table)
    path = [np.full(len(table.names), np.inf, np.float32)]
    mean_ms = [costs.full_ms]
    for level in LEVELS:
        for _ in range(ROUNDS):
            steps = len(path)
            for cache in reversed(range(len(table.names))):
                moved = _moved(table, costs, path[-1], cache, (alpha, min(level * delta, 0.5), scale))
                if moved is not None and (ms := cascade_ms(table, moved, costs)) < mean_ms[-1]:
                    path.append(moved)
                    mean_ms.append(ms)
            if len(path) == steps:
                break
    return _of_opened(table, path, mean_ms)


def _moved(
    table: ReplayTable,
    costs: CostTable,
    thresholds: Float[np.ndarray, " caches"],
    cache: int,
    terms: tuple[float, float, float],
) -> Float[np.ndarray, " caches"] | None:
    """Return the thresholds with that of one cache where the mean time is the smallest and every exit passes."""
    scores = np.unique(table.scores[cache][np.isfinite(table.scores[cache])])
    spaced = np.linspace(0, len(scores) - 1, min(len(scores), MAX_THRESHOLDS)).astype(int)
    on = np.isfinite(thresholds)
    on[cache] = True
    looked = np.cumsum(np.where(on, [costs.lookup_ms[name] for name in table.names], 0.0))
    ms = np.array([costs.until(site) for site in (*table.sites, table.depth)]) + np.append(looked, looked[-1])
    # Where several caches stand at one site, the last of them counts the site's exits.
    last = list({table.sites[c]: c for c in np.flatnonzero(on).tolist()}.values())
    best, best_ms = None, np.inf
    for threshold in scores[spaced]:
        trial = thresholds.copy()
        trial[cache] = threshold
        outcome = replay_plan(table, trial)
        mean = float(ms[outcome.exits].mean())
        if mean < best_ms and _passes(outcome, last, *terms):
            best, best_ms = trial, mean
    return best


def _passes(outcome: Outcome, last: list[int], alpha: float, level: float, scale: float) -> bool:
    """Say whether every open exit would pass with ``scale`` times as many requests as these."""
    left = np.cumsum(np.bincount(outcome.exits, minlength=last[-1] + 1))[last]
    wrong = np.cumsum(np.bincount(outcome.exits[outcome.disagrees], minlength=last[-1] + 1))[last]
    return bool(np.all(bdtr(np.ceil(wrong * scale), np.floor(left * scale).astype(int), alpha) <= level))


def _of_opened(table: ReplayTable, path: list[Float[np.ndarray, " caches"]], mean_ms: list[float]) -> Plan:
    """Return the plan of the caches that some step opens."""
    steps = np.stack(path)
    on = [bool(np.isfinite(column).any()) for column in steps.T]
    kept = table.take([name for name, is_on in zip(table.names, on, strict=True) if is_on])
    return Plan(
        names=kept.names,
        sites=kept.sites,
        depth=table.depth,
        path=steps[:, np.asarray(on, bool)],
        disagreement=np.array([replay_plan(table, thresholds).disagreement for thresholds in path]),
        mean_ms=np.array(mean_ms),
        n=len(table),
        rows=table.rows,
        origin=kept.origin,
    )
