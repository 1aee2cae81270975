"""The host driver: a program for every stage and tile size, compiled ahead of time; the host compacts in between.

The reference for the batched driver, and what a server needs: it alone decides which stage runs next, on which rows.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from gati_jax.errors import InputError
from gati_jax.models.chain import reference

from .batched import Schedule
from .cascade import Behind, Cascade, Prediction, run_stage
from .compilation import CompilerOptions, compiled, pack, unpack

MOST_PROGRAMS = 42


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class HostCascade:
    """A cascade as programs for its stages, see ``compile_stages``."""

    cascade: Cascade
    schedule: Schedule
    programs: Mapping[tuple[int, int], Any]
    """By stage and tile size: from what stands at the site before to what stands behind the stage."""
    leaves: Mapping[int, list[Array]]
    """By tile size: the arrays that a program takes."""
    warm_up_seconds: float

    def run(self, stage: int, x: Shaped[np.ndarray | Array, "tile *site"]) -> Behind:
        """Run one tile through one stage."""
        size = len(x)
        return self.programs[stage, size](self.leaves[size], x)


def compile_stages(
    cascades: Mapping[int, Cascade], schedule: Schedule, options: Mapping[int, CompilerOptions] | None = None
) -> HostCascade:
    """Compile every stage for every tile size of the schedule.

    Args:
        cascades: By tile size: the same functions, perhaps by other convolution algorithms.
        schedule: The tiles.
        options: Compiler options by tile size.

    Raises:
        InputError: That would take more than 42 programs.
    """
    started = time.perf_counter()
    some = cascades[schedule.sizes[0]]
    stages = len(some.caches) + 1
    if (number := stages * len(schedule.sizes)) > MOST_PROGRAMS:
        raise InputError(
            f"schedule: expected at most {MOST_PROGRAMS} programs, got {stages} stages of {schedule.sizes}: {number}"
        )
    programs, leaves = {}, {}
    for size in schedule.sizes:
        # Leaves, not Packed: lowering describes arguments by a tree of what are no arrays.
        leaves[size], structure = jax.tree.flatten(pack(cascades[size]))
        program = compiled(_run, (options or {}).get(size, ()), static=("structure", "stage"))
        for stage in range(stages):
            x = jax.ShapeDtypeStruct((size, *_before(some, stage).shape), _before(some, stage).dtype)
            programs[stage, size] = program.lower(leaves[size], x, structure=structure, stage=stage).compile()
    seconds = time.perf_counter() - started
    return HostCascade(cascade=some, schedule=schedule, programs=programs, leaves=leaves, warm_up_seconds=seconds)


def _before(cascade: Cascade, stage: int) -> jax.ShapeDtypeStruct:
    """Return what enters a stage; requests arrive as pixels, where the base normalises them."""
    if stage:
        return cascade.chain.site_specs[cascade.sites[stage - 1]]
    spec = cascade.chain.input_spec
    return jax.ShapeDtypeStruct(spec.shape, jnp.uint8) if cascade.chain.normalization else spec


@reference
def _run(leaves: list[Array], x: Array, *, structure: Any, stage: int) -> Behind:  # noqa: ANN401 (a PyTreeDef)
    cascade: Cascade = unpack(jax.tree.unflatten(structure, leaves))
    return run_stage(cascade, stage, cascade.chain.prepare(x) if stage == 0 else x)


def predict_on_host(host: HostCascade, images: Shaped[np.ndarray, "batch *input"]) -> Prediction:
    """Answer a batch; hits leave after every stage, the others go on in as few tiles as are fastest.

    Args:
        host: See ``compile_stages``.
        images: uint8, or prepared inputs where the base does not normalise.

    Raises:
        InputError: There are no images.
    """
    cascade, batch = host.cascade, len(images)
    if batch == 0:
        raise InputError("images: expected at least one, got none")
    thresholds = np.append(np.asarray(cascade.thresholds), np.float32(-np.inf))
    exits, scores = np.empty(batch, np.int32), np.empty(batch, np.float32)
    logits = np.empty((batch, cascade.chain.classes), np.float32)
    alive, x = np.arange(batch), np.asarray(images)
    for stage, site in enumerate((*cascade.sites, len(cascade.chain))):
        behind = _through(host, stage, x)
        hit = behind.score >= thresholds[stage]
        left = alive[hit]
        exits[left], scores[left], logits[left] = site, behind.score[hit], behind.logits[hit]
        alive, x = alive[~hit], behind.activation[~hit]
        if not len(alive):
            break
    columns = (logits.argmax(-1).astype(np.int32), exits, scores, logits)
    return Prediction(*(jnp.asarray(column) for column in columns))


def _through(host: HostCascade, stage: int, x: Shaped[np.ndarray, "rows *site"]) -> PyTree:
    """Run any number of rows through a stage, in tiles; what fills up the last one is cut off again."""
    parts, start = [], 0
    for size, count in zip(host.schedule.sizes, host.schedule.tiles(len(x)), strict=True):
        for _ in range(count):
            tile = x[start : start + size]
            short = size - len(tile)
            padded = np.concatenate([tile, np.repeat(tile[:1], short, axis=0)]) if short else tile
            parts.append(host.run(stage, padded))  # dispatched; the next tile is prepared meanwhile
            start += size
    return jax.tree.map(lambda *rows: np.concatenate([np.asarray(r) for r in rows])[: len(x)], *parts)
