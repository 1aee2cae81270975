"""Probes: a few inputs show whether a chain is a function of single inputs, and which function it is.

Digests of parameters cannot tell tanh from relu, and a function that depends on the batch has no answers to agree with.
"""

import math
import re
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from gati_jax.data import Images
from gati_jax.errors import InputError

from .chain import ROWS, Chain, Normalization, check_is_chain, output_specs, reference

_COLUMNS = 32  # logits that are kept of each row
_NOISE = 1e-3  # of the logits' spread: true float32 differs by 1e-5 or so between batch sizes and machines
COARSE_NOISE = 5e-2
"""The same where values are rounded on the way, so that a last bit may become a step."""
_COARSE = re.compile(r"f16\[|f8_|i[48]\[|\bround\b|\bfloor\b|\bsign\b")  # in a printed program
_MANY = 256  # rows that are enough to see a base that always gives the same answer
_SAME = 0.99
_FEW = 100  # too few rows to call an answer the only one
_MAX_PIXEL = 255


class Probe(NamedTuple):
    """What a chain computes for fixed made-up inputs, by which another function of the same parameters is told."""

    logits: tuple[float, ...]
    """Of eight rows, at most 32 of each, to six digits."""
    tolerance: float
    """Logits that differ by more are another function's."""
    sites: tuple[tuple[float, ...], ...]
    """For each site behind the input, which is what caches see: a number of each row, then their tolerance."""


def probe_chain(chain: Chain) -> Probe:
    """Return the probe of a chain: the same on every machine, within its tolerance."""
    if "_probe" not in chain.__dict__:
        inputs = _made_up(chain)
        logits = _run(chain, inputs)
        columns = np.unique(np.linspace(0, logits.shape[1] - 1, _COLUMNS).round().astype(int))
        kept = tuple(float(f"{logit:.6g}") for logit in np.nan_to_num(logits[:, columns]).flat)
        noise = _noise(chain)
        sites = tuple(
            tuple(float(f"{v:.6g}") for v in (*row, max(noise * row.std(), 1e-5 * norm)))
            for row, norm in zip(*_projections(chain, inputs), strict=True)
        )
        chain.__dict__["_probe"] = Probe(kept, float(f"{_tolerance(chain, logits):.6g}"), sites)
    return chain.__dict__["_probe"]


def check_logits(chain: Chain) -> None:
    """Check, without running it, that a chain has parameters and gives logits[batch, classes].

    Raises:
        InputError: It has none, fails, or gives something else.
    """
    check_is_chain(chain)
    if not jax.tree.leaves(chain.params):
        raise InputError(
            "chain: expected parameters, got none: weights that blocks close over are neither saved nor compared;"
            " pass them as params"
        )
    output_specs(chain)


def check_chain(chain: Chain, images: Images | None = None) -> None:
    """Check, once for a chain, that its logits are finite and the same for a row alone as in a batch.

    Args:
        chain: The base.
        images: Some of what it is meant for, as ``check_images`` returns it; made-up rows are added to fewer than 8.

    Raises:
        InputError: They are not; or see ``check_logits``.
    """
    if "_checked" in chain.__dict__:
        return
    check_logits(chain)
    if chain.normalization is not None:
        _warn_of_constants(chain.normalization)
    inputs, own = _made_up(chain), 0
    if images is not None:
        rows = chain.prepare(images[_spread_rows(len(images), ROWS)])
        inputs, own = jnp.concatenate([rows, jnp.asarray(inputs, rows.dtype)])[:ROWS], len(rows)
    together = _run(chain, inputs)
    alone = np.concatenate([_run(chain, inputs[i : i + 1]) for i in range(ROWS)])
    if wrong := int((~np.isfinite(together))[:own].any(1).sum()):
        raise InputError(f"chain: expected finite logits, got NaN or infinity for {wrong} of {own} images")
    together, alone = np.nan_to_num(together), np.nan_to_num(alone)
    if (apart := np.abs(together - alone).max()) > _tolerance(chain, together):
        raise InputError(
            f"chain: expected the same logits for a row alone as in a batch of {ROWS}, got ones that differ by"
            f" {apart / together.std():.2g} of their spread: is batch norm or dropout in training mode?"
        )
    chain.__dict__["_checked"] = True


def warn_of_inputs(chain: Chain, images: Images) -> None:
    """Warn of prepared inputs that are not normalised, and of a base that gives nearly all of them the same answer.

    Args:
        chain: The base.
        images: What it is meant for, as ``check_images`` returns it.
    """
    rows = images[_spread_rows(len(images), _MANY)]
    if chain.normalization is not None and jnp.issubdtype(images.dtype, jnp.floating):
        _warn_of_range(chain.normalization, rows.astype(np.float32))
    if len(rows) < _FEW:
        return
    starts = range(0, len(rows) - ROWS + 1, ROWS)  # whole batches of a size that is compiled already
    answers = np.concatenate([_run(chain, chain.prepare(rows[i : i + ROWS])).argmax(1) for i in starts])
    answer, count = max(zip(*np.unique(answers, return_counts=True), strict=True), key=lambda pair: pair[1])
    if count > _SAME * len(answers):
        warnings.warn(
            f"chain: it answers class {answer} for {count} of {len(answers)} images, so any cache agrees with it: are"
            " its weights and the normalization right?",
            stacklevel=3,
        )


def _made_up(chain: Chain) -> Num[Array, "batch ..."]:
    """Return eight prepared inputs of noise, from a bit stream that NumPy keeps stable."""
    spec = chain.input_spec
    shape = (ROWS, *spec.shape)
    pixels = (np.random.PCG64(0).random_raw(math.prod(shape)) >> np.uint64(56)).astype(np.uint8).reshape(shape)
    if chain.normalization is not None:
        return chain.prepare(pixels)
    if jnp.issubdtype(spec.dtype, jnp.floating):
        return jnp.asarray((pixels + np.float32(0.5)) / np.float32(_MAX_PIXEL + 1), spec.dtype)
    return jnp.asarray(pixels if spec.dtype == jnp.uint8 else pixels % 2, spec.dtype)  # small enough for any vocabulary


def _spread_rows(n: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


@jax.jit
@reference
def _logits(chain: Chain, inputs: Num[Array, "batch ..."]) -> Num[Array, "batch classes"]:
    return chain(inputs)


def _run(chain: Chain, inputs: Num[Array, "batch ..."]) -> Float[np.ndarray, "batch classes"]:
    return np.asarray(_logits(chain, inputs)).astype(np.float64)


def _tolerance(chain: Chain, logits: Float[np.ndarray, "batch classes"]) -> float:
    """Return by how much logits of one function may differ between batch sizes and machines."""
    logits = np.nan_to_num(logits)
    return float(max(_noise(chain) * logits.std(), 1e-5 * np.abs(logits).max()))


def is_coarse(chain: Chain) -> bool:
    """Return whether a chain rounds values on the way, to half precision or to integers."""
    spec = jax.ShapeDtypeStruct((1, *chain.input_spec.shape), chain.input_spec.dtype)
    return bool(_COARSE.search(str(jax.make_jaxpr(Chain.__call__)(chain, spec))))


def _noise(chain: Chain) -> float:
    """Return by which share of their spread outputs of one function may differ."""
    return COARSE_NOISE if is_coarse(chain) else _NOISE


@jax.jit
@reference
def _projected(chain: Chain, inputs: Num[Array, "batch ..."]) -> list[tuple[Array, Array]]:
    """Return for each site behind the input the rows' sums with signs that are the same on every machine, and norms."""
    found = []
    for site in chain.activations(inputs)[0][1:]:
        rows = site.reshape(len(site), -1).astype(jnp.float32)
        bits = (jnp.arange(rows.shape[1], dtype=jnp.uint32) * jnp.uint32(2654435761)) >> jnp.uint32(31)
        signs = 1 - 2 * bits.astype(jnp.float32)
        found.append((rows @ signs, jnp.sqrt((rows * rows).sum(1)).max()))
    return found


def _projections(chain: Chain, inputs: Num[Array, "batch ..."]) -> tuple[list[np.ndarray], list[float]]:
    found = [(np.nan_to_num(np.asarray(rows, np.float64)), float(norm)) for rows, norm in _projected(chain, inputs)]
    return [rows for rows, _ in found], [float(np.nan_to_num(norm)) for _, norm in found]


def _warn_of_constants(normalization: Normalization) -> None:
    most = abs(normalization.scale) * _MAX_PIXEL
    for name in ("mean", "std"):
        values = getattr(normalization, name)
        if max(map(abs, values)) > 1.01 * most:
            warnings.warn(
                f"normalization.{name}: expected that of scaled pixels, at most 255 x scale = {most:.4g}, got {values}",
                stacklevel=4,
            )


def _warn_of_range(normalization: Normalization, rows: Float[np.ndarray, "n ..."]) -> None:
    """Warn of float inputs that cannot be normalised images: far outside of their range, or only above their mean."""
    mean, std = np.array(normalization.mean), np.array(normalization.std)
    low, high = float((-mean / std).min()), float(((_MAX_PIXEL * normalization.scale - mean) / std).max())
    least, most, width = float(rows.min()), float(rows.max()), high - low
    outside = least < low - width or most > high + width
    if outside or (least >= 0 > low) or most - least < width / 20:
        warnings.warn(
            f"images: expected inputs normalised by mean {normalization.mean} and std {normalization.std}, which lie in"
            f" {low:.3g} .. {high:.3g}, got floats in {least:.3g} .. {most:.3g}; only uint8 pixels are normalised here",
            stacklevel=4,
        )
