"""From a bundle and a folder of versions to the parts of an adaptive server."""

import dataclasses
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
    ControllerState,
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
from gati_jax.bundle.manifest import read_json, write_json
from gati_jax.bundle.record import certified_only
from gati_jax.certification import trial_level
from gati_jax.pytrees import tree_digest
from gati_jax.runtime import Cascade
from serve.engine import routes
from serve.engine.engine import Engine
from serve.engine.records import Observer
from serve.engine.routes import CascadeRoute
from serve.engine.runner import JaxRunner, Prepared

from .engine import AdaptiveEngine, Swap
from .worker import Worker

_PIECE = 32  # requests that a trial takes at once: a step of the server may have to wait for them
STATE = "monitor.json"
"""What must survive a restart, beside ``versions.json``."""
_MAX_BYTES = 2**20
_log = logging.getLogger(__name__)


class AdaptiveParts(NamedTuple):
    """An adaptive server before there is an engine."""

    adapting: AdaptiveEngine
    worker: Worker
    sources: list[CascadeRoute]
    """For the runner: the plan that adapts, and the base."""

    def serve(self, engine: Engine, runner: JaxRunner) -> None:
        """Start an engine that ``adapting`` observes, and the worker."""
        self.adapting.serve(engine, swapper(runner, self.sources[0]), end=self.worker.stop)
        engine.start()
        self.worker.start()


def build(
    bundle: Bundle,
    folder: Path,
    *,
    capacity: int,
    observer: Observer,
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
        observer: Of the engine.
        epsilon: The disagreement to promise; None: as certified.
        share: Of the time, for trials and refits.
        without: Layers to leave out: "exact", "nearest", "refit".
        config: The controller's, in place of one that follows from ``epsilon`` and ``without``.

    Raises:
        InputError: A bundle that cannot adapt, or a folder of something else.
    """
    certified = certified_only(bundle)
    config = config or _controller_config(bundle, epsilon, without, capacity)
    epsilon, delta = config.monitor.epsilon, config.monitor.delta
    versions = Versions(folder, chain=bundle.chain if bundle.chain.network is None else None)

    def controller(on_change: Callable[[Served], None], on_event: Callable[[Event], None]) -> AdaptationController:
        level = lambda: trial_level(delta, versions.next_trial())  # noqa: E731
        return AdaptationController(bundle, config, level=level, on_change=on_change, on_event=on_event)

    file = folder / STATE
    adapting = AdaptiveEngine(
        controller, observer=observer, classes=bundle.chain.classes, keep=lambda state: _keep(file, state)
    )
    number, current = _current_version(versions, certified, epsilon) or (0, served_by(certified))
    adapting.resume(lambda controller: _resume(controller, file, versions, number, current))
    trial = TrialConfig(epsilon=epsilon, delta=delta)
    recovery = RecoveryConfig(trial=trial, refit="refit" not in without, piece=_PIECE)
    worker = Worker(Recovery(bundle, adapting, versions, recovery, number=number), share, adapting.keep)
    if bundle.tuned is not None:
        _log.warning("adaptation: the tuning is not used: later caches are certified in the reference arithmetic alone")
    plan, base = routes.load(certified, reference=True)
    served = adapting.controller.served
    same = len(plan.leave) == len(served.caches) + 1
    leave = plan.leave if same else (*[routes.UNKNOWN] * len(served.caches), 1.0)
    plan = dataclasses.replace(plan, cascade=_cascade(plan, served), epsilon=epsilon, leave=leave)
    return AdaptiveParts(adapting, worker, [plan, base])


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


def _resume(controller: AdaptationController, file: Path, versions: Versions, number: int, current: Served) -> None:
    """Go on where the last server with this folder stopped; where that is not known, begin with all caches closed.

    A monitor's version is unknown then, too. It counts alarms, each of which closes something, and what opens it again,
    which takes a trial: depth + 2 at most for a trial, and one more for a version that was found at the first start.
    Trials are counted in another file. So no server before has come to the version that is begun with here.
    """
    state, why = None, ""
    if file.exists():
        try:
            state = read_json(file, ControllerState, most_bytes=_MAX_BYTES)
        except (BundleError, OSError) as error:
            why = str(error)
    elif versions.trials:
        why = f"{file} is missing, although there have been trials"
    if state is not None:
        controller.resume(state, current, number)
        if controller.monitor.version != state.monitor.version:
            versions.next_trial()  # another promise or bundle: counts for the bound, too
        why = "" if state.bundle == controller.state.bundle else f"{file} is of another bundle"
    elif why:
        controller.distrust((controller.depth + 3) * (versions.trials + 1) + 1, "the monitor's state is unknown")
    elif number:
        controller.adopt(current, f"version {number}, of {versions.folder}", number=number)
    if why:
        _log.warning("adaptation: all caches begin closed, until a trial opens them", extra={"why": why})


def _keep(file: Path, state: ControllerState) -> None:
    try:
        write_json(file, state)
    except OSError as error:
        _log.error("adaptation: a restart will forget what the monitor has seen", extra={"why": str(error)})


def _current_version(versions: Versions, certified: Bundle, epsilon: float) -> tuple[int, Served] | None:
    """Return the folder's current version, if it fits."""
    if not versions.history:
        return None
    try:
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
