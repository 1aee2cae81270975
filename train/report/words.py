"""What the page says in words: numbers, the headline, and the certificate in two sentences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from gati_jax.evaluation.records import CertificateResult

from ..results import Evaluation

ABOUT_EQUAL, UNSTEADY = 0.05, 0.3
_TWICE = 2


class Headline(NamedTuple):
    """The page's first sentence, and the one below it."""

    sentence: str
    leaving: str
    warnings: tuple[str, ...] = ()


def headline(e: Evaluation) -> Headline:
    """Return what a person must know first: how much faster, how often answers differ, where requests leave."""
    return Headline(f"{speed_words(e)}; {bound_words(e)}", leaving_words(e), warnings_of(e))


def speed_words(e: Evaluation) -> str:
    """Say how much faster the cascade was, as measured; slower is said, too."""
    if not answers_early(e):
        return "No faster: your network answers every request"
    if e.cost is None:
        return "Speed not measured"
    speedup = e.cost.measured[0].speedup
    if abs(math.log(speedup)) <= ABOUT_EQUAL:
        return f"About as fast as your network ({speedup:.2f} times)"
    if speedup < 1:
        return f"Slower than your network: {times(1 / speedup)} times its time"
    return f"{times(speedup)} times as fast as your network"


def bound_words(e: Evaluation) -> str:
    """Say what is certified of the answers that are given by default, or what was measured where nothing is."""
    c, here = e.certificate, share(1 - e.cascade.agreement)
    if not answers_early(e):
        return "its answers are unchanged" if here == share(0) else f"{here} of answers differed here"
    delta = e.served.delta if e.served else c.delta
    epsilon = e.served.epsilon if e.served else c.epsilon
    if not c.certified or epsilon is None:
        return f"how often answers differ is not certified ({here} did here)"
    confidence = f"with {share(1 - delta, down=True)} confidence"
    if "group" in c.promise:
        return f"{promise(c)}, {confidence}"
    return f"at most {share(epsilon, up=True)} of answers differ, {confidence}"


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
        where += f", most of them ({share(most.hit_rate, digits=0)} of all)"
    return f"{where} {site_words(e, most.exit)}; {rest}."


def site_words(e: Evaluation, site: int) -> str:
    """Say where a site is: after how much of the network's time, where that is known."""
    if site == 0:
        return "at the input, before the network's first block"
    blocks = e.layout.blocks_ms if e.layout else ()
    after = f"after block {site} of {e.exits[-1].exit}"
    return (
        f"{after}, with {share(sum(blocks[:site]) / sum(blocks), digits=0)} of its computation done"
        if sum(blocks)
        else after
    )


def warnings_of(e: Evaluation) -> tuple[str, ...]:
    """Return what a reader must not overlook."""
    c, found = e.certificate, list[str]()
    if not c.certified:
        found.append("Nothing could be certified: every cache is off and the base answers.")
    elif not c.holds:
        more = share(1 - e.cascade.agreement)
        found.append(f"The certified bound does not hold here: {more} of these {e.n:,} requests disagreed.")
    if c.base_saw_data:
        found.append("The base was trained on the certify rows, and may disagree more often on others.")
    if answers_early(e) and e.cost and (spread := e.cost.measured[0].spread) > UNSTEADY:
        found.append(
            f"The machine was busy while times were measured: the speed-up varied by {share(spread, digits=0)}."
        )
    if e.served and e.served.epsilon is None and c.certified:
        found.append(f"Answers by default on the device of this evaluation: {e.served.text}.")
    return tuple(found)


def explain_certificate(e: Evaluation) -> str:
    """Say in two sentences what is certified, and why the bound is larger than what was measured."""
    c = e.certificate
    unlikely = f"a risk of {share(c.delta)}"
    if not c.certified:
        return (
            f"On {c.n:,} certify requests no step of the plan could be shown to disagree on at most {share(c.epsilon)},"
            f" at {unlikely}. So every cache stays off until a certificate on more, or other, requests turns one on."
        )
    counted = f"{c.disagreements:,} of the {c.n:,} certify requests disagreed ({share(c.disagreements / max(c.n, 1))})"
    if c.p_value is None:
        why = "the bound is larger because so few requests cannot tell these rates apart"
    else:
        why = (
            f"if more than {share(c.epsilon)} of all requests did, so few would be seen in at most"
            f" {share(c.p_value, up=True)} of such samples"
        )
    basis, promised = f" ({c.basis})" if c.basis else "", promise(c)
    return (
        f"{promised[:1].upper()}{promised[1:]}, with {share(1 - c.delta, down=True)} confidence{basis}. That is more"
        f" than was measured, for a sample says only so much about the requests to come: {counted}, and {why}."
    )


def promise(c: CertificateResult) -> str:
    """Say what is certified as a reader's own network is called on the page."""
    return c.promise.replace("with the base", "with your network")


def explain_gap(e: Evaluation) -> str:
    """Say what is certified of the accuracy; empty if nothing is."""
    gap = e.certificate.accuracy_gap
    if gap is None:
        return ""
    return (
        f"The cascade is at most {share(gap.upper, up=True)} less accurate than the base, with"
        f" {share(1 - gap.delta, down=True)} confidence of its own: of the certify requests, {gap.losses:,} right"
        f" answers were lost and {gap.gains:,} gained ({gap.method})."
    )


def answers_early(e: Evaluation) -> bool:
    """Return whether any cache is on."""
    return e.certificate.certified and len(e.exits) > 1


def times(ratio: float) -> str:
    """Write a speed-up with two significant digits, or three below 2."""
    return f"{ratio:.2f}" if ratio < _TWICE else f"{ratio:.1f}" if ratio < 10 * _TWICE else f"{ratio:.0f}"


def share(value: float | None, *, digits: int = 2, up: bool = False, down: bool = False) -> str:
    """Write a share in percent, without zeros at the end; ``up`` and ``down`` say how a bound is rounded."""
    if value is None:
        return "-"
    scaled = round(value * 10 ** (digits + 2), 6)
    rounded = math.ceil(scaled) if up else math.floor(scaled) if down else round(scaled)
    text = f"{rounded / 10**digits:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if digits else text}%"


def milliseconds(value: float) -> str:
    """Write a time with three significant digits."""
    return f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms"  # noqa: PLR2004


def quantile(values: Sequence[float], level: float) -> float:
    """Return the value below which a share of all values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(level * len(ordered)))]
