"""From a bundle and a folder of versions to the parts of an adaptive server."""

import dataclasses
import errno
import importlib.util
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    Served,
    TrialConfig,
    served_by,
)
from gati_jax.bundle import Versions
from gati_jax.bundle.record import certified_only
from gati_jax.pytrees import tree_digest
from gati_jax.runtime import Cascade

from ..engine import routes
from ..engine.engine import Engine
from ..engine.routes import CascadeRoute
from ..engine.runner import JaxRunner, Prepared
from .engine import AdaptiveEngine, Swap
from .folder import STATE, StateFolder, refused
from .worker import Worker

_PIECE = 32  # requests that a trial takes at once: a step of the server may have to wait for them
_FULL = {errno.ENOSPC, errno.EDQUOT}
_log = logging.getLogger("serve.adaptive.build")


class AdaptiveParts(NamedTuple):
    """An adaptive server before there is an engine."""

    adapting: AdaptiveEngine
    worker: Worker
    store: StateFolder
    sources: list[CascadeRoute]
    """For the runner: the plan that adapts, and the base."""
    turn: None = None
    """Nothing of its own is asked before a step."""

    def serve(self, engine: Engine, runner: JaxRunner) -> None:
        """Start an engine that ``adapting`` observes, and the worker."""
        self.adapting.serve(engine, swapper(runner, self.sources[0]), end=self.worker.stop)
        engine.start()
        self.worker.start()

    def close(self) -> None:
        """Let another process use the folder, where no engine could be started."""
        self.store.close()


def build(
    bundle: Bundle,
    folder: Path,
    *,
    capacity: int,
    epsilon: float | None = None,
    share: float = 0.1,
    without: Sequence[str] = (),
    config: ControllerConfig | None = None,
) -> AdaptiveParts:
    """Prepare to adapt a bundle's default plan; its others are not served, for they would not be monitored.

    The certified arithmetic answers even where the bundle is tuned: later caches are certified in it, and no check has
    seen them. So shadow requests are compared with the base that certificates speak of.

    Args:
        bundle: As it was given.
        folder: Of versions, which are served if they are of the same base.
        capacity: Images on their way at once.
        epsilon: The disagreement to promise; None: as certified.
        share: Of the time, for trials and refits.
        without: Layers to leave out: "exact", "nearest", "refit".
        config: The controller's, in place of one that follows from ``epsilon`` and ``without``.

    Raises:
        InputError: A bundle that cannot adapt; a folder that is none, cannot be written, or is another process's. A
            full disk is no error.
    """
    certified = certified_only(bundle)
    config = config or _controller_config(bundle, epsilon, without, capacity)
    epsilon, delta = config.monitor.epsilon, config.monitor.delta
    versions = Versions(folder, chain=bundle.chain if bundle.chain.network is None else None)
    try:
        store = StateFolder(versions, delta)
    except OSError as error:
        raise refused(folder, error) from error

    def controller(on_change: Callable[[Served], None], on_event: Callable[[Event], None]) -> AdaptationController:
        return AdaptationController(bundle, config, level=store.level, on_change=on_change, on_event=on_event)

    try:
        adapting = AdaptiveEngine(controller, classes=bundle.chain.classes, store=store)
        number, current = _current_version(versions, certified, epsilon) or (0, served_by(certified))
        try:
            adapting.resume(lambda controller: _resume(controller, store, number, current))
        except OSError as error:
            if error.errno not in _FULL:
                raise refused(folder, error) from error
            adapting.saver.failing = True
            _log.error("adaptation: the disk is full: trials wait for space", extra={"why": str(error)})
    except BaseException:
        store.close()
        raise
    trial = TrialConfig(epsilon=epsilon, delta=delta)
    recovery = RecoveryConfig(trial=trial, refit="refit" not in without, piece=_PIECE)
    worker = Worker(
        Recovery(bundle, adapting, versions, recovery, number=number),
        share,
        allowed=lambda: not (adapting.unsaved or adapting.saver.failing),
    )
    if bundle.tuned is not None:
        _log.warning("adaptation: the tuning is not used: later caches are certified in the reference arithmetic alone")
    return AdaptiveParts(adapting, worker, store, sources_of(certified, adapting.controller.served, epsilon))


def sources_of(certified: Bundle, served: Served, epsilon: float | None) -> list[CascadeRoute]:
    """Return what a runner is made of: the plan as it is served, under a promise, and the base."""
    plan, base = routes.load(certified, reference=True)
    same = len(plan.leave) == len(served.caches) + 1
    leave = plan.leave if same else (*[routes.UNKNOWN] * len(served.caches), 1.0)
    return [dataclasses.replace(plan, cascade=_cascade(plan, served), epsilon=epsilon, leave=leave), base]


def _controller_config(
    bundle: Bundle, epsilon: float | None, without: Sequence[str], capacity: int
) -> ControllerConfig:
    certificate = bundle.certificate
    if epsilon is None and not certificate.certified:
        raise InputError("--adapt-epsilon: expected the disagreement to promise, as nothing is certified, got none")
    drift = importlib.util.find_spec("river") is not None
    if not drift:
        _log.warning('adaptation: without the package river (pip install "gati-jax[adapt]"), changes of scores and '
                     "exits raise no attention; alarms come later, and are as sound")  # fmt: skip
    return ControllerConfig(
        monitor=MonitorConfig(
            epsilon=epsilon or certificate.epsilon, delta=certificate.delta, in_flight=capacity, drift=drift
        ),
        exact=None if "exact" in without else ExactCacheConfig(),
        nearest=None if "nearest" in without else NearestCacheConfig(),
    )


def _resume(controller: AdaptationController, store: StateFolder, number: int, current: Served) -> None:
    """Go on where the last server with this folder stopped; where that is not known, begin with all caches closed."""
    state, why = store.read()
    if state is not None:
        controller.resume(state, current, number)
        if why:
            controller.distrust(state.monitor.version + 1, "what is remembered is not the last that happened")
        if controller.monitor.version != state.monitor.version:
            store.owe_trial()  # another promise or bundle: counts for the bound of ``unknown_version``, too
        if state.bundle != controller.state.bundle:
            why = f"{store.versions.folder / STATE} is of another bundle"
    elif why:
        controller.distrust(store.unknown_version(controller.depth), "the monitor's state is unknown")
    elif number:
        controller.adopt(current, f"version {number}, of {store.versions.folder}", number=number)
    if why:
        _log.warning("adaptation: all caches begin closed, until a trial opens them", extra={"why": why})


def _current_version(versions: Versions, certified: Bundle, epsilon: float) -> tuple[int, Served] | None:
    """Return the folder's current version, if it fits."""
    try:
        if not versions.history:
            return None
        number, bundle = versions.load_current()
    except BundleError as error:
        _log.warning("adaptation: the bundle is served as it was given", extra={"why": str(error)})
        return None
    given, current = served_by(certified), served_by(bundle)
    why = (
        "it is of another base" if tree_digest(certified.chain.params) != tree_digest(bundle.chain.params)
        else "its caches are of another structure" if _structure(given.caches) != _structure(current.caches)
        else "it promises less" if not (bundle.certificate.certified and bundle.certificate.epsilon <= epsilon)
        else ""
    )  # fmt: skip
    if why:
        _log.warning("adaptation: a version is not served", extra={"version": number, "why": why})
        return None
    return number, current


def _structure(caches: object) -> tuple[object, ...]:
    return jax.tree.structure(caches), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(caches)]


def _cascade(source: CascadeRoute, served: Served) -> Cascade:
    return Cascade(source.cascade.chain, served.caches, jnp.asarray(served.thresholds, jnp.float32))


def swapper(runner: JaxRunner, source: CascadeRoute) -> Callable[[Served], Swap]:
    """Return how a runner comes to serve other caches: a function that prepares, and returns the swap itself.

    Where the caches stay the same, only thresholds change.
    """
    running = source.cascade.caches  # changes in the engine's thread alone

    def prepare(served: Served) -> Swap:
        def parameters() -> Prepared | None:
            if all(new is old for new, old in zip(served.caches, running, strict=True)):
                return None
            return runner.prepare({0: dataclasses.replace(source, cascade=_cascade(source, served))})

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
