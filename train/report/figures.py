"""The figures of a report, each at any width: a phone gets narrower ones, not smaller letters."""

from collections.abc import Callable
from typing import NamedTuple

from ..results import Evaluation
from .flow import flow
from .latency import front, latency
from .svg import Drawing, Scale
from .words import milliseconds, share

ROW, MOST_ROWS, MOST_CLASSES = 28, 16, 12


def certificate(e: Evaluation, width: float) -> Drawing:
    """Draw the disagreement on the certify rows and here, and the bound, on one line."""
    c, disagreeing = e.certificate, 1 - e.cascade.agreement
    on_certify, bound = c.disagreements / max(c.n, 1), c.epsilon
    d = Drawing(width, 132)
    x = Scale(0, 1.25 * max(bound, on_certify, disagreeing), 12, width - 16)
    d.rect(x(0), 46, x(bound) - x(0), 40, "panel")
    d.line((x(0), 86), (width - 16, 86), "axis")
    for tick in x.ticks(5):
        d.line((x(tick), 86), (x(tick), 91), "axis")
        d.text(x(tick), 106, share(tick), "small", anchor="middle")
    d.line((x(bound), 30), (x(bound), 86), "bound")
    d.text(
        x(bound) - 6,
        24,
        f"certified: at most {share(bound)}",
        "label strong",
        anchor="end" if x(bound) > width / 2 else "start",
    )
    narrow = width <= 500  # noqa: PLR2004
    certify, here = ("in certify", "here") if narrow else (f"of {c.n:,} certify requests", f"of these {e.n:,} requests")
    for value, y, kind, name in (
        (on_certify, 57, "dot-base", f"{share(on_certify)} {certify}"),
        (disagreeing, 76, "dot-cascade", f"{share(disagreeing)} {here}"),
    ):
        d.dot(x(value), y, kind, title=name)
        d.beside(x(value), y + 4.5, name, gap=11, most=x(bound) - 3 if value < bound else None)
    d.text(width / 2, 126, "share of answers that differ from your network's", "small", anchor="middle")
    return d


def agreement(e: Evaluation, width: float) -> Drawing:
    """Draw how often the answers of each exit agree with the base, with intervals."""
    used = [one for one in e.exits if one.hits]
    shown = sorted(sorted(used, key=lambda one: -one.hits)[:MOST_ROWS], key=lambda one: one.exit)
    low = min([e.cascade.agreement, 1 - e.certificate.epsilon, *(one.interval[0] for one in shown if one.interval)])
    low = max(0.0, low - 0.15 * (1 - low))
    left, bottom = (150, 30 + ROW * len(shown)) if width > 500 else (104, 30 + ROW * len(shown))  # noqa: PLR2004
    d = Drawing(width, bottom + 44)
    x = Scale(low, 1.0, left, width - 62)
    for tick in x.ticks(5 if width > 500 else 3):  # noqa: PLR2004
        d.line((x(tick), 24), (x(tick), bottom), "grid")
        d.text(x(tick), bottom + 18, share(tick), "small", anchor="middle")
    if e.certificate.certified:
        at = x(1 - e.certificate.epsilon)
        d.line((at, 18), (at, bottom), "bound")
        d.text(at, 13, f"{share(1 - e.certificate.epsilon)} certified over all", "small", anchor="middle")
    for i, one in enumerate(shown):
        y = 24 + ROW * (i + 0.5)
        is_base = one is e.exits[-1]
        name = "base" if is_base else f"site {one.exit}"
        d.text(left - 12, y + 4.5, f"{name} · {one.hits:,}", "label", anchor="end")
        if one.interval and not is_base:
            d.line((x(max(one.interval[0], low)), y), (x(one.interval[1]), y), "interval")
        value = one.agreement or 0.0
        d.dot(x(max(value, low)), y, "dot-base" if is_base else "dot-cascade", title=f"{name}: {share(value)}")
        d.text(width - 50, y + 4.5, share(value, digits=1), "label strong")
    d.text((left + width) / 2, bottom + 38, "agreement with your network, 95% interval", "small", anchor="middle")
    return d


def classes(e: Evaluation, width: float) -> Drawing:
    """Draw for each class where its requests leave, and how many disagree."""
    shown = e.classes[:MOST_CLASSES]
    left, right = (130, width - 120) if width > 500 else (76, width - 84)  # noqa: PLR2004
    d = Drawing(width, 30 + ROW * len(shown) + 10)
    d.text(left, 16, "earliest exit", "small")
    d.text(right, 16, "base", "small", anchor="end")
    d.text(width - 4, 16, "disagree", "small", anchor="end")
    letters = int((left - 12) / 7.4)
    for i, one in enumerate(shown):
        y, x = 28 + ROW * i, float(left)
        name = one.name if len(one.name) <= letters else f"{one.name[: letters - 1]}…"
        d.text(left - 12, y + 15, name, "label", anchor="end")
        for j, hits in enumerate(one.exits):
            part = hits / max(one.n, 1) * (right - left)
            is_base = j == len(one.exits) - 1
            tip = f"{one.name}: {hits:,} of {one.n:,} at {'the base' if is_base else f'site {e.exits[j].exit}'}"
            faded = 1 - 0.75 * j / max(1, len(one.exits) - 2) if len(one.exits) > 2 else 1  # noqa: PLR2004
            more = {} if is_base else {"fill_opacity": f"{max(0.25, faded):.2f}"}
            if hits:
                d.rect(x, y, part - 1.5 if part > 3 else part, 20, "base" if is_base else "cascade", title=tip, **more)  # noqa: PLR2004
            x += part
        d.text(width - 4, y + 15, f"{one.disagreements:,} of {one.n:,}", "label", anchor="end")
    return d


class Figure(NamedTuple):
    """A figure: how it is drawn, whether an evaluation has what it takes, and its texts."""

    draw: Callable[[Evaluation, float], Drawing]
    has: Callable[[Evaluation], bool]
    caption: str
    alternative: Callable[[Evaluation], str]


def _exits_in_words(e: Evaluation) -> str:
    parts = [f"site {one.exit}: {share(one.hit_rate, digits=1)}" for one in e.exits[:-1]]
    return "; ".join([*parts, f"the base: {share(e.exits[-1].hit_rate, digits=1)}"])


def _agreement_in_words(e: Evaluation) -> str:
    used = [one for one in e.exits if one.agreement is not None]
    return "; ".join(f"exit {one.exit}: {share(one.agreement)} of {one.hits:,}" for one in used)


def _front_in_words(e: Evaluation) -> str:
    plan, base = next(p for p in e.path if p.certified), e.path[0]
    return (
        f"The plan agrees on {share(plan.agreement)} in {milliseconds(plan.ms)} a request, where the base alone takes"
        f" {milliseconds(base.ms)}"
    )


def _latency_in_words(e: Evaluation) -> str:
    if e.cost is None:
        return ""
    first = e.cost.measured[0]
    return f"Mean {milliseconds(first.cascade_ms)} by the cascade, {milliseconds(first.full_ms)} by the full network"


FIGURES = {  # by name of the file
    "flow": Figure(
        flow,
        lambda _: True,
        "Your network from left to right, its blocks as wide as the time that they take. The height of the band is the"
        " share of requests that are still running, and what it leaves empty is computation saved.",
        lambda e: f"Share of requests that leave at each exit. {_exits_in_words(e)}",
    ),
    "certificate": Figure(
        certificate,
        lambda e: e.certificate.certified and "group" not in e.certificate.promise,
        "What was measured, and the bound that is certified for requests to come.",
        lambda e: (
            f"{e.certificate.disagreements:,} of {e.certificate.n:,} certify requests disagreed,"
            f" {share(1 - e.cascade.agreement)} here; certified: at most {share(e.certificate.epsilon)}"
        ),
    ),
    "agreement": Figure(
        agreement,
        lambda e: any(one.interval for one in e.exits),
        "Agreement with your network at each exit, and how many requests left there. The fewer they are, the wider the"
        " interval. The certificate is about all requests together, not about each exit.",
        lambda e: f"Agreement by exit. {_agreement_in_words(e)}",
    ),
    "latency": Figure(
        latency,
        lambda e: e.cost is not None and len(e.cost.measured[0].cascade_each_ms) > 1,
        "Measured time of every timed request, by the full network and by the cascade; the slowest 1% are left out.",
        _latency_in_words,
    ),
    "front": Figure(
        front,
        lambda e: len(e.path) > 1 and len({point.ms for point in e.path}) > 1,
        "Thresholds trade agreement for time. The line is the path along which the plan was certified, replayed on"
        " these requests with the times that the bundle holds.",
        _front_in_words,
    ),
    "classes": Figure(
        classes,
        lambda e: bool(e.classes),
        "Where the requests of each class leave, by your network's answer: early exits in strong colour, the whole"
        " network in grey.",
        lambda e: "; ".join(
            f"{one.name}: {one.disagreements:,} of {one.n:,} disagree" for one in e.classes[:MOST_CLASSES]
        ),
    ),
}
