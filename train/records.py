"""What a run of ``train.caches`` leaves in DIR for the next: costs.json, composition-<epsilon>.json."""

import dataclasses
import functools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

import gati_jax
from gati_jax import Candidate, Chain, CostTable
from gati_jax.options import Strict
from gati_jax.planning import Composition
from gati_jax.profiling import Tile, device_name, measure_steadily, tune_tile, tuned_cache, tuned_chain, unsteady
from train import cli

from .config import Config

_log = logging.getLogger("train.records")


class _Record(Strict):
    def write(self, path: Path) -> None:
        cli.write_result(path, self.model_dump(mode="json"))


class Costs(_Record):
    """costs.json: what was measured, and by what other measurements would differ."""

    identity: dict[str, str]
    tile: Tile


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
        _log.warning("%s is damaged: it is made anew", path)
        return None


def measured_tile(path: Path, chain: Chain, candidates: Iterable[Candidate], config: Config) -> tuple[Tile, CostTable]:
    """Measure costs, or take those that an earlier run of the same experiment measured here.

    They are those of a tile of ``plan.batch`` rows; it is tuned first if ``plan.tuned`` is set.

    Times never repeat exactly: a second measurement could change the plan, and cost a second look at ``certify``. But
    times that stay ``unsteady`` when measured again serve this run alone.
    """
    identity = {
        # Without ``minutes``: a fit that continues is planned with the same costs.
        "fit": config.model_dump_json(include={"fit"}, exclude={"fit": {"minutes"}}),
        "base": config.base.model_dump_json(),
        "rounds": str(config.measure_rounds),
        "seed": str(config.seed),
        "device": device_name(),
        "plan": f"batch {config.plan.batch}, tuned {config.plan.tuned}, memory {config.plan.memory_share}",
        "jax": cli.versions()["jax"],
    }
    saved = _read(Costs, path)
    if saved and saved.identity == identity and saved.tile.costs and not unsteady(saved.tile.costs):
        _log.info("costs as measured before (remove %s to measure anew)", path)
        return saved.tile, saved.tile.costs
    tile = Tile(size=config.plan.batch, milliseconds=1.0, options=(), algorithms={})
    if config.plan.tuned:
        tile = tune_tile(chain, tuple(candidates), tile.size)
    caches = [tuned_cache(candidate, tile) for candidate in candidates]
    how = {"rounds": config.measure_rounds, "batch": tile.size, "options": tile.options}
    costs = measure_steadily(functools.partial(gati_jax.measure_costs, tuned_chain(chain, tile), caches, **how))
    tile = dataclasses.replace(tile, milliseconds=costs.full_ms, costs=costs)
    if why := unsteady(costs):
        text = "COSTS ARE UNRELIABLE: %s. The plan of this run rests on them; %s is not written: run again when idle"
        _log.warning(text, why, path)
    else:
        Costs(identity=identity, tile=tile).write(path)
    return tile, costs


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
