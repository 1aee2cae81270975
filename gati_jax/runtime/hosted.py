"""The driver in which the host decides: it launches one stage after another, and reads only how many rows are left.

While that number is on its way, the device writes the answers of the rows that leave, and compacts the others. A single
request goes on with the next stage meanwhile; if it has left, that stage is thrown away.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from gati_jax.models.chain import reference
from gati_jax.pytrees import Packed, unpack

from .batched import Rows, check_count, first_rows, leave
from .branches import levels, run_rows
from .cascade import Cascade, CompilerOptions, Prediction, compiled


def predict_hosted(
    cascade: Cascade, images: Shaped[Array | np.ndarray, "batch *input"], count: int, options: CompilerOptions = ()
) -> Prediction:
    """Answer a batch by a program for each stage and number of rows in ``levels``.

    Arguments and errors as for ``predict_nested``.
    """
    packed, last, size = cascade.packed, len(cascade.caches), len(images)
    run = compiled(_run, options, static=("index", "size"))
    rows, answer = compiled(_first, options)(packed, images, check_count(count, images))
    outputs, left = run(packed, rows, index=0, size=size)
    for index in range(last + 1):
        left.copy_to_host_async()
        rows, answer = compiled(_leave, options, static=("index",))(packed, rows, outputs, answer, index=index)
        if index == last:
            break
        ahead = run(packed, rows, index=index + 1, size=1) if size == 1 else None
        if not (alive := int(left)):
            break
        size = next(level for level in levels(len(images)) if level >= alive)
        outputs, left = ahead or run(packed, rows, index=index + 1, size=size)
    return answer


def _first(
    packed: Packed[Cascade], images: Shaped[Array, "batch *input"], count: Int[Array, ""]
) -> tuple[Rows, Prediction]:
    return first_rows(unpack(packed), images, count, len(images))


@reference
def _run(packed: Packed[Cascade], rows: Rows, *, index: int, size: int) -> tuple[tuple[Array, Array, Array], Array]:
    """Run a stage; also return how many rows are left behind it."""
    cascade = unpack(packed)
    outputs = run_rows(cascade, index, size, rows)
    if index == len(cascade.caches):
        return outputs, jnp.int32(0)
    misses = (jnp.arange(size) < rows.alive) & (outputs[2] < cascade.thresholds[index])
    return outputs, jnp.sum(misses, dtype=jnp.int32)


def _leave(
    packed: Packed[Cascade], rows: Rows, outputs: tuple[Array, Array, Array], answer: Prediction, *, index: int
) -> tuple[Rows, Prediction]:
    rows, answer = leave(unpack(packed), index, rows, outputs, answer)
    return rows, answer._replace(class_index=jnp.argmax(answer.logits, -1).astype(jnp.int32))
