"""Sentences beside the figures: what the numbers mean, which are modelled and which were measured."""

from gati_jax.evaluation.records import NOT_BY_REQUEST

from ..results import Evaluation
from .words import answers_early, milliseconds, promise, saved_share, share, small_network_ms, times


def certificate(e: Evaluation) -> str:
    """Say in two sentences what is certified, and why the bound is larger than what was measured."""
    c = e.certificate
    if not c.certified:
        return (
            f"On {c.n:,} certify requests no step of the plan could be shown to disagree on at most {share(c.epsilon)},"
            f" at a risk of {share(c.delta)}. So every cache stays off until a certificate on more, or other, requests"
            " turns one on."
        )
    promised_of, rate = promise(c), c.disagreements / max(c.n, 1)
    counted = f"Of the {c.n:,} certify requests, {c.disagreements:,} disagreed ({share(rate)})"
    larger = "; so the bound is larger than what was counted" if rate < c.epsilon else ""
    if c.method in NOT_BY_REQUEST:
        why, larger = "the bound is not of single requests drawn at random, so this share alone does not show it", ""
    elif c.p_value is None:
        why = "so few requests do not rule out a rate as large as the bound"
    else:
        few = share(c.p_value, up=True)
        why = f"if more than {share(c.epsilon)} of all requests did, at most {few} of such samples would show so few"
    if c.base_saw_data:
        promised_of = f"of requests that your network was trained on: {promised_of}"
    elif e.served and e.served.numerics != c.numerics:
        promised_of = f"by {c.numerics} arithmetic: {promised_of}"
    return (
        f"{promised_of[:1].upper()}{promised_of[1:]}, with {share(1 - c.delta, down=True)} confidence."
        f" {counted}; {why}{larger}."
    )


def saving(e: Evaluation) -> str:
    """Say with which times the network is drawn, and how the skipped computation and the measured time go together."""
    if not (e.layout and sum(e.layout.blocks_ms)):
        return ""
    drawn = f"Blocks are drawn with the times that the bundle holds for {e.layout.device}, batch {e.layout.batch}"
    if not answers_early(e):
        return f"{drawn}."
    left_out = "lookups left out" if not small_network_ms(e) else "the small network counted, lookups left out"
    text = f"{drawn}: by them {share(saved_share(e), digits=0)} of the computation is skipped, {left_out}."
    if e.cost:
        m = e.cost.measured[0]
        text += (
            f" Measured here, with lookups and the program around them, the cascade took"
            f" {share(1 / m.speedup, digits=0)} of your network's time ({times(m.speedup)} times as fast)."
        )
    return text


def oracle(e: Evaluation) -> str:
    """Compare the plan with the oracle, both by the same times; empty if there is none."""
    if e.oracle is None:
        return ""
    plan = next((point for point in e.path if point.certified), None)
    if plan and e.oracle.ms is not None:
        ms = f"{milliseconds(e.oracle.ms)} a request where the plan takes {milliseconds(plan.ms)}, both by these times"
    elif e.cost:
        shares = share(e.oracle.saved_share, digits=1), share(e.cost.saved_share, digits=1)
        ms = f"it would save {shares[0]} of the time where the plan saves {shares[1]}, lookups left out of both"
    else:
        return ""
    return (
        f"The oracle leaves at the first of these caches that agrees with your network: {ms}. It never disagrees: a"
        " plan that may, can save more than it."
    )


def path(e: Evaluation) -> str:
    """Say how the modelled times of the path go together with what was measured; empty if nothing was."""
    if not (e.path and e.cost):
        return ""
    m = e.cost.measured[0]
    each = "a request" if m.batch == 1 else f"a batch of {m.batch}"
    measured = f"{milliseconds(m.cascade_ms)} {each} by the cascade, {milliseconds(m.full_ms)} by your network"
    return (
        f"The times of this figure are modelled, from the bundle's costs of blocks and lookups. Measured: {measured}."
    )


def gap(e: Evaluation) -> str:
    """Say what is certified of the accuracy; empty if nothing is."""
    gap = e.certificate.accuracy_gap
    if gap is None:
        return ""
    return (
        f"The cascade is at most {share(gap.upper, up=True)} less accurate than your network, with"
        f" {share(1 - gap.delta, down=True)} confidence for this bound alone: of the certify requests, {gap.losses:,}"
        f" right answers were lost and {gap.gains:,} gained ({gap.method})."
    )
