"""What the page says in words: the headline, what is promised, and numbers."""

import math
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from gati_jax.display import percent as share
from gati_jax.errors import printable
from gati_jax.evaluation.records import CertificateResult, Measured

from ..results import Evaluation

ABOUT_EQUAL, UNSTEADY = 0.05, 0.3
_TWICE, WIDEST = 2, 2.0


class Headline(NamedTuple):
    """The page's first sentence, and the one below it."""

    sentence: str
    leaving: str
    warnings: tuple[str, ...] = ()


class Promise(NamedTuple):
    """What is promised of the answers that were measured."""

    text: str
    """How often they differ, at most."""
    bound: float
    """In the mean over all requests."""
    confidence: str
    by_group: bool
    broken: bool
    """Whether more than the bound differed here."""


def headline(e: Evaluation) -> Headline:
    """Return what a person must know first: how much faster, how often answers differ, where requests leave."""
    return Headline(f"{speed_words(e)}; {bound_words(e)}", leaving_words(e), warnings_of(e))


def speed_words(e: Evaluation) -> str:
    """Say how much faster the cascade was, as measured; slower is said, too."""
    if not answers_early(e):
        return "No faster: your network answers every request"
    if e.cost is None:
        return "Speed not measured"
    m = e.cost.measured[0]
    between, how = f" ({interval_words(m)})" if m.interval else "", how_timed(m)
    if is_equal(m):
        inside = f"{times(m.speedup)} times{f', {interval_words(m)}' if m.interval else ''}"
        return f"About as fast as your network, {how} ({inside})"
    if m.speedup < 1:
        slower = f" ({times(1 / m.interval[1])} to {times(1 / m.interval[0])})" if m.interval else ""
        return f"Slower than your network, {how}: {times(1 / m.speedup)} times its time{slower}"
    return f"{times(m.speedup)} times as fast as your network{between}, {how}"


def is_equal(m: Measured) -> bool:
    """Return whether the times do not tell cascade and full network apart, or only just."""
    low, high = m.interval or (m.speedup, m.speedup)
    return low <= 1 <= high or abs(math.log(m.speedup)) <= ABOUT_EQUAL


def interval_words(m: Measured) -> str:
    """Say between which speed-ups other requests and rounds would lie."""
    return f"{times(m.interval[0])} to {times(m.interval[1])}" if m.interval else ""


def how_timed(m: Measured) -> str:
    """Say in which batches requests were timed."""
    return "one request at a time" if m.batch == 1 else f"in batches of {m.batch}"


def promised(e: Evaluation) -> Promise | None:
    """Return what is promised of the answers that were measured; None where nothing is.

    Title, tile and figures all ask here, so that they cannot promise different things.
    """
    c, served = e.certificate, e.served
    epsilon, delta = (served.epsilon, served.delta) if served else (c.epsilon, c.delta)
    if not answers_early(e) or c.base_saw_data or epsilon is None:
        return None
    by_group, exact = "group" in c.promise, served is None or served.numerics == c.numerics
    text = promise(c) if by_group and exact else f"at most {share(epsilon, up=True)} of answers differ"
    if by_group and not exact:
        text += ", in the mean over groups"
    broken = not by_group and 1 - e.cascade.agreement > epsilon + 1e-12  # a share of rows says little about groups
    return Promise(text, epsilon, f"with {share(1 - delta, down=True)} confidence", by_group, broken)


def bound_words(e: Evaluation) -> str:
    """Say what is certified of the answers that are given by default, or what was measured where nothing is."""
    here, found = share(1 - e.cascade.agreement), promised(e)
    if not answers_early(e):
        return "its answers are unchanged" if here == share(0.0) else f"{here} of answers differed here"
    if found is None:
        return f"how often answers differ is not certified ({here} did here)"
    if found.broken:
        return f"{here} of answers differed here, where {found.text} is certified"
    return f"{found.text}, {found.confidence}"


def certified_words(e: Evaluation) -> str:
    """Say in a few words what is promised."""
    found = promised(e)
    return f"certified: {found.text}" if found else "nothing is certified"


def leaving_words(e: Evaluation) -> str:
    """Say where requests leave."""
    early, base = e.exits[:-1], e.exits[-1]
    if not answers_early(e):
        return f"All {e.n:,} requests ran through the whole network: no cache is on."
    most = max(early, key=lambda one: one.hits)
    through = share(base.hit_rate, digits=0) if base.hits else "none"
    rest = f"{through} run through the whole network"
    if not most.hits:
        return f"No request left early here: {rest}."
    where = f"{share(1 - base.hit_rate, digits=0)} of requests leave early"
    if len([one for one in early if one.hits]) > 1:
        of_all = f"{share(most.hit_rate, digits=0)} of all"
        mostly = 2 * most.hits > sum(one.hits for one in early)
        where += f", most of them ({of_all})" if mostly else f"; the largest share, {of_all},"
    return f"{where} {site_words(e, most.exit)}; {rest}."


def site_words(e: Evaluation, site: int) -> str:
    """Say where a site is: after how much of the network's time, where that is known."""
    if site == 0:
        return "at the input, before the network's first block"
    blocks = e.layout.blocks_ms if e.layout else ()
    after = f"after block {site} of {e.exits[-1].exit}"
    return (
        f"{after}, with {share(sum(blocks[:site]) / sum(blocks), digits=0)} of the network's computation done"
        if sum(blocks)
        else after
    )


def warnings_of(e: Evaluation) -> tuple[str, ...]:
    """Return what a reader must not overlook."""
    c, found, bound = e.certificate, list[str](), promised(e)
    if not c.certified:
        found.append("Nothing could be certified: every cache is off and the base answers.")
    elif c.base_saw_data:
        text = "Nothing is certified: the base was trained on the certify rows, and may disagree more often on others."
        found.append(text)
    elif e.served and e.served.epsilon is None:
        found.append(f"Nothing is certified of these answers: they were given by {e.served.text}.")
    elif bound and bound.broken:
        more = share(1 - e.cascade.agreement)
        found.append(f"The certified bound does not hold here: {more} of these {e.n:,} requests disagreed.")
    if answers_early(e) and e.cost and (busy := unsteady_words(e.cost.measured[0])):
        found.append(busy)
    if e.layout and e.layout.unsteady:
        found.append(
            f"The bundle's times of blocks and caches are unreliable: {e.layout.unsteady}. Its caches were chosen by"
            " them, and two figures are drawn with them: where requests leave, and agreement against time."
        )
    return tuple(found)


def unsteady_words(m: Measured) -> str:
    """Say how the speed-up varied, if it did so much that the machine must have been busy."""
    low, high = m.interval or (m.speedup, m.speedup)
    apart = m.typical is not None and abs(math.log(m.speedup / m.typical)) > 2 * ABOUT_EQUAL
    if m.spread <= UNSTEADY and high / low <= 1 + UNSTEADY and not apart:
        return ""
    medians = f"; by medians it is {times(m.typical)}, by means {times(m.speedup)}" if m.typical and apart else ""
    ranges = f" from {times(low)} to {times(high)}" if m.interval else f" by {share(m.spread, digits=0)}"
    return f"The machine was busy while times were measured, or few were: the speed-up varied{ranges}{medians}."


def saved_share(e: Evaluation) -> float:
    """Return the share of the network's time that is not spent, by the bundle's costs and without lookups.

    A small network at site 0 is no lookup: its time is spent on every request.
    """
    blocks = e.layout.blocks_ms if e.layout else ()
    spent = small_network_ms(e) + sum(one.hit_rate * sum(blocks[: one.exit]) for one in e.exits)
    return 1 - spent / sum(blocks)


def small_network_ms(e: Evaluation) -> float:
    """Return the time of what stands before the network's first block, which every request runs; 0 without it."""
    return sum(cache.lookup_ms or 0.0 for cache in (e.layout.caches if e.layout else ()) if cache.site == 0)


def promise(c: CertificateResult) -> str:
    """Say what is certified as a reader's own network is called on the page."""
    return c.promise.replace("with the base", "with your network")


def answers_early(e: Evaluation) -> bool:
    """Return whether any cache is on."""
    return e.certificate.certified and len(e.exits) > 1


def times(ratio: float) -> str:
    """Write a speed-up with two significant digits, or three below 2."""
    return f"{ratio:.2f}" if ratio < _TWICE else f"{ratio:.1f}" if ratio < 10 * _TWICE else f"{ratio:.0f}"


def brief(text: str, letters: float) -> str:
    """Cut a name that is wider than so many small letters."""
    text = printable(text, most=1000)
    while sum(letter_width(c) for c in text) > letters:
        text = f"{text.removesuffix('…')[:-1]}…"
    return text


def letter_width(letter: str) -> float:
    """Return about how wide a letter is, as a multiple of a small one."""
    if unicodedata.east_asian_width(letter) in "WF":
        return WIDEST
    return 1.7 if letter in "MWmw@%—…" else 1.35 if letter.isupper() else 1.0


def milliseconds(value: float) -> str:
    """Write a time with three significant digits."""
    return f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms"  # noqa: PLR2004


def quantile(values: Sequence[float], level: float) -> float:
    """Return the value below which a share of all values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(level * len(ordered)))]
