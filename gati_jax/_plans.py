"""Which plans and certificates may stand in one bundle."""

import numpy as np

from ._errors import InputError
from .data import fingerprint
from .planning import CONDITIONAL, Certificate, Plan

MAX_PLANS = 4
CertifiedPlans = tuple[tuple[Plan, Certificate], ...]


def check_plans(pairs: CertifiedPlans) -> None:
    """Check that certificates are of these plans, and that the plans paid for one another.

    Raises:
        InputError: Says what was expected.
    """
    names = [certificate.name for _, certificate in pairs]
    if len(pairs) > MAX_PLANS or len(set(names)) < len(names):
        msg = f"plans: expected at most {MAX_PLANS}, of different names, got {', '.join(names)}"
        raise InputError(msg)
    for plan, certificate in pairs:
        if certificate.plan_hash != plan.hash:
            msg = "certificate: expected that of this plan, got another plan's"
            raise InputError(msg)
        if certificate.select_fingerprint not in {"", fingerprint(plan.rows)}:
            msg = "certificate: expected that of a plan composed on these rows, got one composed on others"
            raise InputError(msg)
        if certificate.step >= len(plan.path) or (certificate.step > 0 and not _same_exits(plan, certificate)):
            msg = f"certificate: expected a step of the plan's path and its exits, got step {certificate.step}"
            raise InputError(msg)
        if certificate.plans < len(pairs):
            got = f"{certificate.name} certified as one of {certificate.plans}"
            msg = f"certificate: expected {len(pairs)} plans to be certified together, got {got}"
            raise InputError(msg)
    sites_of(pairs)


def sites_of(pairs: CertifiedPlans) -> dict[str, int]:
    """Return the caches of all plans with their sites, in the order in which they first come.

    Raises:
        InputError: A plan has a cache twice, or two plans have it at different sites.
    """
    sites: dict[str, int] = {}
    for plan, _ in pairs:
        if len(set(plan.names)) < len(plan.names):
            msg = f"plan: expected every cache once, got {', '.join(plan.names)}"
            raise InputError(msg)
        for name, site in zip(plan.names, plan.sites, strict=True):
            if sites.setdefault(name, site) != site:
                msg = f"plans: expected {name} at one site, got {sites[name]} and {site}"
                raise InputError(msg)
    return sites


def _same_exits(plan: Plan, certificate: Certificate) -> bool:
    """Say whether a conditional certificate speaks of every site with a cache that is on."""
    on = np.isfinite(plan.thresholds(certificate.step))
    sites = sorted({site for site, is_on in zip(plan.sites, on, strict=True) if is_on})
    return certificate.method != CONDITIONAL or [e.site for e in certificate.exits] == sites
