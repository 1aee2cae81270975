"""The routes of a bundle: its plans and the base without caches, and the choice among them for a request."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from gati_jax import Bundle, InputError
from gati_jax.certification import BASE, Certificate
from gati_jax.inference import Numerics
from gati_jax.profiling import Backend, Tuning
from gati_jax.runtime import Cascade

from . import policy
from .records import Route

UNKNOWN = 0.5  # expected share that leaves at a cache without a count; the scheduler soon measures it


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CascadeRoute:
    """A cascade with what a ``Route`` says of it: the input of a runner."""

    name: str
    cascade: Cascade
    epsilon: float | None
    """See ``Route``."""
    delta: float
    """The risk that ``epsilon`` is wrong."""
    leave: tuple[float, ...]
    """See ``Route``."""
    cuts: tuple[int, ...] = ()
    """Sites of all the bundle's caches: there ONNX Runtime's sessions end, as when its plans were certified."""
    tuning: Tuning | None = None
    """The fastest programs on this device, if measured; None runs the reference arithmetic."""
    numerics: Numerics = "reference"


def load_bfloat16(bundle: Bundle) -> list[CascadeRoute]:
    """Return the routes of a bundle in bfloat16: its plans that were certified in it, and the base.

    Of the base in bfloat16 nothing is promised: no cache answers for it, but it is another function than the float32
    base, and so differs from it somewhere.

    Raises:
        InputError: No plan was certified in bfloat16 on this device.
    """
    certified = [one for one in bundle.bfloat16 if one.certified]
    if not certified:
        raise InputError("bfloat16: expected a bundle that was certified in it, got none; see plan.bfloat16")
    found = []
    for one in certified:
        tuned, bound = bundle.bfloat16_of(one.name), bundle.bound_of(one.name, "bfloat16")
        shares, how = _shares(tuned.cascade, one), {"tuning": tuned.tuning, "numerics": "bfloat16"}
        found.append(
            CascadeRoute(
                name=one.name, cascade=tuned.cascade, epsilon=bound.epsilon, delta=bound.delta, leave=shares, **how
            )
        )
    base = Cascade(found[0].cascade.chain, (), jnp.zeros(0))
    return [
        *(dataclasses.replace(one, cascade=dataclasses.replace(one.cascade, chain=base.chain)) for one in found),
        dataclasses.replace(found[0], name=_base_name(found), cascade=base, epsilon=None, delta=0.0, leave=(1.0,)),
    ]


def _base_name(found: Sequence[CascadeRoute]) -> str:
    """Return a name for the base that no plan has."""
    taken = {route.name for route in found}
    return next(name for name in (BASE, *(f"{BASE}-{k}" for k in range(len(found)))) if name not in taken)


def load(bundle: Bundle, *, reference: bool = False, backend: Backend | None = None) -> list[CascadeRoute]:
    """Return the routes of a bundle: its plans, the default one first, and the base.

    The certified arithmetic runs if ``reference`` is set, or if the tuning for this device has no checks. Otherwise the
    tuned one does; then what is promised of each route, the base among them, is that of the reference arithmetic plus
    what its check bounds.

    Raises:
        InputError: ``backend`` is ONNX Runtime, for which the bundle has no tuning with a check here.
    """
    base_check = None if reference else bundle.checks_of(backend).get(BASE)
    tuning = bundle.tuning_of(backend) if base_check else None
    if backend == "onnxruntime" and tuning is None:
        raise InputError(
            "backend: expected a bundle that was tuned for onnxruntime on this device, and checked, got none; run"
            " gati-jax tune --bundle DIR"
        )
    numerics = "fast" if tuning else "reference"
    found, how = (
        [],
        {"tuning": tuning, "numerics": numerics, "cuts": tuple(sorted({cache.site for cache in bundle.caches}))},
    )
    for name, cascade in bundle.cascades.items():
        certificate = bundle.certificates[name]
        bound, shares = bundle.bound_of(name, numerics, backend), _shares(cascade, certificate)
        found.append(
            CascadeRoute(name=name, cascade=cascade, epsilon=bound.epsilon, delta=bound.delta, leave=shares, **how)
        )
    base = Cascade(bundle.chain, (), jnp.zeros(0))
    name = _base_name(found)
    epsilon, delta = (base_check.upper, base_check.delta) if base_check else (0.0, 0.0)
    return [
        *found, CascadeRoute(name=name, cascade=base, epsilon=epsilon, delta=delta, leave=(1.0,), **how)
    ]  # fmt: skip


def _shares(cascade: Cascade, certificate: Certificate) -> tuple[float, ...]:
    """Return the expected share that leaves at each stage; only conditional certificates have counted it."""
    if [exit_.site for exit_ in certificate.exits] != list(cascade.sites):
        return (*[UNKNOWN] * len(cascade.sites), 1.0)
    shares, before = [], 0
    for exit_ in certificate.exits:  # n is cumulative
        shares.append((exit_.n - before) / max(1, certificate.n - before))
        before = exit_.n
    return (*shares, 1.0)


def default(routes: Sequence[Route]) -> int:
    """Return the number of the tightest certified route with a cache; the base where there is none."""
    certified = [i for i, route in enumerate(routes) if route.sites and route.epsilon is not None]
    others = [i for i, route in enumerate(routes) if not route.sites]
    return min(certified, key=lambda i: _epsilon(routes[i])) if certified else others[0]


def choose_route(
    routes: Sequence[Route],
    epsilon: float | None = None,
    deadline_ms: float | None = None,
    *,
    default: int = 0,
    backlog_ms: Callable[[], float] = lambda: 0.0,
) -> int:
    """Return the number of the route for a request.

    Args:
        routes: To choose from.
        epsilon: The most disagreement allowed: selects the fastest route certified for it. The base promises 0,
            in tuned arithmetic what its check bounds.
        deadline_ms: The time available: selects the tightest route (among those allowed by ``epsilon``) that is
            expected to answer by then, which may be the base; if there is none, the fastest.
        default: The route if neither is given.
        backlog_ms: Returns the work that waits already, see ``Statistics``; called only for a deadline.

    Raises:
        ValueError: No route is certified for this epsilon.
    """
    if epsilon is None and deadline_ms is None:
        return default
    allowed = [i for i, route in enumerate(routes) if route.epsilon is not None]
    if epsilon is not None:
        allowed = [i for i in allowed if _epsilon(routes[i]) <= epsilon]
    if not allowed:
        known = sorted(route.epsilon for route in routes if route.epsilon is not None)
        raise ValueError(f"epsilon: expected at least {known[0] if known else 'a certified plan'}, got {epsilon}")
    if deadline_ms is not None:
        backlog = backlog_ms()
        in_time = [i for i in allowed if backlog + expected_ms(routes[i]) <= deadline_ms]
        if in_time:
            return min(in_time, key=lambda i: (_epsilon(routes[i]), expected_ms(routes[i])))
    return min(allowed, key=lambda i: expected_ms(routes[i]))


def expected_ms(route: Route) -> float:
    """Return the expected milliseconds of a request on an idle server."""
    alone = {1: route.stage_ms[min(route.stage_ms)]}  # in the smallest bucket, whatever its size
    return policy.remaining_ms(alone, route.leave)[0]


def _epsilon(route: Route) -> float:
    return math.inf if route.epsilon is None else route.epsilon
