"""The search for the fastest algorithms, compiler options and tiles.

Algorithms are chosen for each kind of layer by timing spans of blocks: the compiler fuses a convolution with its
surroundings, so a layer timed alone says little. Compiler options belong to whole programs and are tried one set after
another. One program runs all tiles of a batch, so tiles larger than 1 are tuned, timed and run under the same options;
the tile of 1 has its own, for a single request has a program of its own. Only one check concerns answers: tuned logits
must equal the reference to within ``TOLERANCE`` of their range.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from gati_jax.caches import Candidate, Network
from gati_jax.errors import InputError
from gati_jax.models import (
    Algorithm,
    Architecture,
    Chain,
    Layer,
    layers,
    to_chain,
    winograd_where_wide,
    with_algorithms,
)
from gati_jax.models.chain import reference
from gati_jax.runtime.compilation import CompilerOptions, Packed, compiled, pack, unpack

from .costs import device_name, time_interleaved
from .tuned_cascade import MOST_ROWS, MOST_TILES, OPTIONS, Tile, Tuning, tuned_chain

TOLERANCE = 1e-3
_MARGIN = 0.03  # less is noise
_log = logging.getLogger(__name__)


def tune(
    chain: Chain, caches: Sequence[Candidate] = (), *, sizes: Sequence[int] = (1, 8, 16), rounds: int = 7
) -> Tuning:
    """Find what is fastest on the default device; takes a minute or two.

    Args:
        chain: The base; of a chain that is no ``ResNet`` or ``VGG`` only tiles and options are tuned.
        caches: Its caches; small networks among them are tuned along with it.
        sizes: Tile sizes to try; 1 is always among them.
        rounds: Interleaved repeats of every timing, of which the medians are taken.

    Returns:
        The tuning, for ``save_tuning``.

    Raises:
        InputError: There are too many sizes, or one is out of range.
    """
    networks, larger = _networks(chain, caches), sorted({*sizes} - {1})
    if len(larger) >= MOST_TILES or not all(1 < size <= MOST_ROWS for size in larger):
        raise InputError(
            f"sizes: expected up to {MOST_TILES} of 1 to {MOST_ROWS} rows, 1 among them, got {list(sizes)}"
        )
    starts = [start for group in ((1,), larger) if group for start in _starts(networks, group, rounds)]
    tiles = [_tuned(networks, start, rounds) for start in starts]
    # Minutes passed between the first and the last; times that are compared must be measured together.
    ms = _time_networks((chain,), tiles, 3 * rounds)[:, 0]
    together = [dataclasses.replace(tile, milliseconds=float(t)) for tile, t in zip(tiles, ms, strict=True)]
    return Tuning(device=device_name(), tiles=tuple(together), jaxlib=version("jaxlib"))


def tune_tile(chain: Chain, caches: Sequence[Candidate], size: int, *, rounds: int = 7) -> Tile:
    """Find what is fastest for ``size`` rows in a program of their own; arguments as for ``tune``."""
    networks = _networks(chain, caches)
    (start,) = _starts(networks, (size,), rounds)
    return _tuned(networks, start, rounds)


def _networks(chain: Chain, caches: Sequence[Candidate]) -> tuple[Chain, ...]:
    """Return the base and the small networks among the caches."""
    return (chain, *(_chain_of(cache) for cache in caches if isinstance(cache.predictor, Network)))


def _starts(networks: Sequence[Chain], sizes: Sequence[int], rounds: int) -> list[Tile]:
    """Return the best start for each size, under the options that are best for all of them together.

    Sizes have equal weights, however long they take: the product of their times decides.
    """
    supported, uniform = _supported(), _uniform(networks)
    tiles = [
        [
            Tile(size=size, milliseconds=1.0, options=options, algorithms=algorithms)
            for options in supported
            for algorithms in uniform
        ]
        for size in sizes
    ]
    times = np.stack([_time_networks(networks, row, rounds).sum(1) for row in tiles])
    ms = times.reshape(len(sizes), len(supported), len(uniform))
    best = int(np.argmin(np.log(ms.min(2)).sum(0)))
    return [row[best * len(uniform) + int(np.argmin(of[best]))] for row, of in zip(tiles, ms, strict=True)]


def _tuned(networks: Sequence[Chain], start: Tile, rounds: int) -> Tile:
    """Return a tile with the best algorithms under its options."""
    # Spans are short, and their times noisy: the times of whole networks decide in the end.
    refined = [dataclasses.replace(start, algorithms=_refine(networks, start, rounds))]
    tiles = [*(refined if jax.default_backend() == "cpu" else ()), start]
    tiles += [dataclasses.replace(start, algorithms={})] if start.algorithms else []
    ms = _time_networks(networks, tiles, 2 * rounds)
    ranked = np.argsort(ms.sum(1), kind="stable")
    best = next(i for i in ranked if all(_error(network, tiles[i]) <= TOLERANCE for network in networks))
    _log.info("tile of %d: %.2f ms, %s", start.size, ms[best, 0], dict(tiles[best].algorithms) or "direct")
    return dataclasses.replace(tiles[best], milliseconds=float(ms[best, 0]))


def _uniform(networks: Sequence[Chain]) -> list[dict[str, Algorithm]]:
    """Return the choices to start from: only the compiler's algorithm, or Winograd's in all wide layers."""
    if jax.default_backend() != "cpu":
        return [{}]  # there the compiler's library chooses
    wide: dict[str, Algorithm] = {}
    for chain in networks:
        wide |= winograd_where_wide(chain.network) if isinstance(chain.network, Architecture) else {}
    return [{}, wide] if wide else [{}]


def _time_networks(
    networks: Sequence[Chain], tiles: Sequence[Tile], rounds: int
) -> Float[np.ndarray, "tiles networks"]:
    """Return the median times of whole networks, all taking turns."""
    programs = {
        f"{i} {j}": _program(tuned_chain(network, tile), tile.options, _inputs(network, tile.size))
        for i, tile in enumerate(tiles)
        for j, network in enumerate(networks)
    }
    ms = [float(np.median(t)) for t in time_interleaved(programs, rounds=rounds).values()]
    return np.reshape(ms, (len(tiles), len(networks)))


def _chain_of(cache: Candidate) -> Chain:
    """Return a cache's small network as a chain."""
    return to_chain(cache.predictor.network, cache.params["predictor"]["params"]["network"])


def _supported() -> list[CompilerOptions]:
    """Return the sets of options that this compiler knows."""
    known = []
    for options in OPTIONS.get(jax.default_backend(), ((),)):
        try:
            jax.jit(lambda x: x + 1, compiler_options=dict(options) or None)(jnp.float32(0))
        except (jax.errors.JaxRuntimeError, ValueError, TypeError):
            continue  # another version's
        known.append(options)
    return known


def _refine(networks: Sequence[Chain], start: Tile, rounds: int) -> dict[str, Algorithm]:
    """Choose the algorithm of one kind of layer after another, with the others as chosen so far."""
    choice = dict(start.algorithms)
    known: set[str] = set()
    for chain in networks:
        if not isinstance(chain.network, Architecture):
            continue
        inputs = _activations(chain, start.size)
        for layer, block in _kinds(chain.network).items():
            if layer.kind not in known:
                known.add(layer.kind)
                options = start.options
                choice[layer.kind] = _fastest(
                    chain, layer, block, inputs[block], choice=choice, options=options, rounds=rounds
                )
    return {kind: algorithm for kind, algorithm in choice.items() if algorithm != "direct"}


def _fastest(
    chain: Chain,
    layer: Layer,
    block: int,
    x: Array,
    *,
    choice: Mapping[str, Algorithm],
    options: CompilerOptions,
    rounds: int,
) -> Algorithm:
    """Return the fastest algorithm of a layer in the span of two blocks that starts with its own."""
    here = {other.kind for blocks in layers(chain.network)[block : block + 2] for other in blocks}
    chosen: dict[str, Algorithm] = {kind: algorithm for kind, algorithm in choice.items() if kind in here}
    programs: dict[str, Callable[[], Array]] = {}
    for algorithm in layer.applicable:
        tuned = with_algorithms(chain, {**chosen, layer.kind: algorithm})
        programs[algorithm] = _program(_part(tuned, block, block + 2), options, x, classify=False)
    ms = {name: float(np.median(t)) for name, t in time_interleaved(programs, rounds=rounds).items()}
    best, now = min(layer.applicable, key=lambda name: ms[name]), choice.get(layer.kind, "direct")
    return best if ms[best] < (1 - _MARGIN) * ms[now] else now


def _kinds(network: Architecture) -> dict[Layer, int]:
    """Return the first layer of every kind, with the index of its block."""
    first: dict[str, tuple[Layer, int]] = {}
    for index, block in enumerate(layers(network)):
        for layer in block:
            first.setdefault(layer.kind, (layer, index))
    return dict(first.values())


def _inputs(chain: Chain, size: int) -> Float[Array, "size *input"]:
    spec = chain.input_spec
    return jnp.asarray(np.random.default_rng(0).standard_normal((size, *spec.shape)), spec.dtype)


def _activations(chain: Chain, size: int) -> list[Array]:
    return jax.jit(Chain.activations)(chain, _inputs(chain, size))[0]


def _error(chain: Chain, tile: Tile) -> float:
    """Return the largest difference between a tile's logits and the reference, as a share of their range."""
    images = _inputs(chain, 16)
    expected = np.asarray(_program(chain, (), images)())
    found = np.asarray(_program(tuned_chain(chain, tile), tile.options, images)())
    return float(np.abs(found - expected).max() / np.ptp(expected))


def _part(chain: Chain, start: int, stop: int) -> Chain:
    """Return some blocks as a chain, whose classifier is never run."""
    blocks = chain.blocks[start:stop]
    params = chain.params[start : start + len(blocks)]
    return Chain(blocks, chain.classifier, (*params, ()), chain.site_specs[start])


def _program(chain: Chain, options: CompilerOptions, x: Array, *, classify: bool = True) -> Callable[[], Array]:
    """Return a compiled call of a chain."""
    return functools.partial(compiled(_run, options, static=("classify",)), pack(chain), x, classify=classify)


@reference
def _run(packed: Packed[Chain], x: Shaped[Array, "batch *site"], *, classify: bool) -> Array:
    chain = unpack(packed)
    return chain(x) if classify else chain.span(x, 0, len(chain))
