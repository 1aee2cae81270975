"""Checks that the plans, certificates and caches of a bundle belong together."""

import numpy as np

from gati_jax.caches import Candidate, choose, replay_source
from gati_jax.certification import CONDITIONAL, Certificate
from gati_jax.data import fingerprint
from gati_jax.errors import InputError
from gati_jax.models import Chain
from gati_jax.planning import Plan, ReplaySource
from gati_jax.profiling import BFLOAT16, bfloat16_programs, device_name

from .manifest import MAX_PLANS


def check_origin(plan: Plan, chain: Chain, caches: tuple[Candidate, ...], *, probed: bool = True) -> None:
    """Check that a plan was made from these parameters; a plan made by hand does not say from which.

    Args:
        plan: The plan.
        chain: The base.
        caches: Among them the plan's.
        probed: Whether to run the base, to see that it is the same function of its parameters.

    Raises:
        InputError: The base or a cache has other parameters, or the base is another function.
    """
    if plan.source == ReplaySource():
        return
    probed = probed and bool(plan.source.logits)
    found = replay_source(chain, choose(caches, plan.names), plan.source.dtype, probed=probed)
    plan.source.check(found, "candidates")


def not_in_bfloat16(certificate: Certificate | None, plan: Plan) -> str:
    """Return why a plan must not answer in bfloat16; empty if it may."""
    if certificate is None or certificate.plan_hash != plan.hash:
        return "this plan has no certificate for it; certify it with plan.bfloat16 = true"
    if not certificate.certified:
        return f"nothing was certified for it at {certificate.epsilon:.4g}"
    if bfloat16_programs() not in certificate.arithmetics:
        return f"it was certified on another device, or by other versions, than {device_name()}"
    return ""


def check_bfloat16(pairs: tuple[tuple[Plan, Certificate], ...], halves: tuple[Certificate, ...]) -> None:
    """Check that certificates in bfloat16 are of these plans, and of the same look as their other certificates.

    Raises:
        InputError: They are not.
    """
    known = {certificate.name: (plan, certificate) for plan, certificate in pairs}
    if len({one.name for one in halves}) < len(halves) or any(one.name not in known for one in halves):
        got = ", ".join(one.name for one in halves)
        raise InputError(f"bfloat16: expected a certificate for any of {', '.join(known)}, got {got}")
    for one in halves:
        plan, other = known[one.name]
        if one.numerics != BFLOAT16 or len(one.arithmetics) != 1:
            raise InputError(f"bfloat16: expected a certificate in bfloat16, got one in {one.numerics}")
        _check_certificate(plan, one)
        same = all(
            getattr(one, field) == getattr(other, field)
            for field in ("epsilon", "delta", "plans", "looks", "data_fingerprint")
        )
        if not same or min(one.plans, other.plans) < len(pairs) + len(halves):
            raise InputError(f"bfloat16: expected {one.name} to be certified in the same look as in float32")


def check_plans(pairs: tuple[tuple[Plan, Certificate], ...]) -> dict[str, int]:
    """Check that each certificate is of its plan, and that the plans were certified together.

    Returns:
        The sites of the caches of all plans by name, in the order in which the caches first come.

    Raises:
        InputError: They do not belong together, are too many, or have the same name; a plan has a cache twice, or two
            plans have it at different sites.
    """
    names, sites = [certificate.name for _, certificate in pairs], dict[str, int]()
    if len(pairs) > MAX_PLANS or len(set(names)) < len(names):
        raise InputError(f"plans: expected at most {MAX_PLANS}, of different names, got {', '.join(names)}")
    for plan, certificate in pairs:
        _check_certificate(plan, certificate)
        if certificate.plans < len(pairs):
            got = f"{certificate.name} certified as one of {certificate.plans}"
            raise InputError(f"certificate: expected {len(pairs)} plans to be certified together, got {got}")
        if len(set(plan.names)) < len(plan.names):
            raise InputError(f"plan: expected every cache once, got {', '.join(plan.names)}")
        for name, site in zip(plan.names, plan.sites, strict=True):
            if sites.setdefault(name, site) != site:
                raise InputError(f"plans: expected {name} at one site, got {sites[name]} and {site}")
    return sites


def _check_certificate(plan: Plan, certificate: Certificate) -> None:
    if certificate.plan_hash != plan.hash:
        raise InputError("certificate: expected that of this plan, got another plan's")
    if certificate.select_fingerprint not in {"", fingerprint(plan.rows)}:
        raise InputError("certificate: expected that of a plan composed on these rows, got one composed on others")
    if certificate.step >= len(plan.path) or (certificate.step > 0 and not _same_exits(plan, certificate)):
        raise InputError(f"certificate: expected a step of the plan's path and its exits, got step {certificate.step}")


def _same_exits(plan: Plan, certificate: Certificate) -> bool:
    """Return whether a conditional certificate covers exactly the sites whose caches are on."""
    on = np.isfinite(plan.thresholds(certificate.step))
    sites = sorted({site for site, is_on in zip(plan.sites, on, strict=True) if is_on})
    return certificate.method != CONDITIONAL or [e.site for e in certificate.exits] == sites
