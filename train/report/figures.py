"""The figures of a report, each at any width: a phone gets narrower ones, not smaller letters."""

from collections.abc import Callable
from typing import NamedTuple

from gati_jax.evaluation.records import ClassResult, Exit

from ..results import Evaluation
from .flow import flow
from .latency import front, latency
from .svg import LETTER, Drawing, Scale
from .words import brief, certified_words, milliseconds, promised, share

ROW, MOST_ROWS, MOST_CLASSES = 28, 16, 12
REACH = 3.0  # the agreement figure reaches down to so many times the bound
GAP = 1.5  # between parts of a bar


def certificate(e: Evaluation, width: float) -> Drawing:
    """Draw the disagreement on the certify rows and here, and the bound, on one line."""
    c, disagreeing, found = e.certificate, 1 - e.cascade.agreement, promised(e)
    on_certify, bound = c.disagreements / max(c.n, 1), found.bound if found else c.epsilon
    d = Drawing(width, 132)
    x = Scale(0, 1.25 * max(bound, on_certify, disagreeing), 12, width - 16)
    d.rect(x(0), 46, x(bound) - x(0), 40, "panel")
    d.line((x(0), 86), (width - 16, 86), "axis")
    for tick in x.ticks(5):
        d.line((x(tick), 86), (x(tick), 91), "axis")
        d.text(x(tick), 106, share(tick), "small", anchor="middle")
    d.line((x(bound), 30), (x(bound), 86), "bound")
    anchor = "end" if x(bound) > width / 2 else "start"
    d.text(x(bound) - 6, 24, f"certified: at most {share(bound, up=True)}", "label strong", anchor=anchor)
    wide = f"of {c.n:,} certify requests", f"of these {e.n:,} requests"
    certify, here = ("in certify", "here") if d.narrow else wide
    for value, y, kind, name in (
        (on_certify, 57, "dot-base", f"{share(on_certify)} {certify}"),
        (disagreeing, 76, "dot-cascade", f"{share(disagreeing)} {here}"),
    ):
        d.dot(x(value), y, kind, title=name)
        d.beside(x(value), y + 4.5, name, gap=11, most=x(bound) - 3 if value < bound else None)
    d.text(width / 2, 126, "share of answers that differ from your network's", "small", anchor="middle")
    return d


def agreement(e: Evaluation, width: float) -> Drawing:
    """Draw how often the answers of each exit agree with the base, with intervals; what lies below ends in an arrow."""
    shown = agreeing(e)
    low, found = _lowest(e), promised(e)
    d = Drawing(width, 74 + ROW * len(shown))
    left, bottom = (104 if d.narrow else 150), 30 + ROW * len(shown)
    x = Scale(low, 1.0, left, width - 62)
    for tick in x.ticks(3 if d.narrow else 5):
        d.line((x(tick), 24), (x(tick), bottom), "grid")
        d.text(x(tick), bottom + 18, share(tick), "small", anchor="middle")
    if found and not found.by_group:
        at = x(1 - found.bound)
        d.line((at, 18), (at, bottom), "bound")
        d.text(at, 13, f"{share(1 - found.bound, down=True)} certified over all", "small", anchor="middle")
    for i, one in enumerate(shown):
        _agreement_row(d, x, one, 24 + ROW * (i + 0.5), exit_name(e, one))
    d.text((left + width) / 2, bottom + 38, "agreement with your network, 95% interval", "small", anchor="middle")
    return d


def agreeing(e: Evaluation) -> list[Exit]:
    """Return the exits whose agreement says something: the base agrees with itself, in the same arithmetic."""
    used = [one for one in e.exits if one.hits and not (one is e.exits[-1] and one.agreement == 1)]
    return sorted(sorted(used, key=lambda one: -one.hits)[:MOST_ROWS], key=lambda one: one.exit)


def exit_name(e: Evaluation, one: Exit) -> str:
    """Return what an exit is called."""
    return "base" if one is e.exits[-1] else f"site {one.exit}"


def _lowest(e: Evaluation) -> float:
    """Return the left end: one exit of few requests does not press bound and other exits together."""
    bound = found.bound if (found := promised(e)) else e.certificate.epsilon
    return max(0.0, 1 - REACH * max(bound, 1 - e.cascade.agreement))


def _agreement_row(d: Drawing, x: Scale, one: Exit, y: float, name: str) -> None:
    value, kind = one.agreement or 0.0, "dot-base" if name == "base" else "dot-cascade"
    d.text(x.start - 12, y + 4.5, f"{name} · {one.hits:,}", "label", anchor="end")
    if one.interval:
        start, end = (x(max(edge, x.low)) for edge in one.interval)
        d.line((start, y), (end, y), "interval")
        if one.interval[0] < x.low:
            d.path([(x.start - 8, y), (x.start, y - 5), (x.start, y + 5)], "cascade", closed=True)
    if value >= x.low:
        d.dot(x(value), y, kind, title=f"{name}: {share(value)}")
    d.text(d.width - 50, y + 4.5, share(value, digits=1), "label strong")


def classes(e: Evaluation, width: float) -> Drawing:
    """Draw for each class where its requests leave, and how many disagree."""
    shown = e.classes[:MOST_CLASSES]
    d = Drawing(width, 30 + ROW * len(shown) + 10)
    left, right = (76, width - 84) if d.narrow else (130, width - 120)
    d.text(left, 16, "earliest exit", "small")
    d.text(right, 16, "base", "small", anchor="end")
    d.text(width - 4, 16, "disagree", "small", anchor="end")
    for i, one in enumerate(shown):
        y = 28 + ROW * i
        d.text(left - 12, y + 15, brief(one.name, (left - 12) / LETTER), "label", anchor="end")
        _class_bar(d, e, one, Scale(0, max(one.n, 1), left, right), y)
        d.text(width - 4, y + 15, f"{one.disagreements:,} of {one.n:,}", "label", anchor="end")
    return d


def _class_bar(d: Drawing, e: Evaluation, one: ClassResult, x: Scale, y: float) -> None:
    """Draw a class's requests from the earliest exit to the base, paler and paler."""
    begun, last = 0, len(one.exits) - 1
    for j, hits in enumerate(one.exits):
        tip = f"{one.name}: {hits:,} of {one.n:,} at {'the base' if j == last else f'site {e.exits[j].exit}'}"
        strength = max(0.25, 1 - 0.75 * j / max(1, last - 1))
        more = {} if j == last else {"fill_opacity": f"{strength:.2f}"}
        wide = x(begun + hits) - x(begun)
        if hits:
            gap = GAP if wide > 2 * GAP else 0.0
            d.rect(x(begun), y, wide - gap, 20, "base" if j == last else "cascade", title=tip, **more)
        begun += hits


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
    return "; ".join(f"{exit_name(e, one)}: {share(one.agreement)} of {one.hits:,}" for one in agreeing(e))


def _front_in_words(e: Evaluation) -> str:
    plan, base = next(p for p in e.path if p.certified), e.path[0]
    return (
        f"By the bundle's costs the plan agrees on {share(plan.agreement)} in {milliseconds(plan.ms)} a request, where"
        f" your network alone takes {milliseconds(base.ms)}"
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
        " share of requests that are still running, and what it leaves empty is computation that is skipped. That is"
        " not the time that is saved: lookups and the program around them cost time, too.",
        lambda e: f"Share of requests that leave at each exit. {_exits_in_words(e)}",
    ),
    "certificate": Figure(
        certificate,
        lambda e: (found := promised(e)) is not None and not found.by_group,
        "What was measured, and the bound that is certified for requests to come.",
        lambda e: (
            f"{e.certificate.disagreements:,} of {e.certificate.n:,} certify requests disagreed,"
            f" {share(1 - e.cascade.agreement)} here; {certified_words(e)}"
        ),
    ),
    "agreement": Figure(
        agreement,
        lambda e: any(one.interval for one in agreeing(e)),
        "Agreement with your network at each exit, and how many requests left there. The fewer they are, the wider the"
        " interval. The certificate is about all requests together, not about each exit.",
        lambda e: f"Agreement by exit. {_agreement_in_words(e)}",
    ),
    "latency": Figure(
        latency,
        lambda e: e.cost is not None and len(e.cost.measured[0].cascade_each_ms) > 1,
        "Every measured run: each timed request several times, by the full network and by the cascade in turn.",
        _latency_in_words,
    ),
    "front": Figure(
        front,
        lambda e: len(e.path) > 1 and len({point.ms for point in e.path}) > 1,
        "Thresholds trade agreement for time. The line is the path along which the plan was certified, replayed on"
        " these requests. Its times are modelled from the costs that the bundle holds, not measured here.",
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
