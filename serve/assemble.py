"""From a bundle to what is behind the sockets."""

import functools
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import gati_jax
from serve import adaptive
from serve.engine.engine import Engine
from serve.engine.programs import settle
from serve.engine.records import Route
from serve.engine.runner import JaxRunner
from serve.protocol.model import Bound, Model, Tally
from serve.protocol.service import Backend, Service

from .engine import routes
from .lifecycle import Parts
from .metrics import Gauges, Metrics
from .settings import Settings

_DIGITS = 12
_log = logging.getLogger("serve")


def assemble(settings: Settings) -> Parts:
    """Load the bundle and say how to start its engine.

    Raises:
        InputError: There is no sound bundle.
    """
    bundle = gati_jax.load_bundle(settings.bundle)
    version = version_of(settings.bundle)
    tally = Tally()
    metrics = Metrics(tally)
    begun = _begin(bundle, settings, metrics) if settings.adapt else None
    sources = begun.sources if begun else routes.load(bundle, reference=settings.reference)
    model = describe(bundle, sources, name=settings.name, version=version, max_rows=settings.capacity)
    service = Service(model, tally=tally, timeout=settings.timeout)

    def start() -> Backend:
        runner = JaxRunner(sources, capacity=settings.capacity, progress=_tell)
        engine = Engine(
            runner,
            max_wait_ms=settings.max_wait_ms,
            observer=begun.adapting if begun else metrics,
            shadow=begun.adapting.shadow if begun else None,
            overlap=settings.overlap,
        )
        metrics.watch(
            Gauges(
                routes=runner.routes,
                statistics=engine.statistics,
                ready=lambda: service.ready,
                model=model.name,
                version=model.version,
            )
        )
        settle()
        if begun is None:
            engine.start()
            return Backend(engine, functools.partial(choose, engine, routes.default(engine.routes)))
        metrics.registry.register(adaptive.AdaptiveGauges(begun.adapting, begun.worker))
        begun.serve(engine, runner)
        return Backend(begun.adapting, functools.partial(choose, engine, 0), begun.adapting.notes)

    return Parts(service=service, metrics=metrics, start=start)


def _begin(bundle: gati_jax.Bundle, settings: Settings, metrics: Metrics) -> adaptive.AdaptiveParts:
    options = adaptive.AdaptiveOptions(
        folder=settings.versions,
        epsilon=settings.adapt_epsilon,
        share=settings.adapt_share,
        without=settings.adapt_without,
    )
    return adaptive.build(bundle, options, capacity=settings.capacity, observer=metrics, reference=settings.reference)


def describe(
    bundle: gati_jax.Bundle, sources: Sequence[routes.CascadeRoute], *, name: str, version: str, max_rows: int
) -> Model:
    """Return what clients are told of a bundle."""
    certificates = bundle.certificates
    bounds = {  # the base, which has no certificate, agrees with itself
        source.name: Bound(source.epsilon, certificates[source.name].delta if source.name in certificates else 0.0)
        for source in sources
        if source.epsilon is not None
    }
    return Model(
        name=name,
        version=version,
        input_shape=tuple(bundle.chain.input_spec.shape),
        datatypes=("FP32",) if bundle.chain.normalization is None else ("UINT8", "FP32"),
        classes=bundle.chain.classes,
        class_names=bundle.class_names,
        plans=tuple(source.name for source in sources),
        bounds=bounds,
        max_rows=max_rows,
    )


def choose(engine: Engine, default: int, *, epsilon: float | None, deadline_ms: float | None) -> int:
    """Choose a request's route by what waits now.

    Raises:
        ValueError: There is none; the sentence names the field.
    """
    if epsilon is None and deadline_ms is None:
        return default
    known: tuple[Route, ...] = engine.routes
    backlog_ms = 0.0 if deadline_ms is None else engine.statistics().backlog_ms
    return routes.choose(known, epsilon=epsilon, deadline_ms=deadline_ms, default=default, backlog_ms=backlog_ms)


def _tell(ready: int, programs: int) -> None:
    _log.debug("warming up", extra={"ready": ready, "programs": programs})


def version_of(folder: Path) -> str:
    """Return a bundle's version: its manifest, which lists the digests of everything else, named by its own digest."""
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()[:_DIGITS]
