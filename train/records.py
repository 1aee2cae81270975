"""What one run of ``train.caches`` leaves in DIR for the next one: costs.json and looks.json."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import UInt64
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

import gati_jax
from gati_jax import Candidate, Chain, CostTable, InputError, Plan, data
from gati_jax.planning import Composition
from gati_jax.profiling import Tile, device_name, tune_tile, tuned_cache, tuned_chain
from train import cli

from .config import Config

_log = logging.getLogger("train.records")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Costs(_Record):
    """costs.json."""

    identity: dict[str, str]
    tile: Tile


class Look(_Record):
    """One plan that was held against certify rows, at one epsilon and delta; alone, or with others in one look."""

    plan_hash: str
    data_fingerprint: str
    epsilon: float
    delta: float
    together: str = ""
    """The same for all plans that were certified together; empty for a plan alone."""

    def entry(self) -> dict[str, str | float]:
        """Return what is written down: a plan alone says nothing of others."""
        return self.model_dump(exclude=None if self.together else {"together"})


class _Composed(_Record):
    """composition-<epsilon>.json."""

    identity: str
    composition: Composition


class _Looks(_Record):
    """looks.json."""

    looks: tuple[Look, ...]
    rows: dict[str, Annotated[str, Field(pattern=r"^([0-9a-f]{16})*$")]]
    """By fingerprint: the digests of the rows."""

    @model_validator(mode="after")
    def _rows_are_known(self) -> "_Looks":
        if missing := {look.data_fingerprint for look in self.looks} - self.rows.keys():
            raise ValueError(f"rows: {', '.join(missing)} is missing")
        return self


def measured_tile(path: Path, chain: Chain, candidates: Iterable[Candidate], config: Config) -> tuple[Tile, CostTable]:
    """Measure costs, or take what an earlier run of the same experiment measured here.

    They are those of a tile of ``plan.batch`` rows: tuned first, if ``plan.tuned`` says so.

    Times never repeat exactly. A second measurement could change the plan, and cost a second look at ``certify``.
    """
    identity = {
        "fit": config.fit.model_dump_json(exclude={"minutes"}),  # a fit that goes on plans with the same costs
        "base": config.base.model_dump_json(),
        "rounds": str(config.measure_rounds),
        "seed": str(config.seed),
        "device": device_name(),
        "plan": f"batch {config.plan.batch}, tuned {config.plan.tuned}, memory {config.plan.memory_share}",
        "jax": cli.versions()["jax"],
    }
    try:
        saved = TypeAdapter(_Costs).validate_json(path.read_bytes())
    except FileNotFoundError:
        saved = None
    except ValidationError:
        _log.warning("%s is damaged: costs are measured anew", path)
        saved = None
    if saved and saved.identity == identity and saved.tile.costs:
        _log.info("costs as measured before (remove %s to measure anew)", path)
        return saved.tile, saved.tile.costs
    tile = Tile(size=config.plan.batch, milliseconds=1.0, options=(), algorithms={})
    if config.plan.tuned:
        tile = tune_tile(chain, tuple(candidates), tile.size)
    caches = [tuned_cache(candidate, tile) for candidate in candidates]
    costs = gati_jax.measure_costs(
        tuned_chain(chain, tile), caches, rounds=config.measure_rounds, batch=tile.size, options=tile.options
    )
    tile = dataclasses.replace(tile, milliseconds=costs.full_ms, costs=costs)
    cli.write_result(path, {"identity": identity, "tile": dataclasses.asdict(tile)})
    return tile, costs


def kept_composition(path: Path, identity: str) -> Composition | None:
    """Return what an earlier run of the same experiment composed, if it is there; see ``keep_composition``."""
    try:
        saved = TypeAdapter(_Composed).validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        _log.warning("%s is damaged: caches are composed anew", path)
        return None
    if saved.identity != identity:
        return None
    _log.info("caches as composed before (remove %s to compose anew)", path)
    return saved.composition


def keep_composition(path: Path, identity: str, composition: Composition) -> None:
    """Write a composition down.

    A search that ends by the clock ends elsewhere next time, and another plan would cost a second look at ``certify``.
    """
    entry = {field.name: getattr(composition, field.name) for field in dataclasses.fields(composition)}
    entry["refused"] = dict(composition.refused)
    cli.write_result(path, {"identity": identity, "composition": entry})


def record_look(
    path: Path, rows: UInt64[np.ndarray, " n"], plans: Mapping[str, tuple[Plan, float]], delta: float
) -> tuple[Look, ...]:
    """Write down that these rows are opened to certify these plans, before they are.

    Args:
        path: looks.json.
        rows: Digests of the certify rows.
        plans: About to be certified together, by name, each with the disagreement to certify.
        delta: The risk of error of all together.

    Returns:
        All looks at any of these rows, this one included; ``count_looks`` says how many. The same look again learns
        nothing new and counts once.

    Raises:
        InputError: The file is damaged.
    """
    try:
        book = TypeAdapter(_Looks).validate_json(path.read_bytes())
    except FileNotFoundError:
        book = _Looks(looks=(), rows={})
    except ValidationError as error:
        raise InputError(
            f"looks: {path} is damaged, and without it nobody knows how often the certify data has been opened"
        ) from error
    fingerprint = data.fingerprint(rows)
    tested = sorted((plan.hash, epsilon) for plan, epsilon in plans.values())
    together = hashlib.sha256(repr((tested, delta)).encode()).hexdigest()[:32] if len(tested) > 1 else ""
    looks = tuple(
        Look(plan_hash=plan, data_fingerprint=fingerprint, epsilon=epsilon, delta=delta, together=together)
        for plan, epsilon in tested
    )
    if new := tuple(look for look in looks if look not in book.looks):
        hexadecimal = rows.astype("<u8").tobytes().hex()
        book = _Looks(looks=(*book.looks, *new), rows={**book.rows, fingerprint: hexadecimal})
        cli.write_result(path, {"looks": [look.entry() for look in book.looks], "rows": book.rows})
    opened = {name: np.frombuffer(bytes.fromhex(text), "<u8") for name, text in book.rows.items()}
    overlapping = {name for name, others in opened.items() if np.isin(others, rows).any()}
    return tuple(look for look in book.looks if look.data_fingerprint in overlapping)


def count_looks(looks: Iterable[Look]) -> int:
    """Return how often the rows were opened: plans that were certified together count once, for they share delta."""
    together = {(look.data_fingerprint, look.together) for look in looks if look.together}
    return len(together) + sum(not look.together for look in looks)
