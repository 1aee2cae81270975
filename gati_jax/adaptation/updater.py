"""From a window of traffic to new heads, a new path, a trial, and, where it succeeds, a new bundle.

    older block -> gap -> later block                         | gap -> requests as they come
    refit heads           fit selectors, plan a path          |        Trial: how far along the path?
                                                              the path is fixed here

Every function is one stage and keeps nothing; whoever calls them decides when, in which thread or process, and hands
``pause`` (a ``Pace``) to the long ones. No image's label is needed: the base itself says what it would have answered.
New caches have the structure and shapes of the old, and a plan keeps closed caches at an infinite threshold, so that
``standing_cascade`` of any version runs by the programs of the first.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from gati_jax._bundle import Bundle
from gati_jax._errors import InputError
from gati_jax.caches import choose
from gati_jax.data import fingerprint, row_digests
from gati_jax.fitting import REFIT_CONFIG, Candidates, FitConfig, refit
from gati_jax.planning import CostTable, Plan, plan
from gati_jax.runtime import Cascade, device_name, hear, replay

from .trial import Trial, Verdict

Images = Shaped[np.ndarray, "n ..."]
Pause = Callable[[], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How heads are refitted and a path is planned.

    Args:
        fit: See ``refit``.
        least: Rows that each of the two blocks needs.
        seconds: For planning's search.
    """

    fit: FitConfig = REFIT_CONFIG
    least: int = 256
    seconds: float = 5.0


DEFAULT_CONFIG = UpdateConfig()


def refit_caches(
    bundle: Bundle,
    images: Images,
    later: Shaped[np.ndarray, "m ..."],
    *,
    config: UpdateConfig = DEFAULT_CONFIG,
    pause: Pause | None = None,
) -> Candidates:
    """Refit the caches of the bundle's default plan: heads on the older block, selectors on the later one.

    Args:
        bundle: The one that is served.
        images: The older block.
        later: Requests behind it, and behind a gap. Those that equal one of ``images`` are left out: what is planned
            on them must be new to the heads.
        config: See ``UpdateConfig``.
        pause: See ``refit``.

    Raises:
        InputError: A block is too small, or not of the chain's inputs.
    """
    fresh = later[~np.isin(row_digests(later), row_digests(images))]
    for name, rows in (("images", images), ("later", fresh)):
        if len(rows) < max(config.least, config.fit.batch):
            msg = f"{name}: expected at least {max(config.least, config.fit.batch)} rows, got {len(rows)}"
            raise InputError(f"{msg} that the older block has not" if name == "later" else msg)
    whole = len(fresh) // config.fit.batch * config.fit.batch  # few sizes, few programs
    caches = choose(bundle.caches, bundle.plan.names)
    return refit(bundle.chain, caches, images, select=fresh[-whole:], config=config.fit, pause=pause)


def replan(
    bundle: Bundle,
    candidates: Candidates,
    later: Images,
    *,
    epsilon: float,
    delta: float = 0.05,
    config: UpdateConfig = DEFAULT_CONFIG,
    pause: Pause | None = None,
) -> Plan:
    """Plan a path for refitted caches on the rows that their selectors were fitted on, by out-of-fold scores.

    Args:
        bundle: Whose base and costs.
        candidates: As ``refit_caches`` returns them.
        later: The block that it was given.
        epsilon: Where the path ends.
        delta: For which the composition is chosen.
        config: See ``UpdateConfig``.
        pause: See ``replay``.

    Raises:
        InputError: As ``planning.plan``; or the bundle holds no costs.
    """
    rows = row_digests(later)
    selected = later[np.isin(rows, candidates.select_rows) & ~np.isin(rows, candidates.fit_rows)]
    table = replay(bundle.chain, candidates, selected, batch=config.fit.batch, pause=pause)
    found = plan(table, costs_of(bundle), epsilon=epsilon, delta=delta, seconds=config.seconds)
    if pause is not None:
        pause()
    names = tuple(c.name for c in candidates)
    path = np.full((len(found.path), len(names)), np.inf, np.float32)
    path[:, [names.index(name) for name in found.names]] = found.path
    return dataclasses.replace(found, names=names, sites=table.sites, path=path, origin=table.origin)


def costs_of(bundle: Bundle) -> CostTable:
    """Return the bundle's costs for single requests on this device, as it was tuned; or else any that it holds.

    Raises:
        InputError: It holds none.
    """
    caches = {cache.name for cache in bundle.cascade.caches}
    single = [tile for tuning in bundle.tunings if tuning.device == device_name() for tile in tuning.tiles[:1]]
    for tile in single:
        if tile.costs is not None and caches <= set(tile.costs.lookup_ms):
            return tile.costs
    if not bundle.costs:
        msg = "costs: expected a bundle with measured costs, got one without"
        raise InputError(msg)
    return min(bundle.costs, key=lambda table: (table.device != device_name(), table.batch))


def examine(
    bundle: Bundle,
    trial: Trial,
    orders: Int[np.ndarray, " n"],
    images: Images,
    *,
    front: Int[np.ndarray, " n"] | None = None,
    batch: int = 64,
    pause: Pause | None = None,
) -> Verdict:
    """Let the base and the caches on trial look at further requests, batch by batch, until it is decided.

    Args:
        bundle: Whose base.
        trial: Takes them.
        orders: Order numbers, rising.
        images: The requests, in order: all that came, or those that an independent coin picked.
        front: See ``Trial.add``.
        batch: Images in a step.
        pause: See ``replay``.

    Raises:
        InputError: Images that the chain does not take, or orders that do not rise.
    """
    for start in range(0, len(images), batch):
        if trial.verdict != "open":
            break
        part = images[start : start + batch]
        said = hear(bundle.chain, trial.caches, part, batch=batch, pause=pause)
        ahead = None if front is None else front[start : start + batch]
        trial.add(orders[start : start + batch], row_digests(part), said, ahead)
    return trial.verdict


def updated(bundle: Bundle, trial: Trial, *, created: str = "") -> Bundle:
    """Return the bundle with the caches, the plan and the certificate of a trial; its other plans are left out.

    Args:
        bundle: The one that the trial began from.
        trial: Certified.
        created: When, for the provenance.

    Raises:
        InputError: Nothing was certified: the result is empirical, and opens no cache.
    """
    certificate = trial.certificate(bundle.certificate.name)
    if not certificate.certified:
        msg = f"trial: expected a certified one, got {trial.verdict} after {trial.n} requests"
        raise InputError(msg)
    prints = {"select": fingerprint(trial.plan.rows), "certify": certificate.data_fingerprint}
    provenance = bundle.provenance.model_copy(
        update={
            "created": created or bundle.provenance.created,
            "data_fingerprints": {**bundle.provenance.data_fingerprints, **prints},
        }
    )
    return dataclasses.replace(
        bundle, caches=trial.caches, plan=trial.plan, certificate=certificate, also=(), provenance=provenance
    )


def home_of(bundle: Bundle) -> Bundle:
    """Return a bundle of its default plan alone, up to the certified step: what adaptation starts from and returns to.

    Caches that are closed at that step are left out, and so is what the path would open beyond it.
    """
    plan_, step = bundle.plan, max(0, bundle.certificate.step)
    names = [c.name for c in bundle.cascade.caches]
    columns = [plan_.names.index(name) for name in names]
    home = dataclasses.replace(
        plan_,
        names=tuple(names),
        sites=tuple(plan_.sites[i] for i in columns),
        path=plan_.path[: step + 1, columns],
        disagreement=plan_.disagreement[: step + 1],
        mean_ms=plan_.mean_ms[: step + 1],
        origin=plan_.origin.take(names),
    )
    return dataclasses.replace(bundle, caches=bundle.cascade.caches, plan=home, also=())


def standing_cascade(bundle: Bundle) -> Cascade:
    """Return the default plan's cascade with closed caches left in: of one structure in every version."""
    thresholds = bundle.plan.thresholds(bundle.certificate.step)
    caches = choose(bundle.caches, bundle.plan.names)
    return Cascade(bundle.chain, caches, jnp.asarray(thresholds, jnp.float32))
