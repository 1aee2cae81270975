"""The search for the fastest algorithms, compiler options and tiles.

Algorithms are chosen for each kind of layer by timing spans of blocks: the compiler fuses a convolution with its
surroundings, so a layer timed alone says little. Compiler options belong to whole programs and are tried one set after
another. One program runs all tiles of a batch, so tiles larger than 1 are tuned, timed and run under the same options;
the tile of 1 has its own, for a single request has a program of its own. Only one check concerns answers: tuned logits
must equal the reference to within ``TOLERANCE`` of their range.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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
from gati_jax.runtime import Cascade, CompilerOptions

from .compiler import DRIVERS, OPTIONS, known_options
from .costs import Call, device_name, prefix_program, time_interleaved
from .tuned_cascade import MOST_ROWS, MOST_TILES, Tile, TunedCascade, Tuning, tuned_chain

TOLERANCE = 1e-3
_MARGIN = 0.03  # less is noise
_NOTABLE = 1.2  # times faster, from where on other programs than the reference are worth their other arithmetic
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
    tiles = _driven(chain, caches, [_tuned(networks, start, rounds) for start in starts], rounds)
    # Minutes passed between the first and the last; times that are compared must be measured together.
    ms = _time_networks((chain,), tiles, 3 * rounds)[:, 0]
    together = [dataclasses.replace(tile, milliseconds=float(t)) for tile, t in zip(tiles, ms, strict=True)]
    return Tuning(device=device_name(), tiles=tuple(together), jaxlib=version("jaxlib"))


def reference_tuning(sizes: Sequence[int] = (1,)) -> Tuning:
    """Return the tuning that stands for the reference programs, without times."""
    tiles = tuple(Tile(size=size, milliseconds=1.0, options=(), algorithms={}) for size in sorted({1, *sizes}))
    return Tuning(device=device_name(), tiles=tiles, jaxlib=version("jaxlib"))


def probe(chain: Chain, caches: Sequence[Candidate] = (), *, sizes: Sequence[int] = (1,), rounds: int = 5) -> Tuning:
    """Find the best of a few programs for whole networks, without a search; takes seconds, most of them to compile.

    The reference program is one of them, and is preferred to those that are hardly faster. Arguments and errors as for
    ``tune``.
    """
    networks, tiles = _networks(chain, caches), []
    for plain in reference_tuning(sizes).tiles:
        _log.info("trying programs of the whole network for batches of %d", plain.size)
        (start,) = _starts(networks, (plain.size,), rounds)
        ms = _time_networks(networks, (start, plain), 2 * rounds).sum(1)
        right = all(_error(network, start) <= TOLERANCE for network in networks)
        best = 0 if right and ms[0] * _NOTABLE < ms[1] else 1
        tiles.append(dataclasses.replace((start, plain)[best], milliseconds=float(ms[best])))
    return Tuning(device=device_name(), tiles=tuple(tiles), jaxlib=version("jaxlib"))


def _networks(chain: Chain, caches: Sequence[Candidate]) -> tuple[Chain, ...]:
    """Return the base and the small networks among the caches."""
    small = [(c.predictor.network, c.params["predictor"]) for c in caches if isinstance(c.predictor, Network)]
    return (chain, *(to_chain(network, variables["params"]["network"]) for network, variables in small))


def _starts(networks: Sequence[Chain], sizes: Sequence[int], rounds: int) -> list[Tile]:
    """Return the best start for each size, under the options that are best for all of them together.

    Sizes have equal weights, however long they take: the product of their times decides.
    """
    supported, uniform = _supported(), _uniform(networks)
    starts = [Tile(size=1, milliseconds=1.0, options=o, algorithms=choice) for o in supported for choice in uniform]
    tiles = [[dataclasses.replace(start, size=size) for start in starts] for size in sizes]
    times = np.stack([_time_networks(networks, row, rounds).sum(1) for row in tiles])
    ms = times.reshape(len(sizes), len(supported), len(uniform))
    best = int(np.argmin(np.log(ms.min(2)).sum(0)))
    return [row[best * len(uniform) + int(np.argmin(of[best]))] for row, of in zip(tiles, ms, strict=True)]


def _tuned(networks: Sequence[Chain], start: Tile, rounds: int) -> Tile:
    """Return a tile with the best algorithms under its options."""
    # Spans are short, and their times noisy: the times of whole networks decide in the end.
    refine = jax.default_backend() == "cpu"
    tiles = [dataclasses.replace(start, algorithms=_refine(networks, start, rounds))] if refine else []
    tiles += [start]
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
        f"{i} {j}": _program(tuned_chain(network, tile), _inputs(network, tile.size), tile.options)
        for i, tile in enumerate(tiles)
        for j, network in enumerate(networks)
    }
    ms = _medians(programs, rounds)
    return np.reshape([ms[name] for name in programs], (len(tiles), len(networks)))


def _medians(programs: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """Return the median times of programs that take turns; infinite for those that fail, of which one warning tells.

    A compiler may take an option, and what it makes of it fail when it runs: on GPUs a graph that cannot be captured.

    Raises:
        JaxRuntimeError: All of them fail.
    """
    running, errors = dict(programs), []
    for name, call in programs.items():
        try:
            for _ in range(2):  # a graph is captured when it runs again
                jax.block_until_ready(call())
        except jax.errors.JaxRuntimeError as error:
            errors.append(error)
            del running[name]
    if not running:
        raise errors[0]
    if errors:
        _log.warning("%d of %d programs fail and are left out: %.200s", len(errors), len(programs), errors[0])
    times = time_interleaved(running, rounds=rounds)
    return {name: float(np.median(times[name])) if name in times else np.inf for name in programs}


def _supported() -> list[CompilerOptions]:
    """Return the sets of options that this compiler knows; each as far as it does."""
    known: list[CompilerOptions] = []
    for options in OPTIONS.get(jax.default_backend(), ((),)):
        with contextlib.suppress(InputError):  # another version's
            known.append(known_options(options, jax.default_backend()))
    return list(dict.fromkeys(known))


def _driven(chain: Chain, caches: Sequence[Candidate], tiles: Sequence[Tile], rounds: int) -> list[Tile]:
    """Return tiles with the drivers that are best for the cascade of these caches; all tiles above 1 get the same.

    Two extremes stand for all requests: that all leave at the first cache, and that none leaves before the base. Both
    have equal weights, as sizes have.
    """
    at_sites = {cache.site: cache for cache in caches if cache.previous is None}
    drivers = DRIVERS.get(jax.default_backend(), ())
    if not drivers or not at_sites:
        return [*tiles]
    found: list[Tile] = []
    for group in ([tile for tile in tiles if tile.size == 1], [tile for tile in tiles if tile.size > 1]):
        choices = [group]
        for driver, options in drivers:
            with contextlib.suppress(InputError):  # what this compiler does not have is not tried
                known = known_options(options, jax.default_backend())
                choices.append([dataclasses.replace(tile, driver=driver, options=known) for tile in group])
        found += _fastest_driver(chain, [at_sites[site] for site in sorted(at_sites)], choices, rounds) if group else []
    return found


def _fastest_driver(
    chain: Chain, caches: Sequence[Candidate], choices: Sequence[Sequence[Tile]], rounds: int
) -> Sequence[Tile]:
    """Return the choice whose cascades answer batches as large as their tiles fastest."""
    programs: dict[str, Call] = {}
    for i, tiles in enumerate(choices):
        for tile in tiles:
            images = np.asarray(_inputs(chain, tile.size))
            for threshold in (-np.inf, np.inf):
                cascade = Cascade(chain, tuple(caches), jnp.full(len(caches), threshold, jnp.float32))
                single = dataclasses.replace(tile, size=1)
                tuning = Tuning(device=device_name(), tiles=(single,) if tile.size == 1 else (single, tile))
                predict = TunedCascade(cascade, tuning).predict
                programs[f"{i} {tile.size} {threshold}"] = lambda predict=predict, images=images: predict(images).logits
    times, per_choice = _medians(programs, rounds), len(programs) // len(choices)
    ms = np.log([times[name] for name in programs]).reshape(len(choices), per_choice).sum(1)
    best = int(np.argmin(ms))
    for tile in choices[best]:
        _log.info("batches of %d are driven by: %s %s", tile.size, tile.driver, dict(tile.options) or "")
    return choices[best]


def _refine(networks: Sequence[Chain], start: Tile, rounds: int) -> dict[str, Algorithm]:
    """Choose the algorithm of one kind of layer after another, with the others as chosen so far."""
    choice, known = dict(start.algorithms), set[str]()
    for chain in networks:
        if not isinstance(chain.network, Architecture):
            continue
        inputs, _ = jax.jit(Chain.activations)(chain, _inputs(chain, start.size))
        for index, layer in [(i, layer) for i, block in enumerate(layers(chain.network)) for layer in block]:
            if layer.kind not in known:
                known.add(layer.kind)
                tile = dataclasses.replace(start, algorithms=choice)
                choice[layer.kind] = _fastest(chain, layer, index, inputs[index], tile, rounds)
    return {kind: algorithm for kind, algorithm in choice.items() if algorithm != "direct"}


def _fastest(chain: Chain, layer: Layer, block: int, x: Array, tile: Tile, rounds: int) -> Algorithm:
    """Return the fastest algorithm of a layer in the span of two blocks that starts with its own."""
    here = {other.kind for blocks in layers(chain.network)[block : block + 2] for other in blocks}
    chosen: dict[str, Algorithm] = {kind: choice for kind, choice in tile.algorithms.items() if kind in here}
    programs: dict[str, Callable[[], Array]] = {}
    for algorithm in layer.applicable:
        tuned = with_algorithms(chain, {**chosen, layer.kind: algorithm})
        blocks = tuned.blocks[block : block + 2]
        params = tuned.params[block : block + len(blocks)]
        part = Chain(blocks, _flatten, (*params, ()), chain.site_specs[block])
        programs[algorithm] = _program(part, x, tile.options)
    ms = _medians(programs, rounds)
    best, now = min(layer.applicable, key=lambda name: ms[name]), tile.algorithms.get(layer.kind, "direct")
    return best if ms[best] < (1 - _MARGIN) * ms[now] else now


def _inputs(chain: Chain, size: int) -> Float[Array, "size *input"]:
    spec = chain.input_spec
    return jnp.asarray(np.random.default_rng(0).standard_normal((size, *spec.shape)), spec.dtype)


def _error(chain: Chain, tile: Tile) -> float:
    """Return the largest difference between a tile's logits and the reference, as a share of their range."""
    images = _inputs(chain, 16)
    expected = np.asarray(_program(chain, images)())
    found = np.asarray(_program(tuned_chain(chain, tile), images, tile.options)())
    return float(np.abs(found - expected).max() / np.ptp(expected))


def _flatten(_: object, x: Array) -> Array:
    """Return the end of a span in the shape of logits, which takes no time."""
    return x.reshape(len(x), -1)


def _program(chain: Chain, x: Array, options: CompilerOptions = ()) -> Callable[[], Array]:
    return prefix_program(chain, len(chain), x, options)
