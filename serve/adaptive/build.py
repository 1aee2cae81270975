"""From a bundle, and a folder of versions, to what adapts."""

import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gati_jax import Bundle, BundleError, InputError
from gati_jax.adaptation import (
    AdaptationController,
    ControllerConfig,
    Event,
    ExactCacheConfig,
    MonitorConfig,
    NearestCacheConfig,
    Recovery,
    RecoveryConfig,
    RequestLogConfig,
    Served,
    TrialConfig,
    UpdateConfig,
)
from gati_jax.adaptation.controller import standing
from gati_jax.bundle import Versions
from gati_jax.bundle.record import certified_only
from gati_jax.certification import trial_level
from gati_jax.runtime import Cascade
from serve.engine import routes
from serve.engine.engine import Engine
from serve.engine.records import Observer
from serve.engine.routes import CascadeRoute
from serve.engine.runner import JaxRunner, Prepared

from .engine import AdaptiveEngine, Swap
from .worker import Worker

_PIECE = 32  # requests that a trial looks at at once: a step may have to wait for them
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveOptions:
    """How to adapt."""

    folder: Path
    """Of versions."""
    epsilon: float | None = None
    """To promise; None: what is certified."""
    share: float = 0.1
    """Of the time, for trials and refits."""
    without: Sequence[str] = ()
    """Of "nearest", "exact", "refit": what to leave out."""
    keeper: ControllerConfig | None = None
    """In place of the defaults."""
    background: RecoveryConfig | None = None
    """In place of the defaults."""


class AdaptiveParts(NamedTuple):
    """What adapts, before there is an engine."""

    adapting: AdaptiveEngine
    worker: Worker
    sources: list[CascadeRoute]
    """For the runner: the plan that adapts, and the base."""

    def serve(self, engine: Engine, runner: JaxRunner) -> None:
        """Stand before an engine that this observes; start both."""
        self.adapting.serve(engine, _preparing(runner, self.sources[0]), end=self.worker.stop)
        engine.start()
        self.worker.start()


def build(
    bundle: Bundle, options: AdaptiveOptions, *, capacity: int, observer: Observer, reference: bool = False
) -> AdaptiveParts:
    """Prepare to adapt a bundle's default plan; its others are not served, for nobody watches them.

    Args:
        bundle: As it was given; versions in the folder are of the same base, or left alone.
        options: See ``AdaptiveOptions``.
        capacity: Images on their way at once.
        observer: Of the engine.
        reference: See ``routes.load``.

    Raises:
        InputError: A bundle that cannot adapt, or a folder of something else.
    """
    home = certified_only(bundle)
    keeping = options.keeper or _keeper_config(bundle, options, capacity)
    epsilon, delta = keeping.monitor.epsilon, keeping.monitor.delta
    versions = Versions(options.folder, chain=bundle.chain if bundle.chain.network is None else None)

    def keep(changed: Callable[[Served], None], told: Callable[[Event], None]) -> AdaptationController:
        level = lambda: trial_level(delta, versions.next_trial())  # noqa: E731
        return AdaptationController(bundle, keeping, level=level, changed=changed, told=told)

    adapting = AdaptiveEngine(keep, observer=observer, base=1, classes=bundle.chain.classes)
    _go_on(versions, home, adapting, epsilon)
    config = options.background or RecoveryConfig(
        trial=TrialConfig(epsilon=epsilon, delta=delta),
        refit="refit" not in options.without,
        update=UpdateConfig(),
        piece=_PIECE,
    )
    worker = Worker(Recovery(bundle, adapting, versions, config), options.share)
    plan, base = routes.load(home, reference=reference)
    served = adapting.keeper.served
    cascade = Cascade(home.chain, served.caches, jnp.asarray(served.thresholds, jnp.float32))
    adapted = dataclasses.replace(
        plan, cascade=cascade, epsilon=epsilon, leave=plan.leave if len(plan.leave) == len(served.caches) + 1 else (
            *[routes.UNKNOWN] * len(served.caches), 1.0)
    )  # fmt: skip
    return AdaptiveParts(adapting, worker, [adapted, base])


def _keeper_config(bundle: Bundle, options: AdaptiveOptions, capacity: int) -> ControllerConfig:
    certificate = bundle.certificate
    if options.epsilon is None and not certificate.certified:
        raise InputError("--adapt-epsilon: expected what to promise, for nothing is certified, got none")
    stir = importlib.util.find_spec("river") is not None
    if not stir:
        _log.warning('adaptation: without the package river (pip install "gati-jax[adapt]"), changes of scores and '
                     "exits raise no attention; alarms come later, and are as sound")  # fmt: skip
    monitor = MonitorConfig(
        epsilon=options.epsilon or certificate.epsilon, delta=certificate.delta, in_flight=capacity, stir=stir
    )
    window = RequestLogConfig()
    size = int(np.prod(bundle.chain.input_spec.shape))
    fitting = min(1.0, window.most_bytes / size / (window.recent + window.old))
    return ControllerConfig(
        monitor=monitor,
        window=dataclasses.replace(window, recent=int(window.recent * fitting), old=int(window.old * fitting)),
        repeats=None if "exact" in options.without else ExactCacheConfig(),
        points=None if "nearest" in options.without else NearestCacheConfig(),
    )


def _go_on(versions: Versions, home: Bundle, adapting: AdaptiveEngine, epsilon: float) -> None:
    """Serve the folder's current version, if it fits."""
    if not versions.history:
        return
    try:
        number, bundle = versions.load_current()
    except BundleError as error:
        _log.warning("adaptation: the bundle is served as it was given", extra={"why": str(error)})
        return
    here, there = standing(home), standing(bundle)
    why = (
        "it is of another base" if not _same(home.chain.params, bundle.chain.params, values=True)
        else "its caches are of another structure" if not _same(here.caches, there.caches, values=False)
        else "it promises less" if not (bundle.certificate.certified and bundle.certificate.epsilon <= epsilon)
        else ""
    )  # fmt: skip
    if why:
        _log.warning("adaptation: a version is left alone", extra={"version": number, "why": why})
        return
    adapting.adopt(there, f"version {number}, of {versions.folder}")


def _same(one: object, other: object, *, values: bool) -> bool:
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.shape == b.shape and a.dtype == b.dtype and (not values or np.array_equal(a, b)) for a, b in pairs)


def _preparing(runner: JaxRunner, source: CascadeRoute) -> Callable[[Served], Swap]:
    """Return how a runner comes to serve other caches; where they stay the same, only thresholds change."""
    running = source.cascade.caches  # changes in the engine's thread alone

    def prepare(served: Served) -> Swap:
        def parameters() -> Prepared | None:
            if all(new is old for new, old in zip(served.caches, running, strict=True)):
                return None
            cascade = Cascade(source.cascade.chain, served.caches, jnp.asarray(served.thresholds, jnp.float32))
            return runner.prepare({0: dataclasses.replace(source, cascade=cascade)})

        ahead = parameters()

        def swap() -> None:
            nonlocal running
            prepared = ahead or parameters()  # others may have been taken meanwhile
            if prepared is None:
                runner.close(0, served.thresholds)
            else:
                runner.take(prepared)
            running = served.caches

        return swap

    return prepare
