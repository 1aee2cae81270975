"""Figures of time: how requests' times are distributed, and what agreement costs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gati_jax import InputError
from gati_jax.evaluation.records import PathPoint

from ..results import Evaluation
from .svg import Drawing, Scale, text_width
from .words import milliseconds, quantile, share

BINS, TALL = 44, 62
LOG_FROM = 12  # times from the fastest to the slowest


def latency(e: Evaluation, width: float) -> Drawing:
    """Draw two histograms on one axis: the full network's times above, the cascade's below."""
    if e.cost is None:
        raise InputError("evaluation: expected measured times to draw, got none")
    first = e.cost.measured[0]
    each = first.full_each_ms, first.cascade_each_ms
    low, high = min(map(min, each)), max(quantile(times, 0.99) for times in each)
    high = max(high, low * 1.1)
    log = high / low > LOG_FROM
    x = Scale(low if log else 0.0, high, 12, width - 14, log=log)
    d = Drawing(width, 2 * (TALL + 34) + 44)
    edges = np.geomspace(low, high, BINS + 1) if log else np.linspace(0, high, BINS + 1)
    bottom = 2 * (TALL + 34)
    for tick in x.ticks(4 if d.narrow else 7):
        d.line((x(tick), 26), (x(tick), bottom), "grid")
        d.text(x(tick), bottom + 18, milliseconds(tick), "small", anchor="middle")
    rows = ("full network", "base"), ("cascade", "cascade")
    for i, (times, (name, kind)) in enumerate(zip(each, rows, strict=True)):
        _histogram(d, x, times, edges, 34 + TALL + i * (TALL + 34), name, kind)
    of = "a request" if first.batch == 1 else f"{first.batch} requests"
    d.text(width / 2, bottom + 38, f"time of {of}{', logarithmic' if log else ''}", "small", anchor="middle")
    return d


def _histogram(d: Drawing, x: Scale, times: Sequence[float], edges: np.ndarray, y: float, name: str, kind: str) -> None:  # noqa: PLR0917 (a row)
    counts, _ = np.histogram(times, edges)
    for count, start, end in zip(counts.tolist(), edges.tolist(), edges[1:].tolist(), strict=False):
        tall = TALL * count / max(counts.max(), 1)
        if count:
            tip = f"{count:,} between {milliseconds(start)} and {milliseconds(end)}"
            d.rect(x(start) + 0.5, y - tall, x(end) - x(start) - 1, tall, kind, title=tip)
    d.line((x(edges[0]), y), (x(edges[-1]), y), "axis")
    median, slow = quantile(times, 0.5), quantile(times, 0.95)
    d.line((x(median), y - TALL - 4), (x(median), y), "median")
    text = f"{name}: median {milliseconds(median)}"
    d.text(12, y - TALL - 10, text, "label strong")
    beyond = int((np.asarray(times) > edges[-1]).sum())
    rest = [] if d.narrow else [f"95% below {milliseconds(slow)}"]
    if beyond:
        rest.append(f"{beyond:,} beyond" if d.narrow else f"{beyond:,} of {len(times):,} beyond the axis")
    if rest:
        d.text(d.width - 14, y - TALL - 10, ", ".join(rest), "small", anchor="end")


class _Axes(NamedTuple):
    """Where times and shares are drawn."""

    x: Scale
    y: Scale


LEFT, FROM_TOP, KEY = 58, 48, 14


def front(e: Evaluation, width: float) -> Drawing:
    """Draw agreement, and accuracy where labels are known, against time: the path, the plan, the base, the oracle."""
    d = Drawing(width, 326)
    points = sorted(e.path, key=lambda point: point.ms)
    accuracies = [point.accuracy for point in points if point.accuracy is not None]
    oracle = e.oracle.ms if e.oracle and e.oracle.ms is not None else None
    axes = _axes(d, points, accuracies, oracle)
    curves = {"agreement": [(axes.x(p.ms), axes.y(p.agreement)) for p in points]}
    if len(accuracies) == len(points):
        curves["accuracy"] = [(axes.x(p.ms), axes.y(p.accuracy)) for p in points if p.accuracy is not None]
    for i, (name, curve) in enumerate(curves.items()):
        at = LEFT + 110.0 * i
        d.line((at, KEY - 4), (at + 26, KEY - 4), f"path-{name}")
        d.text(at + 32, KEY, name, "small")
        d.path(curve, f"path-{name}")
    _marks(d, axes, e.path[0], next(point for point in e.path if point.certified), oracle)
    if oracle is not None:
        d.dot(axes.x(oracle), axes.y(1), "oracle", title=f"oracle: {milliseconds(oracle)}")
        d.text(axes.x(oracle) - 6, axes.y(1) - 12, "oracle", "label halo")
    label = "mean time of a request, modelled" + ("" if d.narrow else " from the bundle's costs")
    d.text((LEFT + width) / 2, d.height - 6, label, "small", anchor="middle")
    return d


def _marks(d: Drawing, axes: _Axes, base: PathPoint, plan: PathPoint, oracle: float | None) -> None:
    """Draw the steps that a reader looks for."""
    for one, kind, name in ((base, "dot-base", "base alone"), (plan, "dot-cascade", "the plan")):
        for value in (one.agreement, one.accuracy):
            if value is not None:
                tip = f"{name}: {share(value)} in {milliseconds(one.ms)}"
                d.dot(axes.x(one.ms), axes.y(value), kind, radius=6.5 if one is plan else 5.5, title=tip)
    if plan is not base:  # the path leads down and to the left, up and to the right
        x, y = axes.x(plan.ms), axes.y(plan.agreement)
        start = x - 10 - text_width("the plan")
        if start > LEFT and (oracle is None or not start - 8 < axes.x(oracle) < x):
            d.text(x - 10, y - 9, "the plan", "label strong halo", anchor="end")
        else:
            d.text(x + 9, y + 18, "the plan", "label strong halo")
    d.text(axes.x(base.ms), axes.y(base.agreement) - 12, "base alone", "label halo", anchor="end")


def _axes(d: Drawing, points: Sequence[PathPoint], accuracies: Sequence[float], oracle: float | None) -> _Axes:
    """Draw the grid."""
    lowest, all_ms = min([*(point.agreement for point in points), *accuracies]), [point.ms for point in points]
    slowest, fastest = max(all_ms), min(all_ms if oracle is None else [*all_ms, oracle])
    margin, bottom = max(slowest - fastest, 0.02 * slowest) * 0.14, d.height - 46
    x = Scale(max(0.0, fastest - margin), slowest + margin, LEFT, d.width - 14)
    y = Scale(lowest - 0.12 * (1 - lowest) - 0.001, 1 + 0.1 * (1 - lowest), bottom, FROM_TOP)
    for tick in x.ticks(4 if d.narrow else 6):
        d.line((x(tick), FROM_TOP), (x(tick), bottom), "grid")
        d.text(x(tick), bottom + 18, milliseconds(tick), "small", anchor="middle")
    for tick in [tick for tick in y.ticks(5) if tick <= 1]:
        d.line((LEFT, y(tick)), (d.width - 14, y(tick)), "grid")
        d.text(LEFT - 8, y(tick) + 4.5, share(tick), "small", anchor="end")
    return _Axes(x, y)
