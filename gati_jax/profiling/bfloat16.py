"""A cascade in bfloat16: the base's blocks, and what is between them; caches and the classifier stay float32.

It is another arithmetic than the certified one by far more than last bits, and so has certificates of its own
(``certify_numerics``). They hold for the device and the compiler on which its answers were counted.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from gati_jax import __version__
from gati_jax.caches import Candidate, lookup
from gati_jax.caches.candidate import in_float32
from gati_jax.data import Images
from gati_jax.models import Chain, in_bfloat16
from gati_jax.models.chain import reference
from gati_jax.planning import ReplayTable
from gati_jax.pytrees import Packed, unpack
from gati_jax.runtime import Cascade, compiled

from .compiler import ROUNDED
from .costs import device_name
from .tuned_cascade import Tile, TunedCascade, Tuning

BFLOAT16 = "bfloat16"
"""What these numerics are called."""
_SIZES = (1, 8, 32)
_GPU_SIZES = (*_SIZES, 256)


def bfloat16_sizes() -> tuple[int, ...]:
    """Return how many rows run at once in bfloat16 on the default device.

    Certify rows are counted in these sizes and in no others: sums of another number of rows may have another order, and
    in bfloat16 one bit is 0.4 %.
    """
    return _GPU_SIZES if jax.default_backend() == "gpu" else _SIZES


def bfloat16_programs() -> str:
    """Return a digest of what decides on answers in bfloat16: device, compiler, and this library's version."""
    parts = BFLOAT16, device_name(), version("jaxlib"), __version__, bfloat16_sizes()
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def cascade_in_bfloat16(cascade: Cascade) -> Cascade:
    """Return a float32 cascade with its base in bfloat16; caches that read what a block gives compute in float32."""
    chain = in_bfloat16(cascade.chain)
    caches = tuple(
        in_float32(cache) if chain.site_specs[cache.site].dtype == jnp.bfloat16 else cache for cache in cascade.caches
    )
    return Cascade(chain, caches, cascade.thresholds)


def run_in_bfloat16(cascade: Cascade, tuning: Tuning | None = None) -> TunedCascade:
    """Return a float32 cascade as it answers in bfloat16.

    Args:
        cascade: Of a base and caches in float32.
        tuning: Of float32 on this device, for XLA. On a GPU its options are used, by which operations are launched, and
            the driver of single requests; those of batches run other numbers of rows than were counted.
    """
    tiles = [Tile(size=size, milliseconds=1.0, options=ROUNDED, algorithms={}) for size in bfloat16_sizes()]
    if tuning is not None and jax.default_backend() == "gpu":
        single, *larger = tuning.tiles
        options = next((tile.options for tile in larger if tile.driver == "loop"), ())
        tiles = [dataclasses.replace(tile, options=(*options, *ROUNDED)) for tile in tiles]
        tiles[0] = dataclasses.replace(tiles[0], options=(*single.options, *ROUNDED), driver=single.driver)
    found = Tuning(device=device_name(), tiles=tuple(tiles), jaxlib=version("jaxlib"))
    return TunedCascade(cascade_in_bfloat16(cascade), found)


def replays_in_bfloat16(
    table: ReplayTable, chain: Chain, caches: Sequence[Candidate], images: Images
) -> tuple[ReplayTable, ...]:
    """Return replays in bfloat16, for ``certify_numerics``: of images one by one, and in batches.

    Args:
        table: The reference replay of these caches and images.
        chain: The base, in float32.
        caches: In the order of their sites, as fitted.
        images: [n, ...].
    """
    packed, table = _cascade_of(chain, tuple(caches)).packed, table.take([cache.name for cache in caches])
    run, found = compiled(_every_output, ROUNDED), []
    for size in bfloat16_sizes():
        parts = []
        for start in range(0, len(images), size):
            rows = np.asarray(images[start : start + size])
            missing = [(0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
            parts.append(jax.device_get(run(packed, np.pad(rows, missing))))
        base, logits, scores = (np.concatenate(columns)[: len(images)] for columns in zip(*parts, strict=True))
        answers, classes = base.argmax(-1).astype(np.int32), logits.argmax(-1).astype(np.int32).T
        found.append(dataclasses.replace(table, answers=answers, classes=classes, scores=scores.T))
    return tuple(found)


def _cascade_of(chain: Chain, caches: tuple[Candidate, ...]) -> Cascade:
    return cascade_in_bfloat16(Cascade(chain, caches, jnp.full(len(caches), jnp.inf)))


@reference
def _every_output(
    packed: Packed[Cascade], images: Shaped[Array, "batch *input"]
) -> tuple[Float[Array, "batch classes"], Float[Array, "batch caches classes"], Float[Array, "batch caches"]]:
    """Return the base's logits, and the logits and scores of every cache."""
    cascade = unpack(packed)
    chain, x, at = cascade.chain, cascade.chain.prepare(images), 0
    found = []
    for cache in cascade.caches:
        x, at = chain.span(x, at, cache.site), cache.site
        found.append(lookup(cache, x))
    logits, scores = ([pair[i] for pair in found] for i in (0, 1))
    base = chain.classify(chain.span(x, at, len(chain)))
    none = jnp.zeros((len(images), 0))
    return (
        base.astype(jnp.float32),
        jnp.stack(logits, 1).astype(jnp.float32) if found else none[..., None] * base[:, None],
        jnp.stack(scores, 1) if found else none,
    )
