"""Certificates: what is known of a plan's disagreement with the base, checkable by their own fields."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field

from gati_jax.data import as_groups
from gati_jax.display import html_table, percent
from gati_jax.errors import InputError, check_share
from gati_jax.planning.binomial import p_value, rows_needed

from .accuracy_gap import AccuracyGap

Method = Literal[
    "fixed-sequence testing, exact binomial",
    "conditional per exit: fixed-sequence testing, exact binomial for every exit at once",
    "sequential on later traffic: betting against a conditional mean above epsilon",
    "by group: fixed-sequence testing, betting against a mean over groups above epsilon",
    "share of bad groups: fixed-sequence testing, exact binomial",
]
MARGINAL, CONDITIONAL, SEQUENTIAL, GROUP_MEAN, BAD_GROUPS = get_args(Method)
_NAME = re.compile(r"[\w.%+-]{1,40}")
_PROGRAMS = re.compile(r"\w{1,64}", re.ASCII)
_MOST_ARITHMETICS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitRate:
    """The certify requests that left at or before a site."""

    site: int
    n: int
    disagreements: int
    p_value: float
    """Of "more than epsilon of such requests disagree", given that there are n."""

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            InputError: They are not possible.
        """
        if not (0 <= self.disagreements <= self.n < 2**53 and self.site >= 0):
            raise InputError(f"exits: expected counts, got {self.disagreements} of {self.n} at site {self.site}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupCounts:
    """The groups that the certify requests came in."""

    n: int
    bad: int = 0
    """Groups of which more than ``tolerance`` disagrees, at the certified step."""
    tolerance: float | None = None
    """None: bad groups are not counted, the mean over groups is tested."""

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            InputError: They are not possible.
        """
        if not (0 <= self.bad <= self.n < 2**53 and (self.bad == 0 or self.tolerance is not None)):
            raise InputError(f"groups: expected counts, got {self.bad} of {self.n}, tolerance {self.tolerance}")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise InputError(f"group_tolerance: expected a share in [0, 1), got {self.tolerance}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouping:
    """Which certify rows belong together."""

    index: Int[np.ndarray, " n"]
    """Each row's group."""
    sizes: Int[np.ndarray, " groups"]
    tolerance: float | None

    @classmethod
    def of(cls, groups: Shaped[np.ndarray, " n"] | Sequence[Hashable], tolerance: float | None, n: int) -> "Grouping":
        """Number the groups of n rows.

        Raises:
            InputError: There is not a number or a name for each row; the tolerance is not a share.
        """
        GroupCounts(n=n, tolerance=tolerance)
        _, index, sizes = np.unique(as_groups("groups", groups, n), return_inverse=True, return_counts=True)
        return cls(index=index, sizes=sizes, tolerance=tolerance)

    @property
    def method(self) -> Method:
        """What is certified of the groups."""
        return GROUP_MEAN if self.tolerance is None else BAD_GROUPS

    def losses(self, disagrees: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " groups"]:
        """Return the share of each group's rows that disagree."""
        return np.bincount(self.index, weights=disagrees, minlength=len(self.sizes)) / self.sizes

    def counts(self, disagrees: Bool[np.ndarray, " n"]) -> GroupCounts:
        """Return how many groups there are, and how many of them are bad."""
        bad = 0 if self.tolerance is None else int((self.losses(disagrees) > self.tolerance).sum())
        return GroupCounts(n=len(self.sizes), bad=bad, tolerance=self.tolerance)

    @property
    def digest(self) -> str:
        """The same for the same groups under any names."""
        _, first, index = np.unique(self.index, return_index=True, return_inverse=True)
        parts = first[index].astype("<u8").tobytes() + repr(self.tolerance).encode()
        return hashlib.sha256(parts).hexdigest()[:32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """What is known of a plan's disagreement with the base.

    What holds with confidence 1 - delta depends on the ``method``. Marginal: at most epsilon of all requests disagree.
    Conditional: at most epsilon of those that leave at or before each of ``exits`` do, for all of these at once; then
    so do at most epsilon of all requests, because the base never disagrees with itself. Sequential: the probability of
    disagreeing, given all requests before, was at most epsilon in the mean up to some request of these n. It is
    computed on traffic in its order and makes no assumption on how requests are drawn; the monitor watches whether
    later traffic is like it. By group: in the mean over all groups, at most epsilon of a group's requests disagree. Bad
    groups: in at most epsilon of all groups, more than a tolerated share of requests disagrees.
    """

    name: str = "default"
    """The name of its plan, among those of a bundle."""
    epsilon: float
    delta: float
    """As asked for; the test ran at ``level``."""
    step: int
    """The certified step of the plan's path; -1 where the test was inconclusive and every cache stays off."""
    n: int
    disagreements: int
    """Among the n certify requests, at the certified step."""
    p_value: float
    """The largest of ``exits`` where the certificate is conditional; an upper bound where it is sequential."""
    method: Method = MARGINAL
    numerics: str = "reference"
    """The arithmetic that was certified: the float32 reference path."""
    arithmetics: Annotated[tuple[str, ...], Field(max_length=_MOST_ARITHMETICS)] = ()
    """Further ones that were certified along with it, see ``Tuning.programs``: a request counts as disagreeing if it
    does in any of them."""
    looks: int = 1
    """j: this is the j-th look at any of these rows."""
    recorded: bool = False
    """Whether a ledger counted the looks; if not, that it is the only one rests on the user's word."""
    plans: int = 1
    """Plans that were certified together, in one look: delta is the risk that any of their certificates is wrong."""
    version: int = 0
    """Number of the trial, from 1 on, where the certificate is sequential."""
    base_saw_data: bool = False
    """Whether the base was trained on the certify split."""
    plan_hash: str
    data_fingerprint: str
    select_fingerprint: str = ""
    """Of the rows that the plan was composed on; empty in certificates of old bundles."""
    repeated: int = 0
    """How many of the n requests equal one before them: counted as requests that came again, not as copies."""
    exits: tuple[ExitRate, ...] = ()
    """For every cache that is on, in the order of the sites, where the certificate is conditional."""
    groups: GroupCounts | None = None
    """Where the certificate is by groups, and not by requests."""
    accuracy_gap: AccuracyGap | None = None
    """Where the certify split has labels and requests are independent. Its delta comes on top."""
    stays_off: tuple[str, ...] = ()
    """A sentence for every cache of the plan that is off at the certified step."""

    def __post_init__(self) -> None:
        """Check the fields, and that the certified step follows from the counts.

        Raises:
            InputError: Names the field.
        """
        check_share("epsilon", self.epsilon)
        check_share("delta", self.delta)
        check_name(self.name)
        check_arithmetics(self.arithmetics)
        counts = 0 <= self.disagreements <= self.n < 2**53 and 0 <= self.repeated <= self.n and self.step >= -1
        if not (counts and 1 <= self.looks < 2**53 and 1 <= self.plans < 2**53):
            got = f"{self.disagreements} of {self.n}, look {self.looks} for {self.plans} plans"
            raise InputError(f"certificate: expected counts, got {got}")
        if self.method not in get_args(Method):
            raise InputError(f"method: expected {MARGINAL!r}, {CONDITIONAL!r} or {SEQUENTIAL!r}, got {self.method!r}")
        sequential = (self.looks, self.plans, self.accuracy_gap) == (1, 1, None) and 1 <= self.version < 2**53
        if not (sequential if self.method == SEQUENTIAL else self.version == 0):
            got = f"version {self.version}, look {self.looks} for {self.plans} plans"
            raise InputError(f"certificate: expected a version for a sequential test and no other, got {got}")
        if (self.groups is None) == self.by_group or (self.groups and self.groups.n > self.n):
            raise InputError(f"groups: expected them with a method by groups alone, got {self.groups}")
        if self.step == 0 or (self.step > 0 and not self._passed()):
            raise InputError(
                f"certificate: {self.disagreements} of {self.n} do not certify step {self.step} at {self.epsilon}"
            )
        if self.step > 0 and self.accuracy_gap is not None and not self._has_gap(self.accuracy_gap):
            raise InputError(
                f"accuracy_gap: expected one of the same {self.n} requests and tests, got {self.accuracy_gap}"
            )

    @property
    def certified(self) -> bool:
        """Whether any step of the path was certified."""
        return self.step >= 0

    @property
    def by_group(self) -> bool:
        """Whether groups are independent, not requests."""
        return self.method in {GROUP_MEAN, BAD_GROUPS}

    @property
    def mean_bound(self) -> float:
        """The disagreement that is promised in the mean, over requests or over groups."""
        tolerance = 0.0 if self.groups is None else self.groups.tolerance or 0.0
        return self.epsilon + (1 - self.epsilon) * tolerance

    @property
    def promise(self) -> str:
        """What is certified, in a sentence without its confidence."""
        share = f"{100 * self.epsilon:.6g}%"  # no digit is lost: 0.0125 is not 1.2%
        if self.groups is None:
            return f"at most {share} of requests disagree with the base"
        if self.groups.tolerance is None:
            return f"at most {share} of a group's requests disagree with the base, in the mean over groups"
        return f"in at most {share} of groups, more than {100 * self.groups.tolerance:.6g}% of requests disagree"

    def rows_needed(self, rate: float = 0.0) -> str:
        """Say how many fresh certify rows (or groups) could certify anything in another look.

        Args:
            rate: The disagreement that is expected of the first caches, as select showed it.
        """
        level = (trial_level(self.delta, self.looks + 1) if self.recorded else self.delta) / self.plans
        unit = "groups" if self.by_group else "rows that leave at every exit" if self.method == CONDITIONAL else "rows"
        return f"to certify anything at {self.epsilon:.6g}, {rows_needed(rate, self.epsilon, level, unit)} on select"

    def summary(self) -> str:
        """Return it as text: what is certified, with which confidence, and why caches stay off."""
        confidence = f"confidence {1 - self.delta:.6g}" + (f", {self.plans} plans together" if self.plans > 1 else "")
        if self.certified:
            counted = f"{self.disagreements} of {self.n} certify requests did"
            lines = [f"Certified: {self.promise} ({confidence}, {self.basis}; {counted})"]
        else:
            all_off = "every cache stays off, the base answers every request"
            tested = f"{self.n} certify requests, {confidence}, {self.basis}"
            lines = [f"NOT CERTIFIED at {self.epsilon:.6g}: {all_off} ({tested})"]
        if gap := self.accuracy_gap:
            lines.append(f"loses at most {percent(gap.upper, up=True)} of accuracy (confidence {1 - gap.delta:.6g})")
        return "\n  ".join([*lines, *self.stays_off])

    def _repr_html_(self) -> str:
        """Return it as a notebook shows it."""
        rows: list[tuple[str, object]] = [
            ("certified", self.promise if self.certified else f"NOTHING at {self.epsilon:.6g}: the base answers"),
            ("confidence", f"{1 - self.delta:.6g}, {self.basis}"),
            (
                "certify requests",
                f"{self.disagreements:,} of {self.n:,} disagreed" if self.certified else f"{self.n:,}",
            ),
            ("method", self.method),
        ]
        if gap := self.accuracy_gap:
            lost = percent(gap.upper, up=True)
            rows.append(("accuracy", f"loses at most {lost} (confidence {1 - gap.delta:.6g})"))
        return html_table(f"Certificate {self.name}", (), rows, notes=self.stays_off)

    def __repr__(self) -> str:
        """Describe it in a line."""
        what = self.promise if self.certified else f"NOT CERTIFIED at {self.epsilon:.6g}"
        counted = f"{self.disagreements} of {self.n} did" if self.certified else f"{self.n} requests"
        return f"Certificate({self.name!r}: {what}, confidence {1 - self.delta:.6g}; {counted})"

    @property
    def level(self) -> float:
        """What each p-value was compared with.

        The plans of a recorded look share 6 delta / (pi^2 j^2), so that delta is the risk that any of all looks at
        these rows certifies wrongly; for sequential trials, that any of them does. A look that no ledger counted is
        tested at delta; certificates of old bundles, with several looks, at delta / looks.
        """
        if self.method == SEQUENTIAL:
            return trial_level(self.delta, self.version)
        return (trial_level(self.delta, self.looks) if self.recorded else self.delta / self.looks) / self.plans

    @property
    def basis(self) -> str:
        """What the confidence rests on, in words."""
        if self.method == SEQUENTIAL:
            return f"sequential trial {self.version}"
        counted = f"look {self.looks} at these rows" if self.recorded else "a single look, on the user's word"
        seen = "; the base was trained on them, and may disagree more on others" if self.base_saw_data else ""
        return counted + seen

    def _passed(self) -> bool:
        if self.groups is not None:
            return not self.exits and self.accuracy_gap is None and self._groups_passed(self.groups)
        if self.method == MARGINAL:
            return not self.exits and p_value(self.disagreements, self.n, self.epsilon) <= self.level
        if self.method == SEQUENTIAL:
            # No bet on a request that agrees wins more than a factor of 1 / (1 - epsilon).
            possible = self.p_value >= (1 - self.epsilon) ** (self.n - self.disagreements) * (1 - 1e-9)
            return not self.exits and possible and self.p_value <= self.level
        rising = all(
            a.site < b.site and a.n <= b.n and a.disagreements <= b.disagreements
            for a, b in zip(self.exits, self.exits[1:], strict=False)
        )
        if not (self.exits and rising and self.exits[-1].n <= self.n):
            return False
        passed = all(p_value(e.disagreements, e.n, self.epsilon) <= self.level for e in self.exits)
        return passed and self.exits[-1].disagreements == self.disagreements

    def _groups_passed(self, groups: GroupCounts) -> bool:
        if groups.tolerance is not None:
            return p_value(groups.bad, groups.n, self.epsilon) <= self.level
        return (1 - self.epsilon) ** groups.n * (1 - 1e-9) <= self.p_value <= self.level  # the most that a bet wins

    def _has_gap(self, gap: AccuracyGap) -> bool:
        """Check it: only a request that disagrees is a loss or a gain; the step was chosen among at least so many."""
        possible = gap.n == self.n and gap.losses + gap.gains <= self.disagreements
        return possible and gap.comparisons >= math.floor(self.step * self.delta / self.level)


def trial_level(delta: float, version: int) -> float:
    """Return the j-th trial's (or look's) part of delta, 6 delta / (pi^2 j^2): the parts of all add up to delta.

    Example:
        >>> round(sum(trial_level(0.05, j) for j in range(1, 100_000)), 4)
        0.05
    """
    return 6 * delta / (math.pi * version) ** 2


def check_name(name: str) -> None:
    """Check the name of a plan.

    Raises:
        InputError: It is not one word of at most 40 plain characters.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"name: expected up to 40 letters, digits or any of . % + - _, got {name!r}")


def check_arithmetics(digests: Sequence[str]) -> None:
    """Check digests of further arithmetics, see ``Certificate.arithmetics``.

    Raises:
        InputError: They are too many, or one is no digest.
    """
    if len(digests) > _MOST_ARITHMETICS or not all(_PROGRAMS.fullmatch(digest) for digest in digests):
        got = ", ".join(repr(digest)[:80] for digest in digests[: _MOST_ARITHMETICS + 1])
        raise InputError(f"arithmetics: expected up to {_MOST_ARITHMETICS} digests of programs, got {got}")


def tightest(certificates: Mapping[str, Certificate]) -> str:
    """Return the name of the certified plan with the smallest epsilon, or of the smallest of all if none is certified.

    Raises:
        InputError: There is none.
    """
    if not certificates:
        raise InputError("certificates: expected at least one, got none")
    return min(certificates, key=lambda name: (not certificates[name].certified, certificates[name].epsilon))
