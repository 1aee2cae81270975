"""Drivers without loops: every decision is a two-way branch, so that a GPU may take all of them by itself.

XLA runs a loop or a branch of a GPU from the host, with a synchronisation for each decision, unless all operations
inside can be captured in a CUDA graph. Whether captured branches or captured loops are faster, tuning finds out; see
``DRIVERS`` in ``gati_jax/profiling/compiler.py``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from gati_jax.models.chain import reference
from gati_jax.pytrees import Packed, unpack

from .batched import Rows, check_count, first_rows, leave
from .cascade import Cascade, CompilerOptions, Prediction, compiled, run_stage

_LEVELS = 4  # copies of the network in a program


def levels(batch: int) -> tuple[int, ...]:
    """Return the numbers of rows, rising, in which a stage of a batch may run: the batch, a half, a quarter, an eighth.

    Example:
        >>> levels(64), levels(1)
        ((8, 16, 32, 64), (1,))
    """
    return tuple(sorted({max(1, batch >> i) for i in range(_LEVELS)}))


def predict_nested(
    cascade: Cascade, images: Shaped[Array | np.ndarray, "batch *input"], count: int, options: CompilerOptions = ()
) -> Prediction:
    """Answer a batch in one program of two-way branches.

    Args:
        cascade: See ``Cascade``.
        images: uint8 or prepared inputs; one program is compiled for each length.
        count: How many of them, the first, are requests; the others are padding and get no answer.
        options: Compiler options of the program.

    Raises:
        InputError: See ``check_count``.
    """
    requests = check_count(count, images)
    if len(images) == 1:
        return compiled(answer_one_nested, options)(cascade.packed, images)
    return compiled(answer_nested, options)(cascade.packed, images, requests)


@reference
def answer_one_nested(packed: Packed[Cascade], images: Shaped[Array, "1 *input"]) -> Prediction:
    """Answer a batch of one: each stage is a branch inside of the one before it. To be traced."""
    return _rest(packed, 0, unpack(packed).chain.prepare(images))


def _rest(packed: Packed[Cascade], index: int, x: Shaped[Array, "1 *site"]) -> Prediction:
    """Run stage ``index``, and behind a miss the rest."""
    cascade = unpack(packed)  # in every branch anew: see ``step``
    stage = run_stage(cascade, index, x)
    site = (*cascade.sites, len(cascade.chain))[index]
    here = Prediction(
        jnp.argmax(stage.logits, -1).astype(jnp.int32), jnp.full(1, site, jnp.int32), stage.score, stage.logits
    )
    if index == len(cascade.caches):
        return here
    hit = stage.score[0] >= cascade.thresholds[index]
    return jax.lax.cond(hit, lambda _: here, lambda x: _rest(packed, index + 1, x), stage.activation)


@reference
def answer_nested(packed: Packed[Cascade], images: Shaped[Array, "batch *input"], count: Int[Array, ""]) -> Prediction:
    """Answer the first ``count`` rows of a batch. To be traced.

    Every stage runs the smallest of ``levels`` that holds the rows which are left, or nothing.
    """
    cascade, batch = unpack(packed), len(images)
    rows, answer = first_rows(cascade, images, count, batch)
    for index in range(len(cascade.caches) + 1):
        nothing = jax.tree.map(
            lambda v: jnp.zeros(v.shape, v.dtype), jax.eval_shape(functools.partial(_run, packed, index, batch), rows)
        )
        some = functools.partial(_fitting, packed, index, levels(batch))
        outputs = jax.lax.cond(rows.alive == 0, lambda _, nothing=nothing: nothing, some, rows)
        rows, answer = leave(cascade, index, rows, outputs, answer)
    return answer._replace(class_index=jnp.argmax(answer.logits, -1).astype(jnp.int32))


def _fitting(packed: Packed[Cascade], index: int, sizes: tuple[int, ...], rows: Rows) -> tuple[Array, Array, Array]:
    """Run a stage on the smallest of rising ``sizes`` that holds the rows which are left."""
    smallest, larger = functools.partial(_run, packed, index, sizes[0]), sizes[1:]
    if not larger:
        return smallest(rows)
    return jax.lax.cond(rows.alive <= sizes[0], smallest, functools.partial(_fitting, packed, index, larger), rows)


def _run(packed: Packed[Cascade], index: int, size: int, rows: Rows) -> tuple[Array, Array, Array]:
    """Run a stage on the first ``size`` rows; return its outputs in buffers for all."""
    full = len(rows.position)
    outputs = run_rows(unpack(packed), index, size, rows)
    return jax.tree.map(lambda v: jnp.pad(v, [(0, full - size)] + [(0, 0)] * (v.ndim - 1)), outputs)


def run_rows(cascade: Cascade, index: int, size: int, rows: Rows) -> tuple[Array, Array, Array]:
    """Run a stage on the first ``size`` of the rows that are left; return activations, logits and scores."""
    stage = run_stage(cascade, index, rows.activation[rows.position[:size]])
    activation = jnp.zeros(size) if index == len(cascade.caches) else stage.activation  # nothing comes behind it
    return activation, stage.logits, stage.score
