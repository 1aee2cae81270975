"""What an evaluation shows beyond its totals: where caches stand, steps beside the plan's, classes, and examples."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from gati_jax.bundle import Bundle
from gati_jax.bundle.record import costs_of
from gati_jax.errors import InputError
from gati_jax.planning import CostTable, ReplayTable, cascade_ms, replay_plan
from gati_jax.profiling.costs import unsteady
from gati_jax.runtime import Prediction

from .records import ClassResult, Confusion, Layout, PathPoint, PlacedCache, Sample

MOST_STEPS, MOST_CONFUSIONS = 40, 12
MOST_BY_EXIT, MOST_DISAGREEING = 8, 24


def costs_of_plan(bundle: Bundle) -> CostTable | None:
    """Return the bundle's costs for the device nearest to this one, if they are of all of the plan's caches."""
    try:
        costs = costs_of(bundle)
    except InputError:
        return None
    return costs if set(bundle.plan.names) <= set(costs.lookup_ms) else None


def layout(bundle: Bundle, costs: CostTable | None) -> Layout:
    """Return the network and the caches that are on."""
    placed = [
        PlacedCache(
            name=cache.name,
            site=cache.site,
            threshold=threshold,
            bytes=cache.bytes,
            lookup_ms=costs.lookup_ms[cache.name] if costs else None,
        )
        for cache, threshold in zip(
            bundle.cascade.caches, np.asarray(bundle.cascade.thresholds, np.float64).tolist(), strict=True
        )
    ]
    if costs is None:
        return Layout(blocks=len(bundle.chain), caches=tuple(placed))
    return Layout(
        blocks=len(bundle.chain),
        blocks_ms=costs.blocks_ms,
        device=costs.device,
        batch=costs.batch,
        unsteady=unsteady(costs),
        caches=tuple(placed),
    )


def path_points(bundle: Bundle, table: ReplayTable, costs: CostTable) -> tuple[PathPoint, ...]:
    """Replay steps of the plan's path, evenly spread over it, and the one that answers.

    Args:
        bundle: The bundle.
        table: The replay of all of its plan's caches, in the plan's order.
        costs: Of all these caches.
    """
    plan, answers = bundle.plan, max(0, bundle.certificate.step)
    last = len(plan.path) - 1
    steps = {answers, *np.linspace(0, last, min(last + 1, MOST_STEPS)).round().astype(int).tolist()}
    points = []
    for step in sorted(steps):
        outcome = replay_plan(table, plan.path[step])
        right = None if table.labels is None else float((outcome.classes == table.labels).mean())
        ms = cascade_ms(table, plan.path[step], costs)
        agreement = 1 - outcome.disagreement
        points.append(PathPoint(step=step, ms=ms, agreement=agreement, accuracy=right, certified=step == answers))
    return tuple(points)


def class_results(
    bundle: Bundle,
    table: ReplayTable,
    exits: Int[np.ndarray, " n"],
    agrees: Bool[np.ndarray, " n"],
    stops: Sequence[int],
) -> tuple[ClassResult, ...]:
    """Count exits and disagreements by the base's answer.

    Args:
        bundle: For the names of classes.
        table: With the base's answers.
        exits: Where each request leaves.
        agrees: Whether its answer is the base's.
        stops: All exits, in the order in which they are counted.
    """
    found, which = np.unique(table.answers, return_inverse=True)
    columns = [np.bincount(which[exits == stop], minlength=len(found)) for stop in stops]
    by_exit, wrong = np.stack(columns, axis=1), np.bincount(which[~agrees], minlength=len(found))
    order = sorted(range(len(found)), key=lambda i: (-int(by_exit[i].sum()), int(found[i])))
    return tuple(
        ClassResult(
            index=int(found[i]),
            name=class_name(bundle, int(found[i])),
            n=int(by_exit[i].sum()),
            exits=tuple(by_exit[i].tolist()),
            disagreements=int(wrong[i]),
        )
        for i in order
    )


def confusions(bundle: Bundle, table: ReplayTable, prediction: Prediction) -> tuple[Confusion, ...]:
    """Count which class the cascade gave in place of which, the most frequent pairs first."""
    pairs = np.stack([table.answers, np.asarray(prediction.class_index)], axis=1)
    found, counts = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_CONFUSIONS]
    names = [[class_name(bundle, index) for index in found[i].tolist()] for i in order]
    return tuple(
        Confusion(base=base, cascade=cascade, n=int(counts[i])) for i, (base, cascade) in zip(order, names, strict=True)
    )


def samples(
    bundle: Bundle, table: ReplayTable, prediction: Prediction, agrees: Bool[np.ndarray, " n"]
) -> tuple[Sample, ...]:
    """Choose requests to show: of every exit some that agree, of different classes, and then some that do not.

    Those with higher scores come first.
    """
    exits, scores = np.asarray(prediction.exit), np.asarray(prediction.score, np.float64)
    order = np.argsort(-scores, kind="stable")
    chosen: list[int] = []
    for stop in np.unique(exits):
        chosen += _mixed(order[(exits == stop)[order] & agrees[order]], table.answers)[:MOST_BY_EXIT]
    chosen += order[~agrees[order]][:MOST_DISAGREEING].tolist()
    return tuple(
        Sample(
            row=int(row),
            exit=int(exits[row]),
            score=float(scores[row]) if np.isfinite(scores[row]) else None,
            base=class_name(bundle, int(table.answers[row])),
            cascade=class_name(bundle, int(prediction.class_index[row])),
            label=None if table.labels is None else class_name(bundle, int(table.labels[row])),
            agrees=bool(agrees[row]),
        )
        for row in chosen
    )


def _mixed(rows: Int[np.ndarray, " m"], answers: Int[np.ndarray, " n"]) -> list[int]:
    """Return rows with the first of every class before the second of any."""
    seen: Counter[int] = Counter()
    turns = []
    for row in rows.tolist():
        turns.append(seen[int(answers[row])])
        seen[int(answers[row])] += 1
    return rows[np.argsort(turns, kind="stable")].tolist() if turns else []


def class_name(bundle: Bundle, index: int) -> str:
    """Return the name of a class; its number where it has none."""
    return bundle.class_names[index] if index < len(bundle.class_names) else str(index)
