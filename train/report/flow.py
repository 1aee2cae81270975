"""The network drawn to scale, and the share of requests that leaves at each cache."""

import itertools
from typing import NamedTuple

from ..results import Evaluation
from .svg import LETTER, Drawing, Scale, spread_out, text_width
from .words import milliseconds, saved_share, share, small_network_ms

STRIP, TOP, BAND = 26, 26, 200
LINE, COLUMN = 19.0, 112.0  # of labels


class _Door(NamedTuple):
    """An exit, and where it is drawn: the requests that leave there are the height between two edges."""

    site: int
    x: float
    top: float
    bottom: float
    share: float
    hits: int


def flow(e: Evaluation, width: float) -> Drawing:
    """Draw blocks to scale, caches in place, and under them the share of requests that is still running."""
    depth, blocks = e.exits[-1].exit, e.layout.blocks_ms if e.layout else ()
    measured = sum(blocks) > 0
    small = small_network_ms(e) if measured else 0.0
    until = [*itertools.accumulate(blocks if measured else (1.0,) * depth, initial=small)]
    x = Scale(0, until[-1], 2, width - COLUMN)
    top = TOP + STRIP + 14
    d = Drawing(width, top + BAND + 28)
    _strip(d, e, x, until, measured=measured)
    doors, alive = [], 1.0
    for one in e.exits:
        after = max(0.0, alive - one.hit_rate)
        edges = top + after * BAND, top + alive * BAND
        doors.append(_Door(one.exit, x(until[one.exit]), *edges, one.hit_rate, one.hits))
        alive = after
    _band(d, doors, x(0), top)
    _labels(d, doors, top)
    saved = f"empty: {share(saved_share(e), digits=0)} of computation skipped" if measured else ""
    if text_width(f"filled: still running{saved}") < x(until[-1]):
        d.text(x(0), top + BAND + 20, "filled: still running", "small")
    if measured:
        d.text(x(until[-1]), top + BAND + 20, saved, "small", anchor="end")
    return d


def _strip(d: Drawing, e: Evaluation, x: Scale, until: list[float], *, measured: bool) -> None:
    """Draw the blocks, and a mark where a cache stands."""
    how = " by the bundle's costs" if not d.narrow else ""  # a phone has no room for it, and the text below says so
    total = f", {milliseconds(until[-1] - until[0])}{how}" if measured else ", drawn as if all took as long"
    first = f", after {milliseconds(until[0])} of a small network" if until[0] and not d.narrow else ""
    d.text(x(0), 14, f"your network: {len(until) - 1} blocks{total}{first}", "label")
    if until[0]:
        tip = f"the small network before the first block: {milliseconds(until[0])}"
        d.rect(x(0), TOP, x(until[0]) - x(0) - 1, STRIP, "cascade", title=tip)
    for i, (start, end) in enumerate(itertools.pairwise(until)):
        tip = f"block {i + 1}" + (f": {milliseconds(end - start)}" if measured else "")
        d.rect(x(start) + 0.5, TOP, x(end) - x(start) - 1, STRIP, "block", title=tip)
        if x(end) - x(start) > LETTER * len(str(i + 1)) + 6:
            d.text((x(start) + x(end)) / 2, TOP + 17.5, str(i + 1), "small on-block", anchor="middle")
    names = {cache.site: cache.name for cache in e.layout.caches} if e.layout else {}
    for one in e.exits[:-1]:
        d.dot(x(until[one.exit]), TOP + STRIP, "cache", radius=6, title=names.get(one.exit, f"site {one.exit}"))


def _band(d: Drawing, doors: list[_Door], start: float, top: float) -> None:
    """Draw what is still running from exit to exit, and at each exit the part that leaves."""
    d.rect(start, top, doors[-1].x - start, BAND, "panel")
    edge = [(start, top), (start, top + BAND)]
    edge += [corner for door in doors for corner in ((door.x, door.bottom), (door.x, door.top))]
    d.path([*edge, (doors[-1].x, top)], "running", closed=True)
    for door in doors:
        if door.hits:
            kind, where = ("base", "at the end") if door is doors[-1] else ("cascade", f"at site {door.site}")
            tip = f"{door.hits:,} requests leave {where}"
            d.rect(door.x - 6, door.top, 6, max(1.0, door.bottom - door.top), kind, title=tip)


def _labels(d: Drawing, doors: list[_Door], top: float) -> None:
    """Write in a column what leaves at each exit, those with the largest shares where there is no room for all."""
    room = int(BAND / LINE)
    kept = sorted(doors[:-1], key=lambda door: -door.share)[: room - 1]
    kept = [doors[-1], *sorted(kept, key=lambda door: -door.site)]  # from the top down, as they are drawn
    places = spread_out([(door.top + door.bottom) / 2 for door in kept], LINE, top + LINE / 2, top + BAND - LINE / 2)
    end = doors[-1].x
    for door, y in zip(kept, places, strict=True):
        middle = (door.top + door.bottom) / 2
        d.path([(door.x + 3, middle), (max(door.x + 3, end + 3), middle), (end + 14, y)], "leader")
        d.text(end + 58, y + 4.5, share(door.share, digits=0 if door.share >= 0.1 else 1), "label strong", anchor="end")  # noqa: PLR2004
        d.text(end + 65, y + 4.5, "base" if door is doors[-1] else f"site {door.site}", "small")
