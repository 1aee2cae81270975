"""Another arithmetic than the certified one: how often its answers differ, and what may be promised of it.

A certificate speaks of a cascade in the reference arithmetic. The same cascade by other convolution algorithms, in
another precision or in another runtime answers some requests otherwise. If these are a share d of all requests, then at
most epsilon + d of its answers disagree with the reference base's. An ``ArithmeticCheck`` counts them on n rows, and
bounds d by Clopper and Pearson's exact bound.

The certify rows may serve for this. They chose which step of the path is certified, so the bound must hold for every
step at once: delta is divided by ``comparisons``, as for the accuracy gap. And it is no look at them: it tells nothing
of how often any plan disagrees with the base, and once a plan is certified its rows are closed anyway.

A tuning that is made again after its check was seen may have been kept for what the check said. So the j-th different
tuning of a bundle is checked at 6 delta / (pi^2 j^2), and delta is the risk that any of these bounds is wrong.
"""

import dataclasses
import math

from gati_jax.display import percent
from gati_jax.errors import InputError, check_share
from gati_jax.planning.binomial import upper_bound

from .certificate import Certificate, trial_level

BASE = "base"
"""The cascade without caches, in a check."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticCheck:
    """How many rows a cascade answers otherwise in one arithmetic than in the reference one."""

    arithmetic: str
    """"fast": that of a tuning."""
    programs: str
    """A digest of what decides on its answers, see ``Tuning.programs``."""
    device: str
    """Where both ran."""
    cascade: str
    """See ``cascade_id``."""
    data_fingerprint: str
    """Of the rows."""
    n: int
    differ: int
    """Rows with another class or another exit."""
    delta: float
    """The risk that this bound, or that of any other arithmetic that was checked on the bundle, is wrong."""
    comparisons: int = 1
    """Among how many cascades the rows may have chosen this one."""
    number: int = 1
    """j: this is the j-th arithmetic that was checked on the bundle."""

    def __post_init__(self) -> None:
        """Check the fields, for they are read from untrusted files.

        Raises:
            InputError: They are not possible.
        """
        check_share("delta", self.delta)
        if not (0 <= self.differ <= self.n < 2**53 and 1 <= self.comparisons < 2**53 and 1 <= self.number < 2**53):
            got = f"{self.differ} of {self.n}, {self.comparisons} comparisons, number {self.number}"
            raise InputError(f"check: expected counts, got {got}")

    @property
    def upper(self) -> float:
        """The largest share of all requests that this arithmetic may answer otherwise, with confidence 1 - delta."""
        return upper_bound(self.differ, self.n, trial_level(self.delta, self.number) / self.comparisons)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedBound:
    """What holds of the answers that are served: at most epsilon of them disagree with the reference base's."""

    numerics: str
    """The arithmetic that answers."""
    epsilon: float | None
    """The certificate's, plus the check's upper bound where another arithmetic than the certified one answers. None:
    nothing is known."""
    delta: float
    """The certificate's, plus the check's."""
    why: str = ""
    """Why nothing is known, where there is a certificate all the same."""
    check: ArithmeticCheck | None = None

    def __str__(self) -> str:
        """Say it in a line."""
        if self.epsilon is None:
            return f"{self.numerics} arithmetic, of which nothing is certified{self.why and ': ' + self.why}"
        most, confidence = percent(self.epsilon, up=True), percent(1 - self.delta, down=True)
        text = f"{self.numerics} arithmetic: at most {most} of answers differ, with {confidence} confidence"
        if self.check is None:
            return text
        c = self.check
        more = percent(c.upper, up=True)
        return f"{text}; {more} of it as {c.differ} of {c.n} rows are answered otherwise than by the reference"


def served_bound(
    certificate: Certificate, numerics: str, check: ArithmeticCheck | None, programs: str = ""
) -> ServedBound:
    """Return what a certificate promises in an arithmetic; in another than the certified ones, by its check.

    ``programs`` is the digest of that arithmetic, by which a certificate knows the further ones that it holds in.

    Of requests that the base has not seen, rows that it was trained on tell nothing.
    """
    if certificate.certified and certificate.base_saw_data:
        why = "the base was trained on the certify rows"
        return ServedBound(numerics=numerics, epsilon=None, delta=certificate.delta, why=why)
    exact = numerics == certificate.numerics or programs in certificate.arithmetics
    if not certificate.certified or (check is None and not exact):
        return ServedBound(numerics=numerics, epsilon=None, delta=certificate.delta)
    if check is None or exact:
        return ServedBound(numerics=numerics, epsilon=certificate.mean_bound, delta=certificate.delta)
    epsilon, delta = min(1.0, certificate.mean_bound + check.upper), min(1.0, certificate.delta + check.delta)
    return ServedBound(numerics=numerics, epsilon=epsilon, delta=delta, check=check)


def cascade_id(certificate: Certificate) -> str:
    """Return the name that a check has for the cascade of a certificate: its plan and step, or the base's."""
    return f"{certificate.plan_hash}:{certificate.step}" if certificate.certified else BASE


def comparisons_of(certificate: Certificate, steps: int) -> int:
    """Return among how many cascades the certify rows may have chosen: steps of all plans, in any of the looks."""
    return math.ceil(steps * certificate.delta / certificate.level) if certificate.certified else 1
