"""Figures of time: how requests' times are distributed, and what agreement costs."""

from collections.abc import Sequence

import numpy as np

from gati_jax import InputError

from ..results import Evaluation
from .svg import Drawing, Scale
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
    for tick in x.ticks(7 if width > 500 else 4):  # noqa: PLR2004
        d.line((x(tick), 26), (x(tick), bottom), "grid")
        d.text(x(tick), bottom + 18, milliseconds(tick), "small", anchor="middle")
    rows = ("full network", "base"), ("cascade", "cascade")
    for i, (times, (name, kind)) in enumerate(zip(each, rows, strict=True)):
        _histogram(d, x, times, edges, 34 + TALL + i * (TALL + 34), name, kind)
    d.text(
        width / 2,
        bottom + 38,
        f"time of {'a request' if first.batch == 1 else f'{first.batch} requests'}",
        "small",
        anchor="middle",
    )
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
    if d.width > 500:  # noqa: PLR2004
        d.text(d.width - 14, y - TALL - 10, f"95% below {milliseconds(slow)}", "small", anchor="end")


def front(e: Evaluation, width: float) -> Drawing:
    """Draw agreement, and accuracy where labels are known, against time: the path, the plan, the base, the oracle."""
    d = Drawing(width, 300 if width > 500 else 270)  # noqa: PLR2004
    points = sorted(e.path, key=lambda point: point.ms)
    accuracies = [point.accuracy for point in points if point.accuracy is not None]
    oracle = e.oracle.ms if e.oracle and e.oracle.ms is not None else None
    lowest = min([point.agreement for point in points] + accuracies)
    slowest, fastest = max(p.ms for p in points), min([p.ms for p in points] + ([oracle] if oracle is not None else []))
    margin = max(slowest - fastest, 0.02 * slowest) * 0.14
    bottom = d.height - 46
    x = Scale(max(0.0, fastest - margin), slowest + margin, 58, width - 14)
    y = Scale(lowest - 0.12 * (1 - lowest) - 0.001, 1 + 0.1 * (1 - lowest), bottom, 22)
    for tick in x.ticks(6 if width > 500 else 4):  # noqa: PLR2004
        d.line((x(tick), 22), (x(tick), bottom), "grid")
        d.text(x(tick), bottom + 18, milliseconds(tick), "small", anchor="middle")
    for tick in [tick for tick in y.ticks(5) if tick <= 1]:
        d.line((58, y(tick)), (width - 14, y(tick)), "grid")
        d.text(50, y(tick) + 4.5, share(tick), "small", anchor="end")
    base, plan = e.path[0], next(point for point in e.path if point.certified)
    if len(accuracies) == len(points):
        _line(d, [(x(p.ms), y(p.accuracy)) for p in points if p.accuracy is not None], "path-accuracy", "accuracy")
    _line(d, [(x(p.ms), y(p.agreement)) for p in points], "path-agreement", "agreement")
    for one, kind, name in ((base, "dot-base", "base alone"), (plan, "dot-cascade", "the plan")):
        for value in (one.agreement, one.accuracy):
            if value is not None:
                tip = f"{name}: {share(value)} in {milliseconds(one.ms)}"
                d.dot(x(one.ms), y(value), kind, radius=6.5 if one is plan else 5.5, title=tip)
    if plan is not base:
        d.text(x(plan.ms) + 9, y(plan.agreement) + 18, "the plan", "label strong")  # the path leads up and to the right
    d.text(x(base.ms), y(base.agreement) - 12, "base alone", "label", anchor="end")
    if oracle is not None:
        d.dot(x(oracle), y(1), "oracle", title=f"oracle: {milliseconds(oracle)}")
        d.text(x(oracle) - 6, y(1) - 12, "oracle", "label")
    d.text((58 + width) / 2, d.height - 6, "mean time of a request", "small", anchor="middle")
    return d


def _line(d: Drawing, points: list[tuple[float, float]], kind: str, name: str) -> None:
    d.path(points, kind)
    x, y = points[-1]
    d.text(x - 8, y + 18, name, "small", anchor="end")
