"""The runner's programs: gather -> span -> lookup -> scatter, one for each stage of a route and each bucket."""

import dataclasses
import gc
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered
from jaxtyping import Array, Float, Int, PyTree, Shaped

from gati_jax.models import Chain
from gati_jax.models.chain import reference
from gati_jax.pytrees import pack, unpack
from gati_jax.runtime import Cascade, CompilerOptions, compiled
from gati_jax.runtime.cascade import run_stage

SCORE, LOGITS = 0, 1  # columns of a program's output
THREADS = min(4, os.cpu_count() or 1)  # a compiler takes some hundred MB

Key = tuple[int, int, int]  # route, stage, bucket
_log = logging.getLogger("serve.engine.programs")
_LOG_SECONDS = 10.0  # between two lines
_YOUNG = 10_000  # objects


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A stage of a route in a bucket, compiled, with the arrays that it takes."""

    run: Any
    """(leaves, source, slots, after) -> (output, after); parameters are arguments, the slab ``after`` is donated."""
    leaves: list[Array]
    structure: Any


def build(
    wanted: Mapping[Key, tuple[Cascade, CompilerOptions]], *, capacity: int, threads: int = THREADS
) -> dict[Key, Program]:
    """Compile programs; those of one structure share one.

    They are traced here, one after another, and compiled in threads: the compiler does not hold Python's lock.
    ``capacity`` is the rows of slabs.
    """
    lowered: dict[Any, Lowered] = {}
    parts: dict[Key, tuple[Any, list[Array], Any]] = {}
    for (route, stage, bucket), (cascade, options) in wanted.items():
        leaves, structure = leaves_of(cascade, stage)
        same = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), stage, bucket, options
        parts[route, stage, bucket] = same, leaves, structure
        if same not in lowered:
            program = compiled(_run, options, static=("structure", "stage"), donate=("after",))
            slots = jax.ShapeDtypeStruct((bucket,), jnp.int32)
            images = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in to_source(cascade.chain, (), bucket)]
            source = slab(cascade, stage - 1, capacity) if stage else images
            after = slab(cascade, stage, capacity) if stage < len(cascade.caches) else None
            lowered[same] = program.lower(leaves, source, slots, after, structure=structure, stage=stage)
    ready, said = dict[Any, Any](), time.monotonic()
    with ThreadPoolExecutor(threads, "compile") as pool:
        compiling = {pool.submit(one.compile): same for same, one in lowered.items()}
        for done in as_completed(compiling):
            ready[compiling[done]] = done.result()
            recent = time.monotonic() - said < _LOG_SECONDS
            level = logging.DEBUG if recent else logging.INFO
            _log.log(level, "warming up", extra={"ready": len(ready), "programs": len(lowered)})
            said = said if recent else time.monotonic()
    return {
        key: Program(run=ready[same], leaves=leaves, structure=structure)
        for key, (same, leaves, structure) in parts.items()
    }


def try_all(
    programs: Mapping[Key, Program], cascades: Mapping[Key, Cascade], *, capacity: int
) -> dict[str, Float[np.ndarray, "bucket columns"]]:
    """Run all stages of every route and bucket on made-up images, the same in every process; return their outputs."""
    found: dict[str, Float[np.ndarray, "bucket columns"]] = {}
    carried: Array | None = None
    for key in sorted(programs, key=lambda key: (key[0], key[2], key[1])):  # a stage reads what the one before it wrote
        (route, stage, bucket), cascade, program = key, cascades[key], programs[key]
        source: Any = carried
        if stage == 0:
            dtype = cascade.chain.input_spec.dtype
            drawn = np.random.default_rng(bucket).integers(0, 2, (bucket, *cascade.chain.input_spec.shape))
            source = to_source(cascade.chain, list(drawn.astype(dtype)), bucket)
        after = slab(cascade, stage, capacity) if stage < len(cascade.caches) else None
        after = None if after is None else jnp.zeros(after.shape, after.dtype)
        output, carried = program.run(program.leaves, source, np.arange(bucket, dtype=np.int32), after)
        found[f"{route}/{stage}/{bucket}"] = np.asarray(output)
    return found


def settle() -> None:
    """Exempt all present objects from garbage collection: call it when everything is compiled.

    A full collection walks through all that tracing has left. That takes 0.2 s, happens every few thousand requests,
    and no request is answered meanwhile. Young objects are collected more rarely than by default, which is every few
    requests: JAX adds a call of its own to each collection, which took 6 % of the event loop's time under load.
    """
    gc.unfreeze()  # what was served before may be gone
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])


def leaves_of(cascade: Cascade, stage: int) -> tuple[list[Array], Any]:
    """Return the arrays that one stage takes, packed, and their structure; unread arguments would also cost time."""
    chain, last = cascade.chain, stage == len(cascade.caches)
    start, stop = ((0, *cascade.sites)[stage], len(chain) + 1 if last else cascade.sites[stage])
    params = tuple(block if start <= i < stop else () for i, block in enumerate(chain.params))
    caches = tuple(c if i == stage else dataclasses.replace(c, params={}) for i, c in enumerate(cascade.caches))
    return jax.tree.flatten(pack(Cascade(dataclasses.replace(chain, params=params), caches, cascade.thresholds)))


def slab(cascade: Cascade, stage: int, capacity: int) -> jax.ShapeDtypeStruct:
    """Return the shape of the slab that a stage (not the last) writes: one row for each slot."""
    spec = cascade.chain.site_specs[cascade.sites[stage]]
    return jax.ShapeDtypeStruct((capacity, *spec.shape), spec.dtype)


def to_source(chain: Chain, images: Sequence[Shaped[np.ndarray, "*input"]], bucket: int) -> list[np.ndarray]:
    """Stack images for the first stage, padded to the bucket.

    If the base normalises, some images may be uint8 pixels and others prepared inputs. Both may share a step, so the
    program takes both forms and a mask: an image's arithmetic does not depend on its neighbours.
    """
    spec = chain.input_spec
    prepared = np.zeros((bucket, *spec.shape), spec.dtype)
    if chain.normalization is None:
        for i, image in enumerate(images):
            prepared[i] = image
        return [prepared]
    pixels, is_pixels = np.zeros((bucket, *spec.shape), np.uint8), np.zeros(bucket, bool)
    for i, image in enumerate(images):
        is_pixels[i] = image.dtype == np.uint8
        (pixels if is_pixels[i] else prepared)[i] = image
    return [prepared, pixels, is_pixels]


def _prepare(chain: Chain, source: list[Array]) -> Shaped[Array, "bucket *input"]:
    if chain.normalization is None:
        return chain.prepare(source[0])
    prepared, pixels, is_pixels = source
    is_pixels = is_pixels.reshape(-1, *[1] * (pixels.ndim - 1))
    return jnp.where(is_pixels, chain.prepare(pixels), prepared)


@reference
def _run(
    leaves: list[Array],
    source: PyTree,
    slots: Int[Array, " bucket"],
    after: Shaped[Array, "capacity *site"] | None,
    *,
    structure: Any,  # noqa: ANN401 (a PyTreeDef)
    stage: int,
) -> tuple[Float[Array, "bucket columns"], Shaped[Array, "capacity *site"] | None]:
    """Run a stage on the rows of some slots; the host compares the scores with thresholds.

    Slots out of bounds are padding: whatever is read for them, nothing is written. The activation of a hit is written
    as well, because its job may continue as a shadow job.
    """
    cascade: Cascade = unpack(jax.tree.unflatten(structure, leaves))
    x = _prepare(cascade.chain, source) if stage == 0 else source.at[slots].get(mode="clip")
    result = run_stage(cascade, stage, x)
    if after is not None:
        after = after.at[slots].set(result.activation, mode="drop")
    return jnp.concatenate([result.score[:, None], result.logits], axis=1), after
