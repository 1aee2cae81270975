"""What a run of ``train.caches`` leaves in DIR for the next: costs.json, composition-<epsilon>.json."""

import dataclasses
import functools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import jax
from pydantic import ValidationError

import gati_jax
from gati_jax import Candidate, Chain, CostTable, InputError
from gati_jax.options import Strict
from gati_jax.planning import Composition
from gati_jax.profiling import (
    Tuning,
    device_name,
    measure_onnx_costs,
    measure_steadily,
    onnx_tuning,
    onnx_unavailable,
    onnx_version,
    probe,
    reference_tuning,
    tuned_cache,
    tuned_chain,
    unsteady,
)
from gati_jax.pytrees import tree_digest

from . import cli
from .config import Config

_log = logging.getLogger("train.records")


class _Record(Strict):
    def write(self, path: Path) -> None:
        cli.write_result(path, self.model_dump(mode="json"))


class Costs(_Record):
    """costs.json: what was measured, and by what other measurements would differ."""

    identity: dict[str, str]
    tuning: Tuning


class Composed(_Record):
    """composition-<epsilon>.json: a composition, and a digest of everything that it depends on."""

    identity: str
    composition: Composition


R = TypeVar("R", Costs, Composed)


def _read(record: type[R], path: Path) -> R | None:
    """Return what an earlier run has written; None if that is missing or damaged."""
    try:
        return record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        _log.warning("%s is damaged or of an older version: it is made anew", path)
        return None


def measured_tuning(path: Path, chain: Chain, candidates: Iterable[Candidate], config: Config) -> Tuning:
    """Measure costs for batches of ``plan.batch`` rows on the fastest backend, or take those of an earlier run.

    Times never repeat exactly: a second measurement could change the plan, and cost a second look at ``certify``. But
    times that stay ``unsteady`` when measured again serve this run alone.

    Returns:
        How that backend runs fastest; ``costs_in`` finds the costs in it.
    """
    identity = {
        # Without ``minutes``: a fit that continues is planned with the same costs.
        "fit": config.model_dump_json(include={"fit"}, exclude={"fit": {"minutes"}}),
        "base": config.base.model_dump_json(),
        # A function's name does not say what it returns today.
        **({"chain": f"{chain.site_specs} {tree_digest(chain.params)}"} if config.base.chain else {}),
        "rounds": str(config.measure_rounds),
        "seed": str(config.seed),
        "device": device_name(),
        "plan": config.plan.model_dump_json(include={"batch", "tuned", "backend", "memory_share"}),
        "jax": cli.versions()["jax"],
        "onnxruntime": "" if config.plan.backend == "xla" else onnx_version(),
    }
    saved = _read(Costs, path)
    if saved and saved.identity == identity and not unsteady(costs_in(saved.tuning, config)):
        _log.info("costs as measured before (remove %s to measure anew)", path)
        return saved.tuning
    tuning = _fastest(chain, tuple(candidates), config)
    if why := unsteady(costs_in(tuning, config)):
        text = "COSTS ARE UNRELIABLE: %s. The plan of this run rests on them; %s is not written: run again when idle"
        _log.warning(text, why, path)
    else:
        Costs(identity=identity, tuning=tuning).write(path)
    return tuning


def costs_in(tuning: Tuning, config: Config) -> CostTable:
    """Return the costs that plans are composed on."""
    tile = next(tile for tile in tuning.tiles if tile.size == config.plan.batch)
    if tile.costs is None:
        raise InputError(f"tuning: expected costs of batches of {config.plan.batch}, got none")
    return tile.costs


def _fastest(chain: Chain, candidates: tuple[Candidate, ...], config: Config) -> Tuning:
    """Return the tuning, with costs, of the backend on which the whole base is fastest."""
    batch, backend = config.plan.batch, config.plan.backend
    if backend == "xla":
        return _on_xla(chain, candidates, config, reference_tuning((batch,)))
    if backend == "onnxruntime":
        return _on_onnx(chain, candidates, config)
    on_xla = probe(chain, candidates, sizes=(batch,))
    why = onnx_unavailable(chain, candidates) if jax.default_backend() == "cpu" else "there is a faster device"
    if why:
        _log.info("not on ONNX Runtime: %s", why)
        return _on_xla(chain, candidates, config, on_xla)
    on_onnx = _on_onnx(chain, candidates, config)
    if _ms(on_onnx) * _FAR > _ms(on_xla):
        on_xla = _on_xla(chain, candidates, config, on_xla)
    found = min(on_xla, on_onnx, key=_ms)
    text = "in batches of %d the base takes %.3g ms on XLA and %.3g on ONNX Runtime: planned for %s"
    _log.info(text, batch, _ms(on_xla), _ms(on_onnx), found.backend)
    return found


def _on_xla(chain: Chain, candidates: tuple[Candidate, ...], config: Config, tuning: Tuning) -> Tuning:
    """Return XLA's tuning, after a search if ``plan.tuned``, with costs."""
    if config.plan.tuned:
        tuning = gati_jax.tune(chain, candidates, sizes=(config.plan.batch,))
    tile = tuning.tiles[-1]
    caches = [tuned_cache(candidate, tile) for candidate in candidates]
    how = {"rounds": config.measure_rounds, "batch": tile.size, "options": tile.options}
    measure = functools.partial(gati_jax.measure_costs, tuned_chain(chain, tile), caches, **how)
    return _with_costs(tuning, measure_steadily(measure))


def _on_onnx(chain: Chain, candidates: tuple[Candidate, ...], config: Config) -> Tuning:
    """Return ONNX Runtime's tuning, with costs."""
    tuning = onnx_tuning(chain, candidates, sizes=(config.plan.batch,))
    how = {"rounds": config.measure_rounds, "batch": config.plan.batch}
    return _with_costs(tuning, measure_steadily(functools.partial(measure_onnx_costs, chain, candidates, **how)))


_FAR = 1.5  # times as slow as untuned, from where on XLA is not tuned


def _ms(tuning: Tuning) -> float:
    return tuning.tiles[-1].milliseconds


def _with_costs(tuning: Tuning, costs: CostTable) -> Tuning:
    last = dataclasses.replace(tuning.tiles[-1], milliseconds=costs.full_ms, costs=costs)
    return dataclasses.replace(tuning, tiles=(*tuning.tiles[:-1], last))


def kept_composition(path: Path, identity: str) -> Composition | None:
    """Return the composition of this identity, if ``keep_composition`` has written it here."""
    saved = _read(Composed, path)
    if saved is None or saved.identity != identity:
        return None
    _log.info("caches as composed before (remove %s to compose anew)", path)
    return saved.composition


def keep_composition(path: Path, identity: str, composition: Composition) -> None:
    """Write a composition.

    A search that stops at its time limit stops elsewhere next time, and another plan would cost a second look at
    ``certify``.
    """
    composition = dataclasses.replace(composition, refused=dict(composition.refused))
    Composed(identity=identity, composition=composition).write(path)
