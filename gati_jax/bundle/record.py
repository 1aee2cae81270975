"""A bundle in memory, the cascades that its plans stand for, and the check that plans and certificates fit."""

import dataclasses
import functools
import warnings
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from gati_jax.caches import Candidate, choose
from gati_jax.certification import (
    BASE,
    ArithmeticCheck,
    Certificate,
    ServedBound,
    cascade_id,
    comparisons_of,
    served_bound,
)
from gati_jax.display import html_table
from gati_jax.errors import InputError, listed
from gati_jax.models import Chain
from gati_jax.planning import CostTable, Plan
from gati_jax.profiling import (
    BFLOAT16,
    Backend,
    TunedCascade,
    Tuning,
    device_name,
    fastest,
    run_by,
    run_in_bfloat16,
    spans_of,
)
from gati_jax.runtime import Cascade, check_cascade

from .checks import not_in_bfloat16
from .manifest import Provenance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A base with its caches, and up to four plans for them, each with its certificate."""

    chain: Chain
    caches: tuple[Candidate, ...]
    """Those of ``plan`` in its order, then those that only the other plans have."""
    plan: Plan
    """The one that is used unless another is named."""
    certificate: Certificate
    also: tuple[tuple[Plan, Certificate], ...] = ()
    """Other plans, each with its certificate."""
    bfloat16: tuple[Certificate, ...] = ()
    """Certificates of plans in bfloat16, by their names; see ``infer``."""
    class_names: tuple[str, ...] = ()
    provenance: Provenance = Provenance()  # noqa: RUF009 (frozen)
    costs: tuple[CostTable, ...] = ()
    """By device."""
    tunings: tuple[Tuning, ...] = ()
    """By device."""

    def __repr__(self) -> str:
        """Describe it in a line."""
        plans = listed([_described(certificate) for certificate in self.certificates.values()], room=120)
        return f"Bundle({self.chain!r}, {len(self.caches)} caches, {plans})"

    def _repr_html_(self) -> str:
        """Return it as a notebook shows it: its caches, and under them its plans."""
        placed = [(cache.name, cache.site, cache.bytes) for cache in self.caches]
        plans = [
            (name, len(self.cascades[name].caches), c.promise if c.certified else "NOT CERTIFIED", f"{1 - c.delta:.6g}")
            for name, c in self.certificates.items()
        ]
        caches = html_table(repr(self.chain), ("cache", "site", "bytes"), placed)
        return caches + html_table("Plans", ("plan", "caches", "certified", "confidence"), plans)

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
        """The cascade as this device runs it fastest; None if it has not been tuned for this device."""
        return self.tuned_of(None)

    @functools.cached_property
    def cascades(self) -> dict[str, Cascade]:
        """The cascade of every plan by name."""
        return {name: self._cascade(plan, self.certificates[name].step) for name, plan in self.plans.items()}

    def bfloat16_of(self, name: str | None = None) -> TunedCascade:
        """Return the cascade that was certified in bfloat16; its step may be another than that in float32.

        Args:
            name: Of a plan; None names the default one.

        Raises:
            InputError: There is no such plan; or nothing was certified of it in bfloat16, or on another device or by
                another compiler, whose answers were not counted.
        """
        name = self._known(name)
        certificate = next((one for one in self.bfloat16 if one.name == name), None)
        if why := not_in_bfloat16(certificate, self.plans[name]):
            raise InputError(f"numerics: expected reference or fast, got bfloat16: {why}")
        return self._in_bfloat16[name]

    @functools.cached_property
    def _in_bfloat16(self) -> dict[str, TunedCascade]:
        tuning = self.tunings_here.get("xla")
        return {
            one.name: run_in_bfloat16(self._cascade(self.plans[one.name], one.step), tuning)
            for one in self.bfloat16
            if one.certified
        }

    def cascade_of(self, name: str | None) -> Cascade:
        """Return the cascade of a plan; None names the default one.

        Raises:
            InputError: There is no such plan.
        """
        return self.cascades[self._known(name)]

    def tuned_of(self, name: str | None, backend: Backend | None = None) -> TunedCascade | None:
        """Return ``cascade_of(name)`` as a backend runs it fastest here, if the bundle has been tuned for it.

        Args:
            name: Of a plan; None names the default one.
            backend: None names the first of ``tunings_here``.

        Raises:
            InputError: There is no such plan.
        """
        tuning = self.tuning_of(backend)
        return None if tuning is None else self._tuned(self._known(name), tuning.backend)

    def tuning_of(self, backend: Backend | None = None) -> Tuning | None:
        """Return the tuning of a backend for this device, or the first of ``tunings_here``; None if there is none."""
        here = self.tunings_here
        return next(iter(here.values()), None) if backend is None else here.get(backend)

    @functools.cached_property
    def tunings_here(self) -> dict[Backend, Tuning]:
        """The tunings for this device by backend: first those whose answers are bounded, and of them the fastest."""
        here = fastest(tuning for tuning in self.tunings if tuning.device == device_name(tuning.backend))
        return {tuning.backend: tuning for tuning in sorted(here, key=lambda tuning: not self._checks(tuning))}

    @functools.cached_property
    def compared(self) -> dict[str, tuple[Cascade, int]]:
        """The cascades that an arithmetic is checked on, each with its number of comparisons, see ``cascade_id``."""
        found = {BASE: (Cascade(self.chain, (), jnp.zeros(0)), 1)}
        for name, plan in self.plans.items():
            certificate = self.certificates[name]
            if certificate.certified and not certificate.by_group:  # a check's bound is for independent rows
                comparisons = comparisons_of(certificate, len(plan.path) - 1)
                found[cascade_id(certificate)] = (self.cascades[name], comparisons)
        return found

    @functools.cached_property
    def checks(self) -> dict[str, ArithmeticCheck]:
        """How the answers of the first tuning for this device compare with the certified ones, by ``cascade_id``.

        Empty if that is unknown of every tuning: then they are used only where they are asked for by name.
        """
        tuning = self.tuning_of()
        found = {} if tuning is None else self._checks(tuning)
        if found or tuning is None:
            return found
        known = "its answers were not compared with those of the certified arithmetic"
        why = "nothing is certified" if len(self.compared) == 1 else f"{known}; run gati-jax tune --bundle DIR"
        warnings.warn(f"bundle: the tuning for this device is used only where it is asked for: {why}", stacklevel=2)
        return {}

    def checks_of(self, backend: Backend | None) -> dict[str, ArithmeticCheck]:
        """Return ``checks`` for the tuning of one backend."""
        tuning = self.tuning_of(backend)
        return self.checks if backend is None else {} if tuning is None else self._checks(tuning)

    def bound_of(
        self, name: str | None = None, numerics: str | None = None, backend: Backend | None = None
    ) -> ServedBound:
        """Return what holds of the answers of a plan, by default in the arithmetic that answers by default.

        Raises:
            InputError: There is no such plan, or no certificate of it in bfloat16 where that is asked for.
        """
        certificate = self.certificates[self._known(name)]
        if numerics == BFLOAT16:
            self.bfloat16_of(name)
            certificate = next(one for one in self.bfloat16 if one.name == certificate.name)
            return served_bound(certificate, numerics, None)
        check = self.checks_of(backend).get(cascade_id(certificate)) if numerics != "reference" else None
        tuning, numerics = self.tuning_of(backend), numerics or ("fast" if check else "reference")
        return served_bound(certificate, numerics, check, tuning.programs if tuning and numerics == "fast" else "")

    def _checks(self, tuning: Tuning) -> dict[str, ArithmeticCheck]:
        given = {c.cascade: c for c in tuning.checks if (c.arithmetic, c.programs) == ("fast", tuning.programs)}
        found = {
            key: given[key]
            for key, (_, comparisons) in self.compared.items()
            if key in given and given[key].comparisons >= comparisons
        }
        return found if len(found) == len(self.compared) > 1 else {}

    @functools.cached_property
    def _tuned(self) -> Callable[[str, Backend], TunedCascade]:
        """The cascade of each plan by each tuning, made once; those on ONNX Runtime share the base's sessions."""
        spans = functools.cache(lambda: spans_of(self.chain, self.caches))

        def build(name: str, backend: Backend) -> TunedCascade:
            tuning, shared = self.tunings_here[backend], spans() if backend == "onnxruntime" else None
            return run_by(tuning, self.cascades[name], shared)

        return functools.cache(build)

    def _known(self, name: str | None) -> str:
        name = self.certificate.name if name is None else name
        if name not in self.plans:
            raise InputError(f"plan: expected one of {', '.join(self.plans)}, got {name!r}")
        return name

    def _cascade(self, plan: Plan, step: int) -> Cascade:
        thresholds = plan.thresholds(step)
        on = np.isfinite(thresholds)
        caches = choose(self.caches, [name for name, is_on in zip(plan.names, on, strict=True) if is_on])
        cascade = Cascade(self.chain, caches, jnp.asarray(thresholds[on], jnp.float32))
        check_cascade(cascade)
        return cascade


def _described(certificate: Certificate) -> str:
    return f"{certificate.name}: {f'{certificate.epsilon:.4g}' if certificate.certified else 'NOT CERTIFIED'}"


def costs_of(bundle: Bundle) -> CostTable:
    """Return costs of single requests, on XLA if they are known: those of this device's tuning, else the nearest.

    Raises:
        InputError: It holds none.
    """
    caches = {cache.name for cache in bundle.cascade.caches}
    here = sorted(bundle.tunings_here.items(), key=lambda item: item[0] != "xla")
    single = [tuning.tiles[0] for _, tuning in here]
    for tile in single:
        if tile.costs is not None and caches <= set(tile.costs.lookup_ms):
            return tile.costs
    if not bundle.costs:
        raise InputError("costs: expected a bundle with measured costs, got one without")
    name = device_name()
    return min(bundle.costs, key=lambda t: (t.device != name, not t.device.endswith(name), t.batch))


def certified_only(bundle: Bundle) -> Bundle:
    """Return a bundle of the default plan alone, up to its certified step: what adaptation starts from and returns to.

    Caches that are off at that step are left out, and so are the steps of the path beyond it.
    """
    plan, step = bundle.plan, max(0, bundle.certificate.step)
    names = tuple(cache.name for cache in bundle.cascade.caches)
    columns = [plan.names.index(name) for name in names]
    certified = dataclasses.replace(
        plan,
        names=names,
        sites=tuple(plan.sites[i] for i in columns),
        path=plan.path[: step + 1, columns],
        disagreement=plan.disagreement[: step + 1],
        mean_ms=plan.mean_ms[: step + 1],
        source=plan.source.take(names),
    )
    return dataclasses.replace(bundle, caches=bundle.cascade.caches, plan=certified, also=(), bfloat16=())
