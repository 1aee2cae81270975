"""Many requests in one program, each leaving at its own exit.

After every chosen site the rows that missed are compacted: the next span runs over them alone, in tiles whose number is
only known then (a ``fori_loop`` with a dynamic trip count). Nothing returns to the host in between. ``vmap`` of the
per-sample loop would run everything for every row; this runs what is left, rounded up to a tile.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from gati_jax._errors import InputError

from .cascade import Cascade, Prediction, run_stage
from .numerics import reference
from .options import Options, compiled
from .packing import Packed, pack, unpack
from .schedule import Schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchedCascade:
    """A cascade with the tiles that it runs in; all its arrays are leaves.

    Args:
        cascades: For each tile size: the same functions, perhaps by other convolution algorithms.
        schedule: The tiles.
    """

    cascades: tuple[Cascade, ...]
    schedule: Schedule = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, cascade: Cascade, schedule: Schedule) -> "BatchedCascade":
        """Run a cascade in tiles."""
        return cls(cascades=(cascade,) * len(schedule.sizes), schedule=schedule)

    @functools.cached_property
    def packed(self) -> Packed["BatchedCascade"]:
        """The same in few arguments."""
        return pack(self)


class _Rows(NamedTuple):
    """The requests still on their way, compacted: the first ``alive`` entries say where they are."""

    activation: Shaped[Array, "capacity *site"]  # behind the last stage; hits among them, in the order of that stage
    position: Int[Array, " capacity"]  # of each survivor in ``activation``
    request: Int[Array, " capacity"]  # which request it is
    alive: Int[Array, ""]


def predict_tiled(
    cascade: BatchedCascade,
    images: Shaped[Array | np.ndarray, "batch *input"],
    count: int | None = None,
    options: Options = (),
) -> Prediction:
    """Answer a batch in one program.

    Args:
        cascade: See ``BatchedCascade``.
        images: uint8 or prepared inputs; one program is compiled for each length.
        count: How many of them are requests; the rest is padding, takes no time and gets no answer.
        options: Compiler options of the program.

    Raises:
        InputError: There are no images, or fewer than requests.
    """
    count = len(images) if count is None else count
    if not 1 <= count <= len(images):
        msg = f"count: expected 1 to {len(images)}, the length of images, got {count}"
        raise InputError(msg)
    return compiled(_predict_tiled, options)(cascade.packed, images, np.int32(count))


@reference
def _predict_tiled(
    packed: Packed[BatchedCascade], images: Shaped[Array, "batch *input"], count: Int[Array, ""]
) -> Prediction:
    schedule, cascade = unpack(packed).schedule, unpack(packed).cascades[0]
    batch = len(images)
    # One more than is ever filled: where a tile is as large as all there is, the compiler sees that it can only start
    # at 0, takes what it computes for a constant of the loop, and computes it even where the loop never runs.
    capacity = max(schedule.covered(batch), schedule.sizes[0]) + 1
    x = cascade.chain.prepare(images)
    everyone = jnp.minimum(jnp.arange(capacity), batch - 1)
    rows = _Rows(x, everyone, everyone, count)
    depth, classes = len(cascade.chain), cascade.chain.classes
    answer = Prediction(
        class_index=jnp.zeros(batch, jnp.int32),
        exit=jnp.full(batch, depth, jnp.int32),
        score=jnp.full(batch, jnp.inf, jnp.float32),
        logits=jnp.zeros((batch, classes), jnp.float32),
    )
    for index in range(len(cascade.caches) + 1):
        rows, answer = _stage(packed, index, rows, answer)
    return answer._replace(class_index=jnp.argmax(answer.logits, -1).astype(jnp.int32))


def _stage(packed: Packed[BatchedCascade], index: int, rows: _Rows, answer: Prediction) -> tuple[_Rows, Prediction]:
    """Run one span over the survivors, answer the hits, compact the others."""
    schedule, cascade = unpack(packed).schedule, unpack(packed).cascades[0]
    chain, capacity = cascade.chain, len(rows.position)
    last = index == len(cascade.caches)
    site = len(chain) if last else cascade.caches[index].site
    shape = () if last else chain.site_specs[site].shape
    dtype = jnp.float32 if last else chain.site_specs[site].dtype
    behind = (
        jnp.zeros((capacity, *shape), dtype),
        jnp.zeros((capacity, chain.classes), jnp.float32),
        jnp.full(capacity, jnp.inf, jnp.float32),
    )
    start, sizes = jnp.int32(0), schedule.sizes
    rest = jnp.asarray(schedule.table)[rows.alive % sizes[0]]
    for i, size in enumerate(sizes):
        number = rest[i] + (rows.alive // sizes[0] if i == 0 else 0)
        run = functools.partial(_tile, packed, (index, i), rows, start)
        behind = jax.lax.fori_loop(0, number, run, behind)
        start = start + number * size
    activation, logits, scores = behind
    live = jnp.arange(capacity) < rows.alive
    hit = live & (scores >= (-jnp.inf if last else cascade.thresholds[index]))
    missed = live & ~hit
    target = jnp.where(hit, rows.request, len(answer.exit))  # out of bounds, and so dropped, where it missed
    answer = Prediction(
        class_index=answer.class_index,
        exit=answer.exit.at[target].set(jnp.int32(site), mode="drop"),
        score=answer.score.at[target].set(scores, mode="drop"),
        logits=answer.logits.at[target].set(logits, mode="drop"),
    )
    return _survivors(activation, rows.request, missed), answer


def _tile(
    packed: Packed[BatchedCascade],
    which: tuple[int, int],
    rows: _Rows,
    start: Int[Array, ""],
    number: Int[Array, ""],
    behind: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """Run one tile of stage ``which[0]`` and size ``which[1]`` through its span and its lookup, or the classifier."""
    index, size_index = which
    batched = unpack(packed)  # here, and not outside the loop: see ``step``
    cascade, size = batched.cascades[size_index], batched.schedule.sizes[size_index]
    at = start + number * size
    said = run_stage(cascade, index, rows.activation[jax.lax.dynamic_slice_in_dim(rows.position, at, size)])
    activation, logits, scores = behind
    if index < len(cascade.caches):
        activation = jax.lax.dynamic_update_slice_in_dim(activation, said.activation, at, 0)
        scores = jax.lax.dynamic_update_slice_in_dim(scores, said.score, at, 0)
    return activation, jax.lax.dynamic_update_slice_in_dim(logits, said.logits, at, 0), scores


def _survivors(
    activation: Shaped[Array, "capacity *site"], request: Int[Array, " capacity"], missed: Bool[Array, " capacity"]
) -> _Rows:
    (position,) = jnp.nonzero(missed, size=len(missed), fill_value=0)
    position = position.astype(jnp.int32)
    return _Rows(activation, position, request[position], jnp.sum(missed, dtype=jnp.int32))
