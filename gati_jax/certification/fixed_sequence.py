"""Fixed-sequence testing: how far along its path a plan may go, with confidence 1 - delta.

"Learn then Test" (Angelopoulos et al., arXiv:2110.01052): the plan's path is walked from its strictest step on; the
null hypothesis of a step, "the disagreement exceeds epsilon", is rejected while its exact binomial p-value is at most
delta; the last step before the first failure is certified. The number of steps needs no correction, because their order
was fixed before the data was seen. It holds for requests drawn independently from the same distribution as these.

Plans that are certified together share delta: each of m is tested at delta / m.
"""

import dataclasses
import warnings
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt64

from gati_jax.data import check_distinct_rows, fingerprint
from gati_jax.errors import InputError, check_share
from gati_jax.planning.binomial import p_value, samples_needed
from gati_jax.planning.tables import Outcome, ReplayTable, replay_plan
from gati_jax.planning.threshold_path import Plan

from .accuracy_gap import AccuracyGap, accuracy_gap_bound
from .certificate import CONDITIONAL, MARGINAL, Certificate, ExitRate, Method, check_name

MOST_DUPLICATES = 0.01  # of the rows, unless they are known to be separate requests


def certify(
    plan: Plan,
    table: ReplayTable,
    epsilon: float,
    delta: float = 0.05,
    *,
    looks: int = 1,
    base_saw_data: bool = False,
    duplicates: bool = False,
) -> Certificate:
    """Certify the farthest step of a plan's path that the data supports.

    Args:
        plan: Composed, and thereby fixed, on other rows.
        table: Replay of the certify split with the candidates of the plan. If it has labels, the certificate also
            bounds the loss of accuracy, at a delta of its own of the same size.
        epsilon: The disagreement to certify.
        delta: The risk that the certificate is wrong.
        looks: How often these rows have been opened for certificates, this time included. A later look is tested at
            delta / looks, which bounds the risk of each look, not of the whole series of looks.
        base_saw_data: Whether the base was trained on these rows, which makes it (and so its caches) more confident.
        duplicates: Whether equal rows are separate requests, drawn one by one from traffic that repeats itself, and not
            copies. Otherwise more than 1 % of them are an error, and fewer a warning.

    Raises:
        InputError: The table is empty, of other parameters than the plan's, lacks a candidate, shares rows with the
            plan's, or has duplicate rows; epsilon or delta is outside (0, 1).
    """
    terms = _Terms(delta=delta, looks=looks, base_saw_data=base_saw_data, duplicates=duplicates)
    return _certify(plan, table, epsilon, terms)


def certify_together(
    plans: Mapping[str, tuple[Plan, float]],
    table: ReplayTable,
    delta: float = 0.05,
    *,
    looks: int = 1,
    base_saw_data: bool = False,
    duplicates: bool = False,
) -> dict[str, Certificate]:
    """Certify several plans in one look at the data, each at delta divided by their number.

    Which of them is used may then be decided at any time.

    Args:
        plans: By name, each with its epsilon.
        table: Replay of the certify split with the candidates of all plans.
        delta: The risk that any of the certificates is wrong.
        looks: As for ``certify``; however many plans, this is one look.
        base_saw_data: As for ``certify``.
        duplicates: As for ``certify``.

    Raises:
        InputError: As for ``certify``; or there is no plan.
    """
    if not plans:
        raise InputError("plans: expected at least one, got none")
    terms = _Terms(
        delta=delta, looks=looks, plans=len(plans), base_saw_data=base_saw_data, duplicates=duplicates
    )  # fmt: skip
    for name in plans:
        check_name(name)
    return {name: _certify(plan, table, epsilon, terms, name=name) for name, (plan, epsilon) in plans.items()}


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
    duplicates: bool = False,
) -> Certificate:
    """Certify that of the requests that leave at or before site k at most alpha disagree, for every k at once.

    Errors of an early exit cannot hide behind an easy majority that leaves later ("Early time classification with
    accumulated accuracy gap control", Ringel et al., ICML 2024, who control the gap to the labels in this way).

    The path is walked as by ``certify``. A step's null hypothesis is that for some cache which is on, more than alpha
    of the requests that leave at or before it disagree. For each of these caches, given the number n of certify
    requests that left so, their disagreements are binomial. The step passes only if *every* cache's exact p-value is
    at most delta. Delta is not shared among the exits: if the null hypothesis is true, one of these tests is of a true
    null hypothesis, and that one alone passes with probability at most delta (an intersection-union test).

    A cache that no request left at or before has the p-value 1, and the step fails. With few requests it fails, too: at
    alpha 0.02 and delta 0.05, 149 must leave and all agree. The path of ``plan`` opens caches for a few requests at
    first, and so often fails at its first step.

    Args:
        plan: Composed, and thereby fixed, on other rows.
        table: As for ``certify``.
        alpha: The disagreement to certify at every exit; the certificate's ``epsilon``.
        delta: The risk that the certificate is wrong.
        name: The certificate's.
        looks: As for ``certify``.
        plans: How many plans are certified in this look, each at delta / plans.
        base_saw_data: As for ``certify``.
        duplicates: As for ``certify``.

    Raises:
        InputError: As for ``certify``.
    """
    check_share("alpha", alpha)
    check_name(name)
    terms = _Terms(delta=delta, looks=looks, plans=plans, base_saw_data=base_saw_data, duplicates=duplicates)
    return _certify(plan, table, alpha, terms, method=CONDITIONAL, name=name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Terms:
    """What all certificates of one look have in common."""

    delta: float
    looks: int
    plans: int = 1
    base_saw_data: bool
    duplicates: bool

    def __post_init__(self) -> None:
        check_share("delta", self.delta)
        for name in ("looks", "plans"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.looks > 1:
            text = f"look {self.looks} at this certify data: tested at delta / {self.looks}"
            warnings.warn(text, stacklevel=4)

    @property
    def level(self) -> float:
        return self.delta / self.looks / self.plans


def _certify(
    plan: Plan, table: ReplayTable, epsilon: float, terms: _Terms, *, method: Method = MARGINAL, name: str = "default"
) -> Certificate:
    """Walk the path until a step fails."""
    check_share("epsilon", epsilon)
    table = _checked(plan, table)
    repeated = count_duplicates(table.rows, drawn=terms.duplicates)
    outcomes = [replay_plan(table, thresholds) for thresholds in plan.path]
    step, p, exits = -1, p_value(0, len(table), epsilon), ()  # the bare base, step 0, never disagrees
    for i in range(1, len(outcomes)):
        p_step, exits_step = _tested(plan, i, outcomes[i], epsilon, method)
        if p_step > terms.level:
            break
        if np.isfinite(plan.path[i]).any():  # a step that opens no cache certifies nothing
            step, p, exits = i, p_step, exits_step
    return Certificate(
        name=name,
        epsilon=epsilon,
        delta=terms.delta,
        step=step,
        n=len(table),
        disagreements=int(outcomes[step].disagrees.sum()) if step > 0 else 0,
        p_value=p,
        method=method,
        looks=terms.looks,
        plans=terms.plans,
        base_saw_data=terms.base_saw_data,
        plan_hash=plan.hash,
        data_fingerprint=fingerprint(table.rows),
        select_fingerprint=fingerprint(plan.rows),
        repeated=repeated,
        exits=exits,
        accuracy_gap=_gap(plan, table, outcomes[step], terms) if step > 0 else None,
        stays_off=_stays_off(plan, step, outcomes, epsilon, terms.level, method),
    )


def _checked(plan: Plan, table: ReplayTable) -> ReplayTable:
    """Return the table of the plan's candidates; refuse one on which the plan cannot be certified."""
    if len(table) == 0:
        raise InputError("table: expected at least one request, got none")
    table = table.take(plan.names)
    if (table.sites, table.depth) != (plan.sites, plan.depth):
        got = f"{table.sites} of {table.depth}"
        raise InputError(f"table: expected the plan's sites {plan.sites} of {plan.depth} blocks, got {got}")
    plan.source.check(table.source, "table")
    check_distinct_rows(table.rows, plan.rows, names=("certify", "select"))
    return table


def count_duplicates(rows: UInt64[np.ndarray, " n"], *, drawn: bool) -> int:
    """Return how many rows equal one before them.

    Args:
        rows: Digests.
        drawn: Whether it is known that each was drawn by itself.

    Raises:
        InputError: More than 1 % do, and they may be copies.
    """
    again = len(rows) - len(np.unique(rows))
    if again and not drawn:
        if again > MOST_DUPLICATES * len(rows):
            raise InputError(
                f"table: expected distinct rows, got {again} of {len(rows)} that repeat another; leave copies out, or"
                " set duplicates if all were drawn one by one from traffic that repeats itself"
            )
        warnings.warn(f"{again} of {len(rows)} certify rows repeat another, and were counted as requests", stacklevel=4)
    return again


def _tested(
    plan: Plan, step: int, outcome: Outcome, epsilon: float, method: Method
) -> tuple[float, tuple[ExitRate, ...]]:
    """Return the p-value of a step, the largest of its exits' in a conditional test, and the exits tested."""
    if method == CONDITIONAL:
        exits = _exit_rates(plan, step, outcome, epsilon)
        return max((e.p_value for e in exits), default=0.0), exits  # without a cache on, nothing can disagree
    return p_value(int(outcome.disagrees.sum()), len(outcome.disagrees), epsilon), ()


def _exit_rates(plan: Plan, step: int, outcome: Outcome, alpha: float) -> tuple[ExitRate, ...]:
    """Count, for every cache that is on, the requests that left at or before it, and those of them that disagree."""
    caches = len(plan.names)
    left = np.cumsum(np.bincount(outcome.exits, minlength=caches + 1)).tolist()
    wrong = np.cumsum(np.bincount(outcome.exits[outcome.disagrees], minlength=caches + 1)).tolist()
    # Of several caches at one site the last stands for all of them: the requests that leave at the site.
    last = {plan.sites[c]: c for c in np.flatnonzero(np.isfinite(plan.path[step])).tolist()}
    return tuple(
        ExitRate(site=site, n=left[c], disagreements=wrong[c], p_value=p_value(wrong[c], left[c], alpha))
        for site, c in last.items()
    )


def _gap(plan: Plan, table: ReplayTable, outcome: Outcome, terms: _Terms) -> AccuracyGap | None:
    """Bound the loss of accuracy at the certified step: the same data chose it, so all steps' bounds must hold."""
    if table.labels is None:
        return None
    base, cascade = table.answers == table.labels, outcome.classes == table.labels
    comparisons = (len(plan.path) - 1) * terms.looks * terms.plans
    return accuracy_gap_bound(base, cascade, terms.delta, comparisons=comparisons)


def _stays_off(
    plan: Plan, step: int, outcomes: list[Outcome], epsilon: float, level: float, method: Method
) -> tuple[str, ...]:
    """Say for every cache that is off why the first step that opens it is not certified."""
    off = np.flatnonzero(np.isinf(plan.thresholds(step))).tolist()
    opens = {cache: int(np.argmax(np.isfinite(plan.path[:, cache]))) for cache in off}
    reasons = {
        i: _failed_exit(plan, outcomes[: i + 1], epsilon, level)
        if method == CONDITIONAL
        else _samples_missing(outcomes[: i + 1], epsilon, level)
        for i in set(opens.values())
    }
    return tuple(f"{plan.names[cache]} stays off: {reasons[i]}" for cache, i in opens.items())


def _samples_missing(outcomes: list[Outcome], epsilon: float, level: float) -> str:
    """Say how many samples it would take to certify the last of these steps."""
    rate, n = outcomes[-1].disagreement, len(outcomes[-1].disagrees)
    worst = max(outcome.disagreement for outcome in outcomes)  # all steps before it must pass, too
    needed = samples_needed(worst, epsilon, level)
    more = (
        f"about {max(1, needed - n)} more certify samples would open it"
        if needed is not None
        else "no number of samples would open it: collect data or fit a better cache"
    )
    return f"with it {rate:.2%} of {n} disagree, {epsilon:.2%} is allowed; {more}"


def _failed_exit(plan: Plan, outcomes: list[Outcome], alpha: float, level: float) -> str:
    """Say which exit failed on the way to the last of these steps."""
    for i in range(1, len(outcomes)):
        for e in _exit_rates(plan, i, outcomes[i], alpha):
            if e.p_value > level:
                return (
                    f"of {e.n} that leave at or before site {e.site} {e.disagreements} disagree; it takes at least"
                    f" {samples_needed(0.0, alpha, level)}, of whom at most {alpha:.2%} may, with delta {level:.3g}"
                )
    return "no step of the path opens it"
