"""The batched driver: many requests in one program, each leaving at its own exit.

After every stage the rows that missed are compacted: the next stage runs over them alone, in tiles whose number is only
known then (a ``fori_loop`` with a dynamic trip count). Nothing returns to the host in between. ``vmap`` of the
per-sample loop would run everything for every row; this runs the rows that are left, rounded up to a tile.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from gati_jax.errors import InputError
from gati_jax.models.chain import reference
from gati_jax.pytrees import Packed, pack, unpack

from .cascade import Cascade, CompilerOptions, Prediction, compiled, run_stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How rows are covered by tiles: full ones first; for the rest one that is partly empty, or smaller ones.

    Args:
        sizes: Rows in a tile, falling.
        rest: For r = 0 .. sizes[0] - 1 remaining rows, the number of tiles of each size.
    """

    sizes: tuple[int, ...]
    rest: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        """Check that sizes fall and that every rest is covered."""
        if not self.sizes or min(self.sizes) < 1 or list(self.sizes) != sorted(set(self.sizes), reverse=True):
            raise InputError(f"sizes: expected falling tile sizes, got {self.sizes}")
        if len(self.rest) != self.sizes[0] or any(self._rows(counts) < r for r, counts in enumerate(self.rest)):
            raise InputError(f"rest: expected tiles that cover 0 .. {self.sizes[0] - 1} rows, got {self.rest}")

    @classmethod
    def of(cls, milliseconds: Mapping[int, float], *, batch: int | None = None) -> "Schedule":
        """Choose tiles by their measured times.

        Args:
            milliseconds: The time that a tile of each size takes.
            batch: The most rows that there will be; larger tiles are not considered.

        Raises:
            InputError: No tile size is at most ``batch``.
        """
        sizes = sorted(size for size in milliseconds if batch is None or size <= batch)
        if not sizes:
            raise InputError(f"milliseconds: expected a tile of at most {batch} rows, got {sorted(milliseconds)}")
        full = min(reversed(sizes), key=lambda size: milliseconds[size] / size)
        sizes = [size for size in reversed(sizes) if size <= full]
        cheapest: list[tuple[float, tuple[int, ...]]] = [(0.0, (0,) * len(sizes))]
        for rows in range(1, full):
            options = []
            for i, size in enumerate(sizes):
                ms, counts = cheapest[max(0, rows - size)]
                options.append((ms + milliseconds[size], (*counts[:i], counts[i] + 1, *counts[i + 1 :])))
            cheapest.append(min(options))
        return cls(sizes=tuple(sizes), rest=tuple(counts for _, counts in cheapest))

    def _rows(self, counts: tuple[int, ...]) -> int:
        return sum(size * count for size, count in zip(self.sizes, counts, strict=True))

    def tiles(self, rows: int) -> tuple[int, ...]:
        """Return the number of tiles of each size for ``rows`` rows."""
        full, rest = divmod(rows, self.sizes[0])
        return (self.rest[rest][0] + full, *self.rest[rest][1:])

    def covered(self, rows: int) -> int:
        """Return how many rows fit into the tiles for up to ``rows`` rows, at most."""
        return max(self._rows(self.tiles(n)) for n in range(rows + 1))

    def milliseconds(self, rows: int, tile_ms: Mapping[int, float]) -> float:
        """Return the time that ``rows`` rows take in these tiles."""
        return sum(tile_ms[size] * count for size, count in zip(self.sizes, self.tiles(rows), strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchedCascade:
    """A cascade with the tiles that it runs in; all its arrays are leaves.

    Args:
        cascades: For each tile size the same cascade, perhaps by other convolution algorithms.
        schedule: The tiles.
    """

    cascades: tuple[Cascade, ...]
    schedule: Schedule = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, cascade: Cascade, schedule: Schedule) -> "BatchedCascade":
        """Return a cascade that runs the same way in tiles of every size."""
        return cls(cascades=(cascade,) * len(schedule.sizes), schedule=schedule)

    @functools.cached_property
    def packed(self) -> Packed["BatchedCascade"]:
        """The same in few arguments."""
        return pack(self)


class Rows(NamedTuple):
    """The requests that have missed so far, compacted: the first ``alive`` entries are valid."""

    activation: Shaped[Array, "capacity *site"]  # of the last stage; hits among them, in the order of that stage
    position: Int[Array, " capacity"]  # of each survivor in ``activation``
    request: Int[Array, " capacity"]  # which request it is
    alive: Int[Array, ""]


def predict_tiled(
    cascade: BatchedCascade,
    images: Shaped[Array | np.ndarray, "batch *input"],
    count: int | None = None,
    options: CompilerOptions = (),
) -> Prediction:
    """Answer a batch in one program.

    Args:
        cascade: See ``BatchedCascade``.
        images: uint8 or prepared inputs; one program is compiled for each length.
        count: How many of them are requests; the others are padding, which takes no time and gets no answer.
        options: Compiler options of the program.

    Raises:
        InputError: There are no images, or fewer than requests.
    """
    requests = check_count(len(images) if count is None else count, images)
    return compiled(answer_tiled, options)(cascade.packed, images, requests)


def check_count(count: int, images: Shaped[Array | np.ndarray, "batch *input"]) -> np.int32:
    """Return how many rows of a batch are requests, as programs take it.

    Raises:
        InputError: They are none, or more than there are.
    """
    if not 1 <= count <= len(images):
        raise InputError(f"count: expected 1 to {len(images)}, the length of images, got {count}")
    return np.int32(count)


@reference
def answer_tiled(
    packed: Packed[BatchedCascade], images: Shaped[Array, "batch *input"], count: Int[Array, ""]
) -> Prediction:
    """Answer the first ``count`` rows of a batch: the program of ``predict_tiled``, to be traced."""
    schedule, cascade = unpack(packed).schedule, unpack(packed).cascades[0]
    batch = len(images)
    # One row more than is ever filled: were a tile as large as the buffer, the compiler would see that it can only
    # start at row 0, take its result for a constant of the loop, and compute it even if the loop never runs.
    capacity = max(schedule.covered(batch), schedule.sizes[0]) + 1
    rows, answer = first_rows(cascade, images, count, capacity)
    for index in range(len(cascade.caches) + 1):
        rows, answer = _stage(packed, index, rows, answer)
    return answer._replace(class_index=jnp.argmax(answer.logits, -1).astype(jnp.int32))


def first_rows(
    cascade: Cascade, images: Shaped[Array, "batch *input"], count: Int[Array, ""], capacity: int
) -> tuple[Rows, Prediction]:
    """Return all rows before the first stage, in buffers of ``capacity``, and their answers, all from the base."""
    batch = len(images)
    every = jnp.minimum(jnp.arange(capacity, dtype=jnp.int32), batch - 1)
    answer = Prediction(
        class_index=jnp.zeros(batch, jnp.int32),
        exit=jnp.full(batch, len(cascade.chain), jnp.int32),
        score=jnp.full(batch, jnp.inf, jnp.float32),
        logits=jnp.zeros((batch, cascade.chain.classes), jnp.float32),
    )
    return Rows(cascade.chain.prepare(images), every, every, count), answer


def _stage(packed: Packed[BatchedCascade], index: int, rows: Rows, answer: Prediction) -> tuple[Rows, Prediction]:
    """Run one stage over the rows that are left, answer the hits, compact the others."""
    schedule, cascade = unpack(packed).schedule, unpack(packed).cascades[0]
    chain, capacity = cascade.chain, len(rows.position)
    last = index == len(cascade.caches)
    site = len(chain) if last else cascade.caches[index].site
    shape = () if last else chain.site_specs[site].shape
    dtype = jnp.float32 if last else chain.site_specs[site].dtype
    outputs = (
        jnp.zeros((capacity, *shape), dtype),
        jnp.zeros((capacity, chain.classes), jnp.float32),
        jnp.full(capacity, jnp.inf, jnp.float32),
    )
    start, sizes = jnp.int32(0), schedule.sizes
    rest = jnp.asarray(np.array(schedule.rest, np.int32))[rows.alive % sizes[0]]
    for i, size in enumerate(sizes):
        number = rest[i] + (rows.alive // sizes[0] if i == 0 else 0)
        run = functools.partial(_tile, packed, (index, i), rows, start)
        outputs = jax.lax.fori_loop(0, number, run, outputs)
        start = start + number * size
    return leave(cascade, index, rows, outputs, answer)


def leave(
    cascade: Cascade, index: int, rows: Rows, outputs: tuple[Array, Array, Array], answer: Prediction
) -> tuple[Rows, Prediction]:
    """Answer the rows that leave at a stage, and compact the others.

    Args:
        cascade: See ``Cascade``.
        index: Number of the stage.
        rows: Before the stage.
        outputs: Of the stage, for the first of these rows: activations, logits, scores.
        answer: Of all requests.
    """
    activation, logits, scores = outputs
    last, request = index == len(cascade.caches), rows.request[: len(scores)]
    site = len(cascade.chain) if last else cascade.caches[index].site
    live = jnp.arange(len(scores)) < rows.alive
    hit = live & (scores >= (-jnp.inf if last else cascade.thresholds[index]))
    missed = live & ~hit
    target = jnp.where(hit, request, len(answer.exit))  # out of bounds, and so dropped, where it missed

    def put(column: Array | np.ndarray, values: Array) -> Array:
        return jnp.asarray(column).at[target].set(values, mode="drop")

    exits, scores, logits = put(answer.exit, jnp.int32(site)), put(answer.score, scores), put(answer.logits, logits)
    answer = Prediction(answer.class_index, exits, scores, logits)
    return _survivors(activation, request, missed), answer


def _tile(
    packed: Packed[BatchedCascade],
    which: tuple[int, int],
    rows: Rows,
    start: Int[Array, ""],
    number: Int[Array, ""],
    outputs: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """Run one tile of the size with index ``which[1]`` through stage ``which[0]``; write its rows into ``outputs``."""
    index, size_index = which
    batched = unpack(packed)  # here, and not outside the loop: see ``step``
    cascade, size = batched.cascades[size_index], batched.schedule.sizes[size_index]
    at = start + number * size
    tile = run_stage(cascade, index, rows.activation[jax.lax.dynamic_slice_in_dim(rows.position, at, size)])
    activation, logits, scores = outputs
    if index < len(cascade.caches):
        activation = jax.lax.dynamic_update_slice_in_dim(activation, tile.activation, at, 0)
        scores = jax.lax.dynamic_update_slice_in_dim(scores, tile.score, at, 0)
    return activation, jax.lax.dynamic_update_slice_in_dim(logits, tile.logits, at, 0), scores


def _survivors(
    activation: Shaped[Array, "capacity *site"], request: Int[Array, " capacity"], missed: Bool[Array, " capacity"]
) -> Rows:
    (position,) = jnp.nonzero(missed, size=len(missed), fill_value=0)
    position = position.astype(jnp.int32)
    return Rows(activation, position, request[position], jnp.sum(missed, dtype=jnp.int32))
