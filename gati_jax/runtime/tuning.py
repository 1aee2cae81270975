"""Tuning: which convolution algorithms, compiler options and tiles are fastest for a network on this device.

Algorithms are chosen per kind of layer by timing whole spans, as cuDNN chooses by timing: what surrounds a convolution
is fused into it, so that a layer timed alone says little. Compiler options belong to whole programs and are tried one
set after another. Nothing here looks at answers, but for one check: tuned logits must be the reference ones to within
``TOLERANCE`` of their range.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from gati_jax._errors import InputError
from gati_jax.models import Algorithm, Chain, Layer, ResNet, layers, with_algorithms

from .measure import device_name, time_interleaved
from .numerics import reference
from .options import Options, compiled
from .packing import Packed, pack, unpack

TOLERANCE = 1e-3
MARGIN = 0.03  # less is noise
MOST_TILES = 16  # each is one more loop in every span
_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
_OPTIONS: dict[str, tuple[Options, ...]] = {
    "cpu": (
        (),
        ((_LIBRARY, "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"),),  # convolutions by the compiler itself
        ((_LIBRARY, "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"),),
    )
}
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What is fastest for so many rows at once."""

    size: int
    milliseconds: float
    """The whole base."""
    options: Options
    algorithms: Mapping[str, Algorithm]
    """By kind of layer, where it is not the compiler's own convolution."""

    def __post_init__(self) -> None:
        """Refuse what would compile something else than tuning tried.

        Raises:
            InputError: A size or a time that cannot be, or options that tuning does not try.
        """
        if not (1 <= self.size <= 4096 and 0 < self.milliseconds < np.inf):  # noqa: PLR2004
            msg = f"tile: expected 1 to 4096 rows in a positive time, got {self.size} in {self.milliseconds}"
            raise InputError(msg)
        if not any(self.options == options for tried in _OPTIONS.values() for options in tried):
            msg = f"options: expected those that tuning tries, got {self.options}"
            raise InputError(msg)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was found on one device; smallest tile first."""

    device: str
    tiles: tuple[Tile, ...]

    def __post_init__(self) -> None:
        """Refuse a tuning without a tile for one request.

        Raises:
            InputError: Tiles that do not rise from 1.
        """
        sizes = [tile.size for tile in self.tiles]
        if sizes[:1] != [1] or sizes != sorted(set(sizes)) or len(sizes) > MOST_TILES:
            msg = f"tiles: expected up to {MOST_TILES} rising sizes from 1 on, got {sizes[: MOST_TILES + 1]}"
            raise InputError(msg)


def tune(chain: Chain, *, sizes: Sequence[int] = (1, 8, 16), rounds: int = 7) -> Tuning:
    """Find what is fastest on the default device; takes a minute or two.

    Args:
        chain: A residual network's, see ``to_chain``; of a user's own functions only tiles and options are tuned.
        sizes: Tile sizes to try; 1 is always among them.
        rounds: Interleaved repeats of every timing, of which the medians count.
    """
    tiles = []
    for size in sorted({1, *sizes}):
        tuned = [_tune_tile(chain, size, options, rounds) for options in _supported()]
        # Spans are short, and their times noisy: the whole network decides, also against no algorithm at all.
        plain = [dataclasses.replace(tile, algorithms={}) for tile in tuned if tile.algorithms]
        x = _inputs(chain, size)
        found = dict(enumerate((*tuned, *plain)))
        programs = {str(i): _program(tuned_chain(chain, tile), tile.options, x) for i, tile in found.items()}
        ms = {name: float(np.median(t)) for name, t in time_interleaved(programs, rounds=2 * rounds).items()}
        ranked = sorted(found, key=lambda i: ms[str(i)])
        best = next(i for i in ranked if not found[i].algorithms or _error(chain, found[i]) <= TOLERANCE)
        tiles.append(dataclasses.replace(found[best], milliseconds=ms[str(best)]))
        _log.info("tile of %d: %.2f ms, %s", size, ms[str(best)], dict(found[best].algorithms) or "direct")
    return Tuning(device=device_name(), tiles=tuple(tiles))


def tuned_chain(chain: Chain, tile: Tile) -> Chain:
    """Return the chain by a tile's algorithms."""
    return with_algorithms(chain, tile.algorithms) if isinstance(chain.network, ResNet) else chain


def _supported() -> list[Options]:
    """Return the options that this compiler knows."""
    known = []
    for options in _OPTIONS.get(jax.default_backend(), ((),)):
        try:
            jax.jit(lambda x: x + 1, compiler_options=dict(options) or None)(jnp.float32(0))
        except (jax.errors.JaxRuntimeError, ValueError, TypeError):
            continue  # another version's
        known.append(options)
    return known


def _tune_tile(chain: Chain, size: int, options: Options, rounds: int) -> Tile:
    """Choose algorithms one kind after another, the others as chosen so far."""
    choice: dict[str, Algorithm] = {}
    if isinstance(chain.network, ResNet):
        inputs = _activations(chain, size)
        for layer, block in _kinds(chain.network).items():
            here = {other.kind for blocks in layers(chain.network)[block : block + 2] for other in blocks}
            chosen: dict[str, Algorithm] = {kind: algorithm for kind, algorithm in choice.items() if kind in here}
            programs: dict[str, Callable[[], Array]] = {}
            for algorithm in layer.applicable:
                candidate: dict[str, Algorithm] = {**chosen, layer.kind: algorithm}
                tuned = with_algorithms(chain, candidate)
                programs[algorithm] = _program(_part(tuned, block, block + 2), options, inputs[block], classify=False)
            ms = {name: float(np.median(t)) for name, t in time_interleaved(programs, rounds=rounds).items()}
            best = min(layer.applicable, key=lambda name: ms[name])
            if ms[best] < (1 - MARGIN) * ms["direct"]:
                choice[layer.kind] = best
    return Tile(size=size, milliseconds=1.0, options=options, algorithms=choice)


def _kinds(network: ResNet) -> dict[Layer, int]:
    """Return one layer of every kind, with the index of a block that has it."""
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
    """Return the largest difference of logits, as a share of their range."""
    images = _inputs(chain, 16)
    expected, found = (np.asarray(jax.jit(Chain.__call__)(c, images)) for c in (chain, tuned_chain(chain, tile)))
    return float(np.abs(found - expected).max() / np.ptp(expected))


def _part(chain: Chain, start: int, stop: int) -> Chain:
    """Return some blocks as a chain of their own; nobody asks for its logits."""
    blocks = chain.blocks[start:stop]
    params = chain.params[start : start + len(blocks)]
    return Chain(blocks, chain.classifier, (*params, ()), chain.site_specs[start])


def _program(chain: Chain, options: Options, x: Array, *, classify: bool = True) -> Callable[[], Array]:
    """Return a compiled call of a chain."""
    return functools.partial(compiled(_run, options, static="classify"), pack(chain), x, classify=classify)


@reference
def _run(packed: Packed[Chain], x: Shaped[Array, "batch *site"], *, classify: bool) -> Array:
    chain = unpack(packed)
    return chain(x) if classify else chain.span(x, 0, len(chain))
