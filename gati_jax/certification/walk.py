"""The walk along a plan's path: the outcome of every step, its test, and why caches stay off."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from gati_jax.data import check_distinct_rows, fingerprint
from gati_jax.errors import InputError, check_kind, check_share
from gati_jax.planning.binomial import p_value, samples_needed
from gati_jax.planning.tables import Outcome, ReplayTable, replay_plan
from gati_jax.planning.threshold_path import Plan

from .accuracy_gap import certified_gap
from .betting import mean_p_value
from .certificate import (
    BAD_GROUPS,
    CONDITIONAL,
    GROUP_MEAN,
    MARGINAL,
    Certificate,
    ExitRate,
    Grouping,
    Method,
    trial_level,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """What all certificates of one look have in common."""

    delta: float
    looks: int = 1
    recorded: bool = False
    plans: int = 1
    method: Method = MARGINAL
    grouping: Grouping | None = None
    base_saw_data: bool
    duplicates: bool
    arithmetics: tuple[str, ...] = ()
    others: tuple[ReplayTable, ...] = ()  # replays in these arithmetics
    apart: tuple[
        tuple[str, str], ...
    ] = ()  # numerics with certificates of their own, and the digests of their programs

    def __post_init__(self) -> None:
        """Check the risk."""
        check_share("delta", self.delta)

    @property
    def digest(self) -> str:
        """What is tested besides rows, one by one, in the reference arithmetic; empty if nothing is."""
        grouped = "" if self.grouping is None else self.grouping.digest
        tested = repr(self.arithmetics) if not self.apart else repr((self.arithmetics, self.apart))
        both = (tested + grouped).encode()
        return hashlib.sha256(both).hexdigest()[:32] if self.arithmetics or self.apart else grouped

    @property
    def level(self) -> float:
        """What the p-value of a step is compared with."""
        return (trial_level(self.delta, self.looks) if self.recorded else self.delta) / self.plans


def walk_path(
    plan: Plan,
    table: ReplayTable,
    epsilon: float,
    terms: Terms,
    *,
    name: str,
    repeated: int,
    apart: tuple[str, str] | None = None,
    replays: Sequence[ReplayTable] = (),
) -> Certificate:
    """Walk the path until a step fails.

    Args:
        plan: Whose path.
        table: The reference replay.
        epsilon: The disagreement to certify.
        terms: Of the look.
        name: Of the plan.
        repeated: See ``Certificate``.
        apart: Other numerics than the reference, and the digest of their programs; None certifies the reference, in
            which further arithmetics count as well.
        replays: In these numerics, in each way that they run.
    """
    outcomes = _outcomes(plan, table, replays) if apart else _outcomes(plan, table, (table, *terms.others))
    step, p, exits = -1, p_value(0, len(table), epsilon), ()  # the bare base, step 0, never disagrees
    for i in range(1, len(outcomes)):
        p_step, exits_step = _tested(plan, i, outcomes[i], epsilon, terms)
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
        method=terms.method,
        looks=terms.looks,
        recorded=terms.recorded,
        plans=terms.plans,
        base_saw_data=terms.base_saw_data,
        plan_hash=plan.hash,
        data_fingerprint=fingerprint(table.rows),
        select_fingerprint=fingerprint(plan.rows),
        repeated=repeated,
        exits=exits,
        numerics=apart[0] if apart else "reference",
        arithmetics=apart[1:] if apart else terms.arithmetics,
        groups=terms.grouping and terms.grouping.counts(outcomes[max(step, 0)].disagrees),
        accuracy_gap=certified_gap(
            table, outcomes[step].classes, terms.delta, level=terms.level, steps=len(plan.path) - 1
        )
        if step > 0 and terms.grouping is None and apart is None
        else None,  # its bound is for independent rows, and of the reference
        stays_off=_stays_off(plan, step, outcomes, epsilon, terms),
    )


def _outcomes(plan: Plan, table: ReplayTable, replays: Sequence[ReplayTable]) -> list[Outcome]:
    """Return the outcome of every step; a row disagrees with the reference base if it does in any of the replays."""
    found, replays = [], [replay.take(plan.names) for replay in replays]
    for thresholds in plan.path:
        outcomes = [replay_plan(replay, thresholds) for replay in replays]
        wrong = np.any([outcome.classes != table.answers for outcome in outcomes], axis=0)
        found.append(dataclasses.replace(outcomes[0], disagrees=wrong))
    return found


def checked_table(plan: Plan, table: ReplayTable) -> ReplayTable:
    """Return the table of the plan's candidates; refuse one on which the plan cannot be certified."""
    check_kind("plan", plan, Plan, "what gati_jax.plan returns")
    check_kind("table", table, ReplayTable, "what gati_jax.replay returns")
    if len(table) == 0:
        raise InputError("table: expected at least one request, got none")
    table = table.take(plan.names)
    if (table.sites, table.depth) != (plan.sites, plan.depth):
        got = f"{table.sites} of {table.depth}"
        raise InputError(f"table: expected the plan's sites {plan.sites} of {plan.depth} blocks, got {got}")
    plan.source.check(table.source, "table")
    check_distinct_rows(table.rows, plan.rows, names=("certify", "select"))
    # On rows of a fit a cache is better than it will be, or its score is of a selector that is not deployed.
    for fitted in (plan.fitted_rows, table.fitted_rows):
        check_distinct_rows(table.rows, fitted, names=("certify", "the rows of the fit"))
    return table


def _tested(
    plan: Plan, step: int, outcome: Outcome, epsilon: float, terms: Terms
) -> tuple[float, tuple[ExitRate, ...]]:
    """Return the p-value of a step, the largest of its exits' in a conditional test, and the exits tested."""
    if terms.method == CONDITIONAL:
        exits = _exit_rates(plan, step, outcome, epsilon)
        return max((e.p_value for e in exits), default=0.0), exits  # without a cache on, nothing can disagree
    if terms.method == GROUP_MEAN and terms.grouping is not None:
        return mean_p_value(terms.grouping.losses(outcome.disagrees), epsilon, float(plan.disagreement[step])), ()
    if terms.method == BAD_GROUPS and terms.grouping is not None:
        counts = terms.grouping.counts(outcome.disagrees)
        return p_value(counts.bad, counts.n, epsilon), ()
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


def _stays_off(plan: Plan, step: int, outcomes: list[Outcome], epsilon: float, terms: Terms) -> tuple[str, ...]:
    """Say for every cache that is off why the first step that opens it is not certified."""
    off = np.flatnonzero(np.isinf(plan.thresholds(step))).tolist()
    opens = {cache: int(np.argmax(np.isfinite(plan.path[:, cache]))) for cache in off}
    reasons = {
        i: _failed_exit(plan, outcomes[: i + 1], epsilon, terms.level)
        if terms.method == CONDITIONAL
        else _samples_missing(outcomes[: i + 1], epsilon, dataclasses.replace(terms, looks=1))
        for i in set(opens.values())
    }
    return tuple(f"{plan.names[cache]} stays off: {reasons[i]}" for cache, i in opens.items())


def _samples_missing(outcomes: list[Outcome], epsilon: float, terms: Terms) -> str:
    """Say how many fresh rows it would take to certify the last of these steps in a first look; these are closed."""
    if (grouping := terms.grouping) is None:
        unit, what = "rows", f"of {len(outcomes[-1].disagrees)} disagree"
        rates = [outcome.disagreement for outcome in outcomes]
    elif grouping.tolerance is None:
        unit, what = "groups", f"disagree in the mean over {len(grouping.sizes)} groups"
        rates = [float(grouping.losses(outcome.disagrees).mean()) for outcome in outcomes]
    else:
        unit, what = "groups", f"of {len(grouping.sizes)} groups are bad"
        rates = [float((grouping.losses(outcome.disagrees) > grouping.tolerance).mean()) for outcome in outcomes]
    needed = samples_needed(max(rates), epsilon, terms.level)  # all steps before it must pass, too
    more = (
        f"about {needed} fresh certify {unit}, without any of these, would open it"
        if needed is not None
        else f"no number of {unit} would open it: collect data or fit a better cache"
    )
    return f"with it {rates[-1]:.2%} {what}, {epsilon:.2%} is allowed; {more}"


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
