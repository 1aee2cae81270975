"""From a bundle to the service behind the sockets."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Sequence
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
from .lifecycle import Parts
from .metrics import Metrics
from .protocol.admission import Door, limits_of
from .protocol.model import Bound, Model, Tally
from .protocol.service import Backend, Service
from .settings import Settings

if TYPE_CHECKING:
    from .adaptive import AdaptiveParts

_DIGITS = 12
_DATATYPES = {"float32": "FP32", "int32": "INT32", "uint8": "UINT8"}
_log = logging.getLogger("serve.assemble")


def assemble(settings: Settings) -> Parts:
    """Load the bundle, and return the service with a function that starts its engine.

    Raises:
        InputError: There is no valid bundle, or no chain for it.
    """
    chain = load_chain(settings.chain, "--chain") if settings.chain else None
    bundle = gati_jax.load_bundle(settings.bundle, chain=chain)
    if why := bundle.bound_of().why:
        _log.warning("nothing is promised, and the base answers by default: %s", why)
    tally = Tally()
    metrics = Metrics(tally)
    adaptive = _adapt(bundle, settings, metrics) if settings.adapt else None
    sources = (
        adaptive.sources if adaptive else routes.load(bundle, reference=settings.reference, backend=settings.backend)
    )
    door = Door(limits_of(settings), refused=metrics.refused)
    service = Service(_describe(bundle, sources, settings), tally=tally, door=door)

    def start() -> Backend:
        runner = runner_of(
            sources, settings.capacity, first=settings.ready == "first" and adaptive is None, kept=_kept(settings)
        )
        engine = Engine(
            runner,
            max_wait_ms=settings.max_wait_ms,
            observer=adaptive.adapting if adaptive else metrics,
            shadow=adaptive.adapting.shadow if adaptive else None,
            overlap=settings.overlap,
        )
        metrics.watch(runner.routes, engine.statistics, service)
        settle()
        choose_route = functools.partial(
            lambda *asked, **how: routes.choose_route(engine.routes, *asked, **how),  # they grow
            default=0 if adaptive else routes.default(engine.routes),
            backlog_ms=lambda: engine.statistics().backlog_ms,
        )
        if adaptive is None or isinstance(runner, OnnxRunner):  # adaptation's routes are in the reference arithmetic
            engine.start()
            return Backend(engine, choose_route, grow=functools.partial(grow, engine, runner))
        adaptive.serve(engine, runner)
        return Backend(adaptive.adapting, choose_route, adaptive.adapting.notes)

    return Parts(service=service, metrics=metrics, start=start)


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


def _kept(settings: Settings) -> ProgramCache | None:
    if settings.program_cache == "off":
        return None
    return ProgramCache(settings.program_cache or default_folder())


def _adapt(bundle: gati_jax.Bundle, settings: Settings, metrics: Metrics) -> "AdaptiveParts":
    from . import adaptive  # noqa: PLC0415 (a server that does not adapt needs none of what fitting imports)

    parts = adaptive.build(
        bundle,
        settings.versions,
        capacity=settings.capacity,
        observer=metrics,
        epsilon=settings.adapt_epsilon,
        share=settings.adapt_share,
        without=settings.adapt_without,
    )
    metrics.registry.register(adaptive.AdaptiveGauges(parts.adapting, parts.worker))
    return parts


def _describe(bundle: gati_jax.Bundle, sources: Sequence[routes.CascadeRoute], settings: Settings) -> Model:
    bounds = {source.name: Bound(source.epsilon, source.delta) for source in sources if source.epsilon is not None}
    normalization, own = bundle.chain.normalization, str(bundle.chain.input_spec.dtype)
    if own not in _DATATYPES:
        raise InputError(f"bundle: expected a network that takes {', '.join(_DATATYPES)}, got one that takes {own}")
    return Model(
        name=settings.name,
        version=version_of(settings.bundle),
        input_shape=tuple(bundle.chain.input_spec.shape),
        input_name=bundle.chain.input_name,
        datatypes=(_DATATYPES[own],) if normalization is None else ("UINT8", _DATATYPES[own]),
        classes=bundle.chain.classes,
        class_names=bundle.class_names,
        plans=tuple(source.name for source in sources),
        bounds=bounds,
        normalization=None if normalization is None else dataclasses.asdict(normalization),
        numerics="reference" if sources[0].tuning is None else "fast",
        max_rows=settings.capacity,
    )


def version_of(folder: Path) -> str:
    """Return a bundle's version: the digest of its manifest, which lists the digests of all its files."""
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()[:_DIGITS]
