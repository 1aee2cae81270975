"""What a run of ``train.caches`` leaves in DIR for the next: costs.json, composition-<epsilon>.json, looks.json."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
from jaxtyping import UInt64
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import gati_jax
from gati_jax import Candidate, Chain, CostTable, InputError, Plan, data
from gati_jax.planning import Composition
from gati_jax.profiling import Tile, device_name, tune_tile, tuned_cache, tuned_chain
from train import cli

from .config import Config

_log = logging.getLogger("train.records")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

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


class Look(_Record):
    """One plan that was tested on certify rows, at one epsilon and delta; alone, or with others in one look."""

    plan_hash: str
    data_fingerprint: str
    epsilon: float
    delta: float
    together: str = ""
    """The same for all plans that were certified together; empty for a plan alone."""

    def entry(self) -> dict[str, str | float]:
        """Return what is written; a plan alone has no ``together``."""
        return self.model_dump(exclude=None if self.together else {"together"})


class Looks(_Record):
    """looks.json: every look at certify rows."""

    looks: tuple[Look, ...]
    rows: dict[str, Annotated[str, Field(pattern=r"^([0-9a-f]{16})*$")]]
    """By fingerprint: the digests of the rows."""

    @model_validator(mode="after")
    def _rows_are_known(self) -> "Looks":
        if missing := {look.data_fingerprint for look in self.looks} - self.rows.keys():
            raise ValueError(f"rows: {', '.join(missing)} is missing")
        return self

    @classmethod
    def read(cls, path: Path) -> "Looks":
        """Return what was written; nothing, if there is no file.

        Raises:
            InputError: The file is damaged.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls(looks=(), rows={})
        except ValidationError as error:
            raise InputError(
                f"looks: expected a whole looks.json, got {path}: how often the certify data was opened is lost with it"
            ) from error

    def add(self, looks: Iterable[Look], rows: UInt64[np.ndarray, " n"]) -> "Looks":
        """Return these looks with others at the rows of these digests."""
        hexadecimal = {data.fingerprint(rows): rows.astype("<u8").tobytes().hex()}
        return Looks(looks=(*self.looks, *looks), rows=self.rows | hexadecimal)

    def at(self, rows: UInt64[np.ndarray, " n"]) -> tuple[Look, ...]:
        """Return the looks at any of the rows of these digests."""
        opened = {name: np.frombuffer(bytes.fromhex(text), "<u8") for name, text in self.rows.items()}
        overlapping = {name for name, others in opened.items() if np.isin(others, rows).any()}
        return tuple(look for look in self.looks if look.data_fingerprint in overlapping)

    def write(self, path: Path) -> None:
        """Write the file."""
        cli.write_result(path, {"looks": [look.entry() for look in self.looks], "rows": self.rows})


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

    Times never repeat exactly: a second measurement could change the plan, and cost a second look at ``certify``.
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


def record_look(
    path: Path, rows: UInt64[np.ndarray, " n"], plans: Mapping[str, tuple[Plan, float]], delta: float
) -> tuple[Look, ...]:
    """Record that these rows are opened to certify these plans; to be called before they are.

    Args:
        path: looks.json.
        rows: Digests of the certify rows.
        plans: To be certified together, by name, each with its epsilon.
        delta: The risk of error of all together.

    Returns:
        All looks at any of these rows, this one included; ``count_looks`` counts them. The same look again reveals
        nothing new and counts once.

    Raises:
        InputError: The file is damaged.
    """
    known = Looks.read(path)
    fingerprint = data.fingerprint(rows)
    tested = sorted((plan.hash, epsilon) for plan, epsilon in plans.values())
    together = hashlib.sha256(repr((tested, delta)).encode()).hexdigest()[:32] if len(tested) > 1 else ""
    looks = [
        Look(plan_hash=plan, data_fingerprint=fingerprint, epsilon=epsilon, delta=delta, together=together)
        for plan, epsilon in tested
    ]
    if new := [look for look in looks if look not in known.looks]:
        known = known.add(new, rows)
        known.write(path)
    return known.at(rows)


def count_looks(looks: Iterable[Look]) -> int:
    """Return how often the rows were opened: plans that were certified together count once, for they share delta."""
    together = {(look.data_fingerprint, look.together) for look in looks if look.together}
    return len(together) + sum(not look.together for look in looks)
