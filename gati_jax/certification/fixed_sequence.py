"""Fixed-sequence testing: how far along its path a plan may go, with confidence 1 - delta.

"Learn then Test" (Angelopoulos et al., arXiv:2110.01052): the plan's path is walked from its strictest step on; the
null hypothesis of a step, "the disagreement exceeds epsilon", is rejected while its exact binomial p-value is at most
delta; the last step before the first failure is certified. The number of steps needs no correction, because their order
was fixed before the data was seen. It holds for requests drawn independently from the same distribution as these.

Rows that come in groups (recordings, patients, cameras) are not independent, and are then certified by group; see
``certify``. Plans that are certified together share delta: each of m is tested at delta / m. For later looks see
``looks``.
"""

import dataclasses
import hashlib
import itertools
import logging
import warnings
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from gati_jax.data import check_distinct_rows, fingerprint
from gati_jax.errors import InputError, check_kind, check_share
from gati_jax.planning.binomial import p_value, samples_needed
from gati_jax.planning.tables import Outcome, ReplayTable, neighbours_resemble, replay_plan
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
    check_arithmetics,
    check_name,
    trial_level,
)
from .looks import AnyLedger, count_duplicates, find_ledger

_log = logging.getLogger(__name__)
_RESEMBLANCE = 0.1  # of neighbouring rows, above which they are taken to be of groups


def certify(
    plan: Plan,
    table: ReplayTable,
    epsilon: float,
    delta: float = 0.05,
    *,
    ledger: AnyLedger = "user",
    reveal: bool = False,
    groups: Shaped[np.ndarray, " n"] | Sequence[Hashable] | None = None,
    group_tolerance: float | None = None,
    base_saw_data: bool = False,
    duplicates: bool = False,
) -> Certificate:
    """Certify the farthest step of a plan's path that the data supports.

    Args:
        plan: Composed, and thereby fixed, on other rows.
        table: Replay of the certify split with the candidates of the plan. If it has labels, the certificate also
            bounds the loss of accuracy, at a delta of its own of the same size.
        epsilon: The disagreement to certify.
        delta: The risk that this or any other look at these rows certifies wrongly; look j is tested at
            6 delta / (pi^2 j^2).
        ledger: Where looks are counted: the user's own (see ``user_path``), or another or its file. None: nowhere; that
            this is the only look at these rows is then the caller's word, the test is at delta, and the certificate
            says so.
        reveal: Say why caches stay off also where nothing is certified. This closes the rows: any later plan could
            have been chosen by it.
        groups: Of every row the recording, patient or camera that it came from, where only these are independent: a
            number or a name. No group may have rows in two splits, nor in the fit. Certified is the mean over groups of
            the share of a group's rows that disagree, by betting.
        group_tolerance: Certify another thing of groups: that at most epsilon of them have more than this share of rows
            that disagree, by the exact binomial test.
        base_saw_data: Whether the base was trained on these rows, which makes it (and so its caches) more confident.
        duplicates: Whether equal rows are separate requests, drawn one by one from traffic that repeats itself, and not
            copies. Otherwise more than 1 % of them are an error, and fewer a warning.

    Raises:
        InputError: The table is empty, of other parameters than the plan's, lacks a candidate, shares rows with the
            plan's or the fit's, or has duplicate rows; epsilon or delta is outside (0, 1); some rows are closed, see
            ``Ledger``; there is not a group for every row.
    """
    if groups is None and group_tolerance is not None:
        raise InputError(f"group_tolerance: expected groups with it, got {group_tolerance} alone")
    grouping = None if groups is None else Grouping.of(groups, group_tolerance, len(table))
    method = MARGINAL if grouping is None else grouping.method
    terms = _Terms(delta=delta, method=method, grouping=grouping, base_saw_data=base_saw_data, duplicates=duplicates)
    return _look({"default": (plan, epsilon)}, table, terms, ledger, reveal=reveal)["default"]


def certify_together(
    plans: Mapping[str, tuple[Plan, float]],
    table: ReplayTable,
    delta: float = 0.05,
    *,
    ledger: AnyLedger = "user",
    reveal: bool = False,
    base_saw_data: bool = False,
    duplicates: bool = False,
    arithmetics: Mapping[str, Sequence[ReplayTable]] | None = None,
) -> dict[str, Certificate]:
    """Certify several plans in one look at the data, each at its level divided by their number.

    Which of them is used may then be decided at any time.

    Args:
        plans: By name, each with its epsilon.
        table: Replay of the certify split with the candidates of all plans.
        delta: The risk that any of the certificates is wrong.
        ledger: As for ``certify``; however many plans, this is one look, and it passes if any of them does.
        reveal: As for ``certify``.
        base_saw_data: As for ``certify``.
        duplicates: As for ``certify``.
        arithmetics: Further ones that may answer, by ``Tuning.programs``: replays of the same rows in each way that
            they run, with their base's answers. A row then disagrees if it does in any arithmetic, the base's own
            answer among them, and the certificates hold in all of them.

    Raises:
        InputError: As for ``certify``; or there is no plan, an arithmetic without a replay, or one of other rows.
    """
    if not plans:
        raise InputError("plans: expected at least one, got none")
    for name in plans:
        check_name(name)
    others = tuple(replay for replays in (arithmetics or {}).values() for replay in replays)
    terms = _Terms(
        delta=delta, plans=len(plans), base_saw_data=base_saw_data, duplicates=duplicates,
        arithmetics=tuple(sorted(arithmetics or ())), others=others,
    )  # fmt: skip
    check_arithmetics(terms.arithmetics)
    for replays in (arithmetics or {}).values():
        if not replays or any(not np.array_equal(other.rows, table.rows) for other in replays):
            raise InputError("arithmetics: expected replays of the table's rows in their order, got none or other rows")
        for other, (plan, _) in itertools.product(replays, plans.values()):
            _checked(plan, other)
    return _look(plans, table, terms, ledger, reveal=reveal)


def certify_conditional(
    plan: Plan,
    table: ReplayTable,
    alpha: float,
    delta: float = 0.05,
    *,
    ledger: AnyLedger = "user",
    reveal: bool = False,
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
        delta: As for ``certify``.
        ledger: As for ``certify``.
        reveal: As for ``certify``.
        base_saw_data: As for ``certify``.
        duplicates: As for ``certify``.

    Raises:
        InputError: As for ``certify``.
    """
    check_share("alpha", alpha)
    terms = _Terms(delta=delta, base_saw_data=base_saw_data, duplicates=duplicates, method=CONDITIONAL)
    return _look({"default": (plan, alpha)}, table, terms, ledger, reveal=reveal)["default"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Terms:
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

    def __post_init__(self) -> None:
        check_share("delta", self.delta)

    @property
    def digest(self) -> str:
        """What is tested besides rows, one by one, in the reference arithmetic; empty if nothing is."""
        grouped = "" if self.grouping is None else self.grouping.digest
        return hashlib.sha256(repr(self.arithmetics).encode()).hexdigest()[:32] if self.arithmetics else grouped

    @property
    def level(self) -> float:
        return (trial_level(self.delta, self.looks) if self.recorded else self.delta) / self.plans


def _look(
    plans: Mapping[str, tuple[Plan, float]], table: ReplayTable, terms: _Terms, ledger: AnyLedger, *, reveal: bool
) -> dict[str, Certificate]:
    """Open the rows of a table once, for all plans. Whatever can be refused is refused before that."""
    for _, epsilon in plans.values():
        check_share("epsilon", epsilon)
    tables = {name: _checked(plan, table) for name, (plan, _) in plans.items()}
    repeated = count_duplicates(table.rows, drawn=terms.duplicates)
    if terms.grouping is None and (resemblance := neighbours_resemble(table)) > _RESEMBLANCE:
        warnings.warn(
            f"table: expected independent rows, got neighbours whose scores correlate ({resemblance:.2f}): if rows come"
            " in groups (recordings, patients, cameras), certify with groups, for a certificate by rows is false then",
            stacklevel=3,
        )
    counted = find_ledger(ledger)
    look = counted and counted.open(table.rows, plans, terms.delta, terms.method, terms.digest)
    if look is not None:
        terms = dataclasses.replace(terms, looks=look[0].number, recorded=True)
        if terms.looks > 1:
            text = f"look {terms.looks} at this certify data: tested at delta {terms.level * terms.plans:.2g}"
            warnings.warn(text, stacklevel=3)
    certificates = {
        name: _certify(plan, tables[name], epsilon, terms, name=name, repeated=repeated)
        for name, (plan, epsilon) in plans.items()
    }
    needs = {name: one.rows_needed(plans[name][0].least_disagreement) for name, one in certificates.items()}
    for name, one in certificates.items():
        if not one.certified:
            _log.warning("certify: NOTHING CERTIFIED of plan %s, the base answers every request: %s", name, needs[name])
    if counted is None or look is None:
        return certificates
    passed = any(certificate.certified for certificate in certificates.values())
    if passed or reveal:
        counted.close(look, "passed" if passed else "revealed")
        return certificates
    following = f"look {terms.looks + 1}, tested at delta {trial_level(terms.delta, terms.looks + 1):.2g}"
    untold = (
        "every cache stays off; why is told on request (reveal), which closes these rows for other plans; another plan"
        f" would be {following}"
    )
    return {name: dataclasses.replace(one, stays_off=(untold, needs[name])) for name, one in certificates.items()}


def _certify(plan: Plan, table: ReplayTable, epsilon: float, terms: _Terms, *, name: str, repeated: int) -> Certificate:
    """Walk the path until a step fails."""
    outcomes = _outcomes(plan, table, terms.others)
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
        arithmetics=terms.arithmetics,
        groups=terms.grouping and terms.grouping.counts(outcomes[max(step, 0)].disagrees),
        accuracy_gap=certified_gap(
            table, outcomes[step].classes, terms.delta, level=terms.level, steps=len(plan.path) - 1
        )
        if step > 0 and terms.grouping is None
        else None,  # its bound is for independent rows
        stays_off=_stays_off(plan, step, outcomes, epsilon, terms),
    )


def _outcomes(plan: Plan, table: ReplayTable, others: Sequence[ReplayTable]) -> list[Outcome]:
    """Return the outcome of every step; a row disagrees if it does in any arithmetic."""
    found, others = [], [other.take(plan.names) for other in others]
    for thresholds in plan.path:
        outcome = replay_plan(table, thresholds)
        elsewhere = [replay_plan(other, thresholds).classes != table.answers for other in others]
        found.append(dataclasses.replace(outcome, disagrees=np.any([outcome.disagrees, *elsewhere], axis=0)))
    return found


def _checked(plan: Plan, table: ReplayTable) -> ReplayTable:
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
    plan: Plan, step: int, outcome: Outcome, epsilon: float, terms: _Terms
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


def _stays_off(plan: Plan, step: int, outcomes: list[Outcome], epsilon: float, terms: _Terms) -> tuple[str, ...]:
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


def _samples_missing(outcomes: list[Outcome], epsilon: float, terms: _Terms) -> str:
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
