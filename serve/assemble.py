"""From bundles to the service behind the sockets."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING

import gati_jax
from gati_jax import InputError
from gati_jax.imports import load_chain

from .engine import routes
from .engine.engine import Engine
from .engine.onnx_runner import OnnxRunner
from .engine.program_cache import ProgramCache, default_folder
from .engine.programs import settle
from .engine.records import StoppingError
from .engine.runner import JaxRunner
from .engine.turns import Turn, Turns
from .lifecycle import Parts
from .metrics import Metrics
from .protocol.admission import Door, limits_of
from .protocol.backend import Backend
from .protocol.model import Bound, Model, Tally
from .protocol.repository import Entry, Loaded, Repository, Source
from .protocol.service import Service
from .settings import Settings

if TYPE_CHECKING:
    from .adaptive import AdaptiveGauges
    from .adaptive.interfaces import Parts as AdaptiveParts

_DIGITS = 12
_DATATYPES = {"float32": "FP32", "int32": "INT32", "uint8": "UINT8"}
_log = logging.getLogger("serve.assemble")


def assemble(settings: Settings, adapt: "Callable[[gati_jax.Bundle], AdaptiveParts] | None" = None) -> Parts:
    """Return the service for the bundles of the command line, which its repository will load.

    Args:
        settings: Of the server.
        adapt: Makes what adapts a bundle, if that is not this process alone.

    Raises:
        InputError: There is one bundle, and it is not valid, or there is no chain for it. Where there are several, one
            that cannot be loaded does not keep the others from being served.
    """
    metrics = Metrics()
    loader = _Loader(settings, metrics, adapt)
    entries = [loader.entry(name, folder) for name, folder in settings.bundles.items()]
    if len(entries) == 1:
        entries[0].loaded = entries[0].source.load()
    service = Service(Repository(entries, settle=settle), door=Door(limits_of(settings), refused=metrics.refused))
    metrics.watch(service)
    return Parts(service=service, metrics=metrics)


class _Loader:
    """Loads bundles, anew or again, with what they share: metrics, kept programs, and the device."""

    def __init__(
        self, settings: Settings, metrics: Metrics, adapt: "Callable[[gati_jax.Bundle], AdaptiveParts] | None"
    ) -> None:
        self._settings, self._metrics, self._elsewhere = settings, metrics, adapt
        self._turns = Turns() if len(settings.bundles) > 1 else None
        kept = settings.program_cache
        self._kept = None if kept == "off" else ProgramCache(kept or default_folder())
        self._gauges = self._adaptive_gauges() if settings.adapt and adapt is None else None

    def entry(self, name: str, folder: Path) -> Entry:
        """Return a model that is not loaded yet."""
        tally = Tally()
        source = Source(
            load=lambda: self._load(name, folder, tally),
            version=lambda: version_of(folder),
            is_exclusive=self._settings.adapt,
        )
        return Entry(name, source, tally)

    def _load(self, name: str, folder: Path, tally: Tally) -> Loaded:
        """Read a bundle.

        Raises:
            InputError: It is none.
        """
        settings = self._settings
        chain = load_chain(settings.chain, "--chain") if settings.chain else None
        bundle = gati_jax.load_bundle(folder, chain=chain)
        if why := bundle.bound_of().why:
            _log.warning("nothing is promised, and the base answers by default: %s", why, extra={"model": name})
        adaptive = self._adapt(bundle, name) if settings.adapt else None
        sources = (
            adaptive.sources
            if adaptive
            else routes.load_bfloat16(bundle)
            if settings.bfloat16
            else routes.load(bundle, reference=settings.reference, backend=settings.backend)
        )
        model = _describe(bundle, name, version_of(folder), sources, settings.places)

        def start() -> Backend:
            try:
                return self._start(name, sources, tally, adaptive)
            except BaseException:
                if adaptive is not None:
                    adaptive.close()
                raise

        return Loaded(model, start)

    def _start(
        self, name: str, sources: Sequence[routes.CascadeRoute], tally: Tally, adaptive: "AdaptiveParts | None"
    ) -> Backend:
        """Compile and start the engine of a model."""
        settings = self._settings
        runner = runner_of(
            sources, settings.places, first=settings.ready == "first" and adaptive is None, kept=self._kept
        )
        observer = self._metrics.of(name, runner.routes, tally)
        if adaptive:
            adaptive.adapting.report_to(observer)
        engine = Engine(
            runner,
            max_wait_ms=settings.max_wait_ms,
            observer=adaptive.adapting if adaptive else observer,
            shadow=adaptive.adapting.shadow if adaptive else None,
            overlap=settings.overlap,
            turn=self._turn() if adaptive is None or adaptive.turn is None else adaptive.turn,
        )
        settle()
        choose_route = functools.partial(
            lambda *asked, **how: routes.choose_route(engine.routes, *asked, **how),  # they grow
            default=0 if adaptive else routes.default(engine.routes),
            backlog_ms=lambda: engine.statistics().backlog_ms,
        )
        if adaptive is None or isinstance(runner, OnnxRunner):  # adaptation's routes are in the reference arithmetic
            engine.start()
            grown = functools.partial(grow, engine, runner)
            return Backend(engine, choose_route, routes=lambda: engine.routes, grow=grown)
        adaptive.serve(engine, runner)
        adapting = adaptive.adapting
        return Backend(adapting, choose_route, adapting.notes, routes=lambda: engine.routes, events=adapting.events)

    def _turn(self) -> Turn | None:
        return None if self._turns is None else self._turns.join()

    def _adapt(self, bundle: gati_jax.Bundle, name: str) -> "AdaptiveParts":
        if self._elsewhere is not None:
            return self._elsewhere(bundle)
        from . import adaptive  # noqa: PLC0415 (a server that does not adapt needs none of what fitting imports)

        settings = self._settings
        parts = adaptive.build(
            bundle,
            settings.versions(name),
            capacity=settings.places,
            epsilon=settings.adapt_epsilon,
            share=settings.adapt_share,
            without=settings.adapt_without,
        )
        assert self._gauges is not None, "there are gauges with --adapt"  # noqa: S101 (narrows the type)
        self._gauges.models[name] = parts.adapting, parts.worker
        return parts

    def _adaptive_gauges(self) -> "AdaptiveGauges":
        from . import adaptive  # noqa: PLC0415 (as above)

        self._metrics.registry.register(gauges := adaptive.AdaptiveGauges())
        return gauges


def runner_of(
    sources: Sequence[routes.CascadeRoute], capacity: int, *, first: bool = False, kept: ProgramCache | None = None
) -> JaxRunner | OnnxRunner:
    """Return what runs cascades by the backend of their tuning; see ``JaxRunner``."""
    tuning = sources[0].tuning
    if tuning is not None and tuning.backend == "onnxruntime":
        return OnnxRunner(sources, capacity=capacity)
    return JaxRunner(sources, capacity=capacity, first=first, kept=kept)


def grow(engine: Engine, runner: JaxRunner | OnnxRunner) -> None:
    """Compile the batches that a runner began without, one size after another, while the engine answers."""
    while isinstance(runner, JaxRunner) and (compiled := runner.compile_next()) is not None:
        try:
            engine.between_steps(lambda compiled=compiled: engine.widen(runner.take_next(compiled))).result()
        except (StoppingError, CancelledError):
            return
    settle()


def _describe(
    bundle: gati_jax.Bundle, name: str, version: str, sources: Sequence[routes.CascadeRoute], places: int
) -> Model:
    bounds = {source.name: Bound(source.epsilon, source.delta) for source in sources if source.epsilon is not None}
    normalization, own = bundle.chain.normalization, str(bundle.chain.input_spec.dtype)
    if own not in _DATATYPES:
        raise InputError(f"bundle: expected a network that takes {', '.join(_DATATYPES)}, got one that takes {own}")
    return Model(
        name=name,
        version=version,
        input_shape=tuple(bundle.chain.input_spec.shape),
        input_name=bundle.chain.input_name,
        datatypes=(_DATATYPES[own],) if normalization is None else ("UINT8", _DATATYPES[own]),
        classes=bundle.chain.classes,
        class_names=bundle.class_names,
        plans=tuple(source.name for source in sources),
        bounds=bounds,
        normalization=None if normalization is None else dataclasses.asdict(normalization),
        numerics=sources[0].numerics,
        max_rows=places,
    )


def version_of(folder: Path) -> str:
    """Return a bundle's version: the digest of its manifest, which lists the digests of all its files."""
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()[:_DIGITS]
