"""Tunings: which convolution algorithms, compiler options and tiles were found fastest on a device."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from gati_jax._errors import InputError
from gati_jax.caches import Candidate, Network, network_with_algorithms
from gati_jax.models import Algorithm, Architecture, Chain, with_algorithms
from gati_jax.planning import CostTable

from .cascade import Cascade
from .options import Options

MOST_TILES = 16  # each is one more loop in every span
MOST_ROWS = 4096
_GRAPHS = "xla_gpu_enable_command_buffer"
_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
OPTIONS: dict[str, tuple[Options, ...]] = {
    "cpu": (
        (),
        ((_LIBRARY, "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"),),  # convolutions by the compiler itself
        ((_LIBRARY, "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"),),
    ),
    "gpu": (  # loops and branches captured as CUDA graphs, or driven by the host
        (),
        ((_GRAPHS, "FUSION,CUBLAS,CUDNN,CONDITIONAL,WHILE"),),
    ),
}
"""Those that tuning tries, by platform."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What is fastest for so many rows at once."""

    size: int
    milliseconds: float
    """The whole base."""
    options: Options
    algorithms: Mapping[str, Algorithm]
    """By kind of layer, where it is not the compiler's own convolution."""
    costs: CostTable | None = None
    """Of the bundle's spans and lookups, see ``measure_costs``."""

    def __post_init__(self) -> None:
        """Refuse what would compile something else than tuning tried.

        Raises:
            InputError: A size or a time that cannot be, or options that tuning does not try.
        """
        if not (1 <= self.size <= MOST_ROWS and 0 < self.milliseconds < np.inf):
            msg = f"tile: expected 1 to {MOST_ROWS} rows in a positive time, got {self.size} in {self.milliseconds}"
            raise InputError(msg)
        if not any(self.options == options for tried in OPTIONS.values() for options in tried):
            msg = f"options: expected those that tuning tries, got {self.options}"
            raise InputError(msg)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was found on one device; smallest tile first."""

    device: str
    tiles: tuple[Tile, ...]
    jaxlib: str = ""
    """The compiler's version: another one may not know these options, or be faster without them."""

    def __post_init__(self) -> None:
        """Refuse a tuning without a tile for one request.

        Raises:
            InputError: Tiles that do not rise from 1.
        """
        sizes = [tile.size for tile in self.tiles]
        if sizes[:1] != [1] or sizes != sorted(set(sizes)) or len(sizes) > MOST_TILES:
            msg = f"tiles: expected up to {MOST_TILES} rising sizes from 1 on, got {sizes[: MOST_TILES + 1]}"
            raise InputError(msg)


def tuned_chain(chain: Chain, tile: Tile) -> Chain:
    """Return the chain by a tile's algorithms."""
    return with_algorithms(chain, tile.algorithms) if isinstance(chain.network, Architecture) else chain


def tuned_cascade(cascade: Cascade, tile: Tile) -> Cascade:
    """Return the cascade, its base and the small networks among its caches, by a tile's algorithms."""
    caches = tuple(tuned_cache(cache, tile) for cache in cascade.caches)
    return Cascade(tuned_chain(cascade.chain, tile), caches, cascade.thresholds)


def tuned_cache(cache: Candidate, tile: Tile) -> Candidate:
    """Return a cache, if it is a small network by a tile's algorithms."""
    if not isinstance(cache.predictor, Network):
        return cache
    predictor, variables = network_with_algorithms(cache.predictor, cache.params["predictor"], tile.algorithms)
    return dataclasses.replace(cache, predictor=predictor, params={**cache.params, "predictor": variables})
