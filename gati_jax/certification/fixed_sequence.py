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
import itertools
import logging
import warnings
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from gati_jax.errors import InputError, check_kind, check_share
from gati_jax.planning.tables import ReplayTable, neighbours_resemble
from gati_jax.planning.threshold_path import Plan

from .certificate import (
    CONDITIONAL,
    MARGINAL,
    Certificate,
    Grouping,
    Method,
    check_arithmetics,
    check_name,
    trial_level,
)
from .looks import AnyLedger, count_duplicates, find_ledger
from .walk import Terms, checked_table, walk_path

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
    grouping, method = _grouped(groups, group_tolerance, table)
    terms = Terms(delta=delta, method=method, grouping=grouping, base_saw_data=base_saw_data, duplicates=duplicates)
    return _look({"default": (plan, epsilon)}, table, terms, ledger, reveal=reveal)["reference"]["default"]


def certify_together(
    plans: Mapping[str, tuple[Plan, float]],
    table: ReplayTable,
    delta: float = 0.05,
    *,
    ledger: AnyLedger = "user",
    reveal: bool = False,
    groups: Shaped[np.ndarray, " n"] | Sequence[Hashable] | None = None,
    group_tolerance: float | None = None,
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
        groups: As for ``certify``.
        group_tolerance: As for ``certify``.
        base_saw_data: As for ``certify``.
        duplicates: As for ``certify``.
        arithmetics: Further ones that may answer, by ``Tuning.programs``: replays of the same rows in each way that
            they run, with their base's answers. A row then disagrees if it does in any arithmetic, the base's own
            answer among them, and the certificates hold in all of them.

    Raises:
        InputError: As for ``certify``; or there is no plan, an arithmetic without a replay, or one of other rows.
    """
    apart: Mapping[str, tuple[str, Sequence[ReplayTable]]] = {}
    return certify_numerics(
        plans, table, apart, delta, ledger=ledger, reveal=reveal, groups=groups, group_tolerance=group_tolerance,
        base_saw_data=base_saw_data, duplicates=duplicates, arithmetics=arithmetics,
    )["reference"]  # fmt: skip


def certify_numerics(
    plans: Mapping[str, tuple[Plan, float]],
    table: ReplayTable,
    numerics: Mapping[str, tuple[str, Sequence[ReplayTable]]],
    delta: float = 0.05,
    *,
    ledger: AnyLedger = "user",
    reveal: bool = False,
    groups: Shaped[np.ndarray, " n"] | Sequence[Hashable] | None = None,
    group_tolerance: float | None = None,
    base_saw_data: bool = False,
    duplicates: bool = False,
    arithmetics: Mapping[str, Sequence[ReplayTable]] | None = None,
) -> dict[str, dict[str, Certificate]]:
    """Certify several plans in the reference arithmetic and in others, each with certificates of its own.

    Every plan is walked anew in each of them, so that its certified steps may differ. A row disagrees if the answer is
    not the *reference* base's, be it a cache's or that of the base in these numerics. All are tested at delta divided
    by the number of plans times the number of numerics.

    Args:
        plans: As for ``certify_together``.
        table: As for ``certify_together``.
        numerics: By name, the digest of their programs and replays of the same rows in each way that they run, with
            their base's answers.
        delta: The risk that any of the certificates is wrong.
        ledger: As for ``certify_together``.
        reveal: As for ``certify``.
        groups: As for ``certify``.
        group_tolerance: As for ``certify``.
        base_saw_data: As for ``certify``.
        duplicates: As for ``certify``.
        arithmetics: As for ``certify_together``; they count along with the reference.

    Returns:
        By numerics, "reference" first, and then by plan. A bound on lost accuracy is of the reference alone.

    Raises:
        InputError: As for ``certify_together``.
    """
    if not plans:
        raise InputError("plans: expected at least one, got none")
    for name in plans:
        check_name(name)
    others = tuple(replay for replays in (arithmetics or {}).values() for replay in replays)
    grouping, method = _grouped(groups, group_tolerance, table)
    terms = Terms(
        delta=delta, method=method, grouping=grouping, plans=len(plans) * (1 + len(numerics)),
        base_saw_data=base_saw_data, duplicates=duplicates,
        arithmetics=tuple(sorted(arithmetics or ())), others=others,
        apart=tuple((name, programs) for name, (programs, _) in sorted(numerics.items())),
    )  # fmt: skip
    check_arithmetics((*terms.arithmetics, *(programs for _, programs in terms.apart)))
    if "reference" in numerics:
        raise InputError("numerics: expected others than the reference, which is always certified, got it")
    apart = {name: replays for name, (_, replays) in numerics.items()}
    for replays in (*(arithmetics or {}).values(), *apart.values()):
        if not replays or any(not np.array_equal(other.rows, table.rows) for other in replays):
            raise InputError("arithmetics: expected replays of the table's rows in their order, got none or other rows")
        for other, (plan, _) in itertools.product(replays, plans.values()):
            checked_table(plan, other)
    return _look(plans, table, terms, ledger, reveal=reveal, replays=apart)


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
    terms = Terms(delta=delta, base_saw_data=base_saw_data, duplicates=duplicates, method=CONDITIONAL)
    return _look({"default": (plan, alpha)}, table, terms, ledger, reveal=reveal)["reference"]["default"]


def _grouped(
    groups: Shaped[np.ndarray, " n"] | Sequence[Hashable] | None, tolerance: float | None, table: ReplayTable
) -> tuple[Grouping | None, Method]:
    """Return the groups of a table's rows, and what is certified."""
    if groups is None:
        if tolerance is not None:
            raise InputError(f"group_tolerance: expected groups with it, got {tolerance} alone")
        return None, MARGINAL
    check_kind("table", table, ReplayTable, "what gati_jax.replay returns")
    grouping = Grouping.of(groups, tolerance, len(table))
    return grouping, grouping.method


def _look(
    plans: Mapping[str, tuple[Plan, float]],
    table: ReplayTable,
    terms: Terms,
    ledger: AnyLedger,
    *,
    reveal: bool,
    replays: Mapping[str, Sequence[ReplayTable]] | None = None,
) -> dict[str, dict[str, Certificate]]:
    """Open the rows of a table once, for all plans. Whatever can be refused is refused before that.

    Returns:
        By numerics, the reference first, and then by plan.
    """
    for _, epsilon in plans.values():
        check_share("epsilon", epsilon)
    tables = {name: checked_table(plan, table) for name, (plan, _) in plans.items()}
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
        (numerics, name): walk_path(
            plan,
            tables[name],
            epsilon,
            terms,
            name=name,
            repeated=repeated,
            apart=next((pair for pair in terms.apart if pair[0] == numerics), None),
            replays=(replays or {}).get(numerics, ()),
        )
        for numerics in ("reference", *(numerics for numerics, _ in terms.apart))
        for name, (plan, epsilon) in plans.items()
    }
    needs = {key: one.rows_needed(plans[key[1]][0].least_disagreement) for key, one in certificates.items()}
    for (numerics, name), one in certificates.items():
        if not one.certified:
            where = "" if numerics == "reference" else f" in {numerics}"
            text = "certify: NOTHING CERTIFIED of plan %s%s, the base answers every request: %s"
            _log.warning(text, name, where, needs[numerics, name])
    if counted is None or look is None:
        return _nested(certificates)
    passed = any(certificate.certified for certificate in certificates.values())
    if passed or reveal:
        counted.close(look, "passed" if passed else "revealed")
        return _nested(certificates)
    following = f"look {terms.looks + 1}, tested at delta {trial_level(terms.delta, terms.looks + 1):.2g}"
    untold = (
        "every cache stays off; why is told on request (reveal), which closes these rows for other plans; another plan"
        f" would be {following}"
    )
    told = {key: dataclasses.replace(one, stays_off=(untold, needs[key])) for key, one in certificates.items()}
    return _nested(told)


def _nested(certificates: Mapping[tuple[str, str], Certificate]) -> dict[str, dict[str, Certificate]]:
    found: dict[str, dict[str, Certificate]] = {}
    for (numerics, name), one in certificates.items():
        found.setdefault(numerics, {})[name] = one
    return found
