"""A bundle in memory: what was saved, and the cascades that it stands for."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from ._errors import InputError
from ._manifest import Provenance
from .caches import Candidate, choose
from .models import Chain
from .planning import Certificate, CostTable, Origin, Plan
from .runtime import Cascade, TunedCascade, Tuning, check_cascade, device_name, origin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A base with its caches, a plan for them, and a certificate of the plan; or up to four of both."""

    chain: Chain
    caches: tuple[Candidate, ...]
    """The plan's, in its order; then those that only the other plans have."""
    plan: Plan
    """The one that is used unless another is named."""
    certificate: Certificate
    also: tuple[tuple[Plan, Certificate], ...] = ()
    """Other plans, each with its certificate."""
    class_names: tuple[str, ...] = ()
    provenance: Provenance = Provenance()  # noqa: RUF009 (frozen)
    costs: tuple[CostTable, ...] = ()
    """By device."""
    tunings: tuple[Tuning, ...] = ()
    """By device."""

    @property
    def plans(self) -> dict[str, Plan]:
        """All plans by name, the default one first."""
        return {certificate.name: plan for plan, certificate in ((self.plan, self.certificate), *self.also)}

    @property
    def certificates(self) -> dict[str, Certificate]:
        """Their certificates."""
        return {certificate.name: certificate for certificate in (self.certificate, *(c for _, c in self.also))}

    @property
    def cascade(self) -> Cascade:
        """The certified step of the plan, ready to run: caches that stay off are left out."""
        return self.cascades[self.certificate.name]

    @property
    def tuned(self) -> TunedCascade | None:
        """The cascade as this device runs it fastest; None where nobody has tuned it for this device."""
        return self.tuned_of(None)

    @functools.cached_property
    def cascades(self) -> dict[str, Cascade]:
        """The cascade of every plan by name."""
        return {name: self._cascade(plan, self.certificates[name].step) for name, plan in self.plans.items()}

    def cascade_of(self, name: str | None) -> Cascade:
        """Return the cascade of a plan; None names the default one.

        Raises:
            InputError: There is no such plan.
        """
        return self.cascades[self._known(name)]

    def tuned_of(self, name: str | None) -> TunedCascade | None:
        """Return ``cascade_of(name)`` as this device runs it fastest, if the bundle has been tuned for it.

        Raises:
            InputError: There is no such plan.
        """
        return self._tuned.get(self._known(name))

    @functools.cached_property
    def _tuned(self) -> dict[str, TunedCascade]:
        tuning = next((tuning for tuning in self.tunings if tuning.device == device_name()), None)
        return {} if tuning is None else {name: TunedCascade(c, tuning) for name, c in self.cascades.items()}

    def _known(self, name: str | None) -> str:
        name = self.certificate.name if name is None else name
        if name not in self.plans:
            msg = f"plan: expected one of {', '.join(self.plans)}, got {name!r}"
            raise InputError(msg)
        return name

    def _cascade(self, plan: Plan, step: int) -> Cascade:
        thresholds = plan.thresholds(step)
        on = np.isfinite(thresholds)
        caches = choose(self.caches, [name for name, is_on in zip(plan.names, on, strict=True) if is_on])
        cascade = Cascade(self.chain, caches, jnp.asarray(thresholds[on], jnp.float32))
        check_cascade(cascade)
        return cascade


def check_origin(plan: Plan, chain: Chain, caches: tuple[Candidate, ...]) -> None:
    """Check that plan and certificate were made from these very parameters; a plan made by hand does not say."""
    if plan.origin != Origin():
        plan.origin.check(origin(chain, choose(caches, plan.names), plan.origin.dtype), "candidates")
