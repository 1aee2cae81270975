"""Certificates: with confidence 1 - delta, the cascade disagrees with the base on at most epsilon of requests.

Fixed-sequence testing ("Learn then Test", Angelopoulos et al., arXiv:2110.01052): the plan's path is walked from its
strictest step on; the null hypothesis of a step, "the disagreement exceeds epsilon", is rejected while its
exact binomial p-value is at most delta; the last step before the first failure is certified. The number of steps needs
no correction, because their order was fixed before the data was seen. It holds for requests drawn as these were.
"""

import dataclasses
import warnings

import numpy as np
from jaxtyping import Bool

from gati_jax._errors import InputError
from gati_jax.data import check_distinct_rows, fingerprint

from .binomial import p_value, samples_needed
from .plan import Plan
from .tables import ReplayTable, replay_plan

METHOD = "fixed-sequence testing, exact binomial"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """What is known of a plan's disagreement with the base."""

    epsilon: float
    delta: float
    """As asked for; the test ran at ``delta / looks``."""
    step: int
    """The certified step of the plan's path; -1 where nothing could be certified and every cache stays off."""
    n: int
    disagreements: int
    """Among the n certify requests, at the certified step."""
    p_value: float
    method: str = METHOD
    numerics: str = "reference"
    """The arithmetic that was certified: the float32 reference path."""
    looks: int = 1
    """How often this data has been opened for a certificate, this time included."""
    base_saw_data: bool = False
    """Whether the base was trained on the certify split."""
    plan_hash: str
    data_fingerprint: str
    stays_off: tuple[str, ...] = ()
    """A sentence for every cache of the plan that is off at the certified step."""

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            InputError: Names the field.
        """
        for name in ("epsilon", "delta"):
            if not 0 < getattr(self, name) < 1:
                msg = f"{name}: expected a number between 0 and 1, got {getattr(self, name)}"
                raise InputError(msg)
        if not (0 <= self.disagreements <= self.n < 2**53 and 1 <= self.looks < 2**53 and self.step >= -1):
            msg = f"certificate: expected counts, got {self.disagreements} of {self.n}, look {self.looks}"
            raise InputError(msg)

        passed = p_value(self.disagreements, self.n, self.epsilon) <= self.delta / self.looks
        if self.step == 0 or (self.step > 0 and not passed):
            msg = f"certificate: {self.disagreements} of {self.n} do not certify step {self.step} at {self.epsilon}"
            raise InputError(msg)

    @property
    def certified(self) -> bool:
        """Whether any step of the path was certified."""
        return self.step >= 0


def certify(
    plan: Plan, table: ReplayTable, epsilon: float, delta: float = 0.05, *, looks: int = 1, base_saw_data: bool = False
) -> Certificate:
    """Certify the farthest step of a plan's path that the data supports.

    Args:
        plan: Composed, and thereby fixed, on other rows.
        table: Replay of the certify split with the candidates of the plan.
        epsilon: The disagreement to certify.
        delta: The risk that the certificate is wrong.
        looks: How often these rows have been opened for a certificate, this time included. A second look pays: it is
            tested at delta / looks. That bounds the risk of each certificate, not of the whole series of looks.
        base_saw_data: Whether the base was trained on these rows, which makes it (and so its caches) surer on them.

    Raises:
        InputError: The table is empty, of other parameters than the plan's, lacks a candidate, or shares rows with the
            plan's; epsilon or delta is outside (0, 1).
    """
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        if not 0 < value < 1:
            msg = f"{name}: expected a number between 0 and 1, got {value}"
            raise InputError(msg)
    if looks < 1:
        msg = f"looks: expected 1 or more, got {looks}"
        raise InputError(msg)
    if len(table) == 0:
        msg = "table: expected at least one request, got none"
        raise InputError(msg)
    table = table.take(plan.names)
    if (table.sites, table.depth) != (plan.sites, plan.depth):
        got = f"{table.sites} of {table.depth}"
        msg = f"table: expected the plan's sites {plan.sites} of {plan.depth} blocks, got {got}"
        raise InputError(msg)
    plan.origin.check(table.origin, "table")
    check_distinct_rows(table.rows, plan.rows, names=("certify", "select"))
    if looks > 1:
        warnings.warn(f"look {looks} at this certify data: tested at delta / {looks}", stacklevel=2)
    disagrees = [replay_plan(table, thresholds).disagrees for thresholds in plan.path]
    step = -1
    while step + 1 < len(disagrees) and p_value(int(disagrees[step + 1].sum()), len(table), epsilon) <= delta / looks:
        step += 1
    if step <= 0:
        step = -1  # step 0 is the bare base: nothing to certify
    count = int(disagrees[step].sum()) if step > 0 else 0
    return Certificate(
        epsilon=epsilon,
        delta=delta,
        step=step,
        n=len(table),
        disagreements=count,
        p_value=p_value(count, len(table), epsilon),
        looks=looks,
        base_saw_data=base_saw_data,
        plan_hash=plan.hash,
        data_fingerprint=fingerprint(table.rows),
        stays_off=_stays_off(plan, step, disagrees, epsilon, delta / looks),
    )


def _stays_off(
    plan: Plan, step: int, disagrees: list[Bool[np.ndarray, " n"]], epsilon: float, delta: float
) -> tuple[str, ...]:
    """Say for every cache that is off what it would take to certify the first step that opens it."""
    off = np.isinf(plan.thresholds(step))
    sentences = []
    for cache in np.flatnonzero(off):
        opens = int(np.argmax(np.isfinite(plan.path[:, cache])))
        rate, n = float(disagrees[opens].mean()), len(disagrees[opens])
        worst = max(float(disagrees[i].mean()) for i in range(opens + 1))  # every step up to it must pass
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
