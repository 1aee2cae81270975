"""Certifying: how far along its path a plan may go, with confidence 1 - delta.

Fixed-sequence testing ("Learn then Test", Angelopoulos et al., arXiv:2110.01052): the plan's path is walked from its
strictest step on; the null hypothesis of a step, "the disagreement exceeds epsilon", is rejected while its
exact binomial p-value is at most delta; the last step before the first failure is certified. The number of steps needs
no correction, because their order was fixed before the data was seen. It holds for requests drawn as these were.

Plans that are certified together share delta: each is tested at delta / m.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt64

from gati_jax.data import check_distinct_rows, fingerprint
from gati_jax.errors import InputError
from gati_jax.planning.binomial import p_value, samples_needed
from gati_jax.planning.tables import Outcome, ReplayTable, replay_plan
from gati_jax.planning.threshold_path import Plan

from .accuracy_gap import AccuracyGap, accuracy_gap_bound
from .certificate import CONDITIONAL, MARGINAL, Certificate, ExitRate, Method, check_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Terms:
    """What all certificates of one look have in common."""

    delta: float
    looks: int
    plans: int
    base_saw_data: bool
    repeats: bool

    def __post_init__(self) -> None:
        _check_share("delta", self.delta)
        for name in ("looks", "plans"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected 1 or more, got {getattr(self, name)}")

    @property
    def level(self) -> float:
        return self.delta / self.looks / self.plans


class _Test(NamedTuple):
    """The test of one step."""

    p_value: float  # the largest of the exits' where each has one
    exits: tuple[ExitRate, ...] = ()


def certify(
    plan: Plan,
    table: ReplayTable,
    epsilon: float,
    delta: float = 0.05,
    *,
    looks: int = 1,
    base_saw_data: bool = False,
    repeats: bool = False,
) -> Certificate:
    """Certify the farthest step of a plan's path that the data supports.

    Args:
        plan: Composed, and thereby fixed, on other rows.
        table: Replay of the certify split with the candidates of the plan. If it has labels, the certificate also
            bounds the loss of accuracy, at a delta of its own of the same size.
        epsilon: The disagreement to certify.
        delta: The risk that the certificate is wrong.
        looks: How often these rows have been opened for certificates, this time included. A second look pays: it is
            tested at delta / looks. That bounds the risk of each look, not of the whole series of looks.
        base_saw_data: Whether the base was trained on these rows, which makes it (and so its caches) surer on them.
        repeats: Whether equal rows are requests drawn one by one from traffic that repeats itself, and not copies. Else
            over 1 % of them are refused, and fewer warn.

    Raises:
        InputError: The table is empty, of other parameters than the plan's, lacks a candidate, shares rows with the
            plan's, or repeats rows; epsilon or delta is outside (0, 1).
    """
    terms = _Terms(delta=delta, looks=looks, plans=1, base_saw_data=base_saw_data, repeats=repeats)
    _warn_of_looks(looks)
    return _certify(plan, table, epsilon, terms, MARGINAL)


def certify_together(
    plans: Mapping[str, tuple[Plan, float]],
    table: ReplayTable,
    delta: float = 0.05,
    *,
    looks: int = 1,
    base_saw_data: bool = False,
    repeats: bool = False,
) -> dict[str, Certificate]:
    """Certify several plans in one look at the data: that any of the certificates is wrong has risk delta.

    Each is tested at delta divided by the number of plans. Which of them is used may then be decided at any time.

    Args:
        plans: By name, each with its epsilon.
        table: Replay of the certify split with the candidates of all plans.
        delta: The risk of all together.
        looks: As for ``certify``: however many plans, this is one look.
        base_saw_data: As for ``certify``.
        repeats: As for ``certify``.

    Raises:
        InputError: As for ``certify``; or there is no plan.
    """
    if not plans:
        raise InputError("plans: expected at least one, got none")
    terms = _Terms(delta=delta, looks=looks, plans=len(plans), base_saw_data=base_saw_data, repeats=repeats)
    for name in plans:
        check_name(name)
    _warn_of_looks(looks)
    return {
        name: dataclasses.replace(_certify(plan, table, epsilon, terms, MARGINAL), name=name)
        for name, (plan, epsilon) in plans.items()
    }


def certify_conditional(
    plan: Plan,
    table: ReplayTable,
    alpha: float,
    delta: float = 0.05,
    *,
    name: str = "default",
    looks: int = 1,
    plans: int = 1,
    base_saw_data: bool = False,
    repeats: bool = False,
) -> Certificate:
    """Certify that of the requests that leave at or before site k at most alpha disagree, for every k at once.

    An easy majority that leaves later cannot hide what an early exit does ("Early time classification with accumulated
    accuracy gap control", Ringel et al., ICML 2024, who control the gap to the labels so).

    The path is walked as by ``certify``. A step's null hypothesis is that some cache which is on has more than alpha of
    the requests that leave at or before it disagree. For each of these caches, given the number n of certify requests
    that left so, their disagreements are binomial. The step passes only if *every* cache's exact p-value is at most
    delta. Delta is not shared among the exits: where the null hypothesis is true, one of these tests is of a true null
    hypothesis, and that one alone passes with probability at most delta (an intersection-union test).

    A cache that nobody left at or before has the p-value 1: nothing is known of it, and the step fails. With few the
    step fails, too: at alpha 0.02 and delta 0.05, 149 must leave and all agree. The greedy path of ``plan`` opens
    caches for a few requests at first, and so often fails at its first step: see ``conditional_plan`` for a better one.

    Args:
        plan: Composed, and thereby fixed, on other rows.
        table: As for ``certify``.
        alpha: The disagreement to certify at every exit; the certificate's ``epsilon``.
        delta: The risk that the certificate is wrong.
        name: The certificate's.
        looks: As for ``certify``.
        plans: How many plans are certified in this look, each at delta / plans.
        base_saw_data: As for ``certify``.
        repeats: As for ``certify``.

    Raises:
        InputError: As for ``certify``.
    """
    _check_share("alpha", alpha)
    check_name(name)
    terms = _Terms(delta=delta, looks=looks, plans=plans, base_saw_data=base_saw_data, repeats=repeats)
    _warn_of_looks(looks)
    return dataclasses.replace(_certify(plan, table, alpha, terms, CONDITIONAL), name=name)


def _certify(plan: Plan, table: ReplayTable, epsilon: float, terms: _Terms, method: Method) -> Certificate:
    """Walk the path until a step fails."""
    _check_share("epsilon", epsilon)
    table = _checked(plan, table)
    repeated = count_duplicates(table.rows, drawn=terms.repeats)
    outcomes = [replay_plan(table, thresholds) for thresholds in plan.path]
    step, passed = -1, _Test(p_value(0, len(table), epsilon))
    for i, outcome in enumerate(outcomes):
        tested = _tested(plan, i, outcome, epsilon, method)
        if tested.p_value > terms.level:
            break
        if i == 0 or np.isfinite(plan.path[i]).any():  # a step that opens nothing says nothing
            step, passed = i, tested
    if step <= 0:
        step = -1  # step 0 is the bare base: nothing to certify
    count = int(outcomes[step].disagrees.sum()) if step > 0 else 0
    sentences = _conditionally_off if method == CONDITIONAL else _stays_off
    return Certificate(
        epsilon=epsilon,
        delta=terms.delta,
        step=step,
        n=len(table),
        disagreements=count,
        p_value=passed.p_value if step > 0 else p_value(0, len(table), epsilon),
        method=method,
        looks=terms.looks,
        plans=terms.plans,
        base_saw_data=terms.base_saw_data,
        plan_hash=plan.hash,
        data_fingerprint=fingerprint(table.rows),
        select_fingerprint=fingerprint(plan.rows),
        repeated=repeated,
        exits=passed.exits if step > 0 else (),
        accuracy_gap=_gap(plan, table, outcomes[step], terms) if step > 0 else None,
        stays_off=sentences(plan, step, outcomes, epsilon, terms.level),
    )


def _checked(plan: Plan, table: ReplayTable) -> ReplayTable:
    """Return the table of the plan's candidates; refuse one that it cannot be certified on."""
    if len(table) == 0:
        raise InputError("table: expected at least one request, got none")
    table = table.take(plan.names)
    if (table.sites, table.depth) != (plan.sites, plan.depth):
        got = f"{table.sites} of {table.depth}"
        raise InputError(f"table: expected the plan's sites {plan.sites} of {plan.depth} blocks, got {got}")
    plan.origin.check(table.origin, "table")
    check_distinct_rows(table.rows, plan.rows, names=("certify", "select"))
    return table


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InputError(f"{name}: expected a number between 0 and 1, got {value}")


def _warn_of_looks(looks: int) -> None:
    if looks > 1:
        warnings.warn(f"look {looks} at this certify data: tested at delta / {looks}", stacklevel=3)


def _tested(plan: Plan, step: int, outcome: Outcome, epsilon: float, method: Method) -> _Test:
    if method == CONDITIONAL:
        exits = exit_rates(plan, step, outcome, epsilon)
        return _Test(max((e.p_value for e in exits), default=0.0), exits)  # the bare base cannot fail
    return _Test(p_value(int(outcome.disagrees.sum()), len(outcome.disagrees), epsilon))


def exit_rates(plan: Plan, step: int, outcome: Outcome, alpha: float) -> tuple[ExitRate, ...]:
    """Count, for every cache that is on, the requests that left at or before it, and those of them that disagree."""
    caches = len(plan.names)
    left = np.cumsum(np.bincount(outcome.exits, minlength=caches + 1))
    wrong = np.cumsum(np.bincount(outcome.exits[outcome.disagrees], minlength=caches + 1))
    # Of several caches at one site the last stands for all of them: the requests that leave at the site.
    last = {plan.sites[c]: c for c in np.flatnonzero(np.isfinite(plan.path[step])).tolist()}
    return tuple(
        ExitRate(
            site=site,
            n=int(left[c]),
            disagreements=int(wrong[c]),
            p_value=p_value(int(wrong[c]), int(left[c]), alpha),
        )
        for site, c in last.items()
    )


def _gap(plan: Plan, table: ReplayTable, outcome: Outcome, terms: _Terms) -> AccuracyGap | None:
    """Bound the loss of accuracy at the certified step, which the same data chose: bounds for all steps must hold."""
    if table.labels is None:
        return None
    base, cascade = table.answers == table.labels, outcome.classes == table.labels
    comparisons = (len(plan.path) - 1) * terms.looks * terms.plans
    return accuracy_gap_bound(base, cascade, terms.delta, comparisons=comparisons)


def _opening_steps(plan: Plan, step: int) -> list[tuple[int, int]]:
    """Return every cache that is off with the first step that opens it."""
    off = np.flatnonzero(np.isinf(plan.thresholds(step))).tolist()
    return [(cache, int(np.argmax(np.isfinite(plan.path[:, cache])))) for cache in off]


def _stays_off(plan: Plan, step: int, outcomes: list[Outcome], epsilon: float, delta: float) -> tuple[str, ...]:
    """Say for every cache that is off what it would take to certify the first step that opens it."""
    sentences = []
    for cache, opens in _opening_steps(plan, step):
        rate, n = outcomes[opens].disagreement, len(outcomes[opens].disagrees)
        worst = max(outcomes[i].disagreement for i in range(opens + 1))  # every step up to it must pass
        needed = samples_needed(worst, epsilon, delta)
        more = (
            f"about {max(1, needed - n)} more certify samples would open it"
            if needed is not None
            else "no number of samples would open it: collect data or fit a better cache"
        )
        sentences.append(
            f"{plan.names[cache]} stays off: with it {rate:.2%} of {n} disagree, {epsilon:.2%} is allowed; {more}"
        )
    return tuple(sentences)


def _conditionally_off(plan: Plan, step: int, outcomes: list[Outcome], alpha: float, delta: float) -> tuple[str, ...]:
    """Say for every cache that is off which exit failed on the way to the first step that opens it."""
    sentences = []
    for cache, opens in _opening_steps(plan, step):
        # The walk stops at its first failure; a cache that no step opens has none, and no exit either.
        failed = next(
            (e for i in range(1, opens + 1) for e in exit_rates(plan, i, outcomes[i], alpha) if e.p_value > delta), None
        )
        why = (
            f"of {failed.n} that leave at or before site {failed.site} {failed.disagreements} disagree; it takes at"
            f" least {samples_needed(0.0, alpha, delta)}, of whom at most {alpha:.2%} may, with delta {delta:.3g}"
            if failed
            else "no step of the path opens it"
        )
        sentences.append(f"{plan.names[cache]} stays off: {why}")
    return tuple(sentences)


REPEATED_ROWS = 0.01  # as large a share may two splits have in common


def count_duplicates(rows: UInt64[np.ndarray, " n"], *, drawn: bool) -> int:
    """Return how many rows equal one before them.

    Args:
        rows: Digests.
        drawn: Whether it is known that each was drawn by itself.

    Raises:
        InputError: More than 1 % do, and nothing is known of them.
    """
    again = len(rows) - len(np.unique(rows))
    if again and not drawn:
        if again > REPEATED_ROWS * len(rows):
            msg = f"table: expected distinct rows, got {again} of {len(rows)} that repeat another; leave copies out, or"
            msg += " say by repeats that all were drawn one by one from traffic that repeats itself"
            raise InputError(msg)
        warnings.warn(
            f"{again} of {len(rows)} certify rows repeat another, and were counted all the same", stacklevel=4
        )
    return again
