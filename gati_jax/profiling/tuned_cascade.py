"""A tuned cascade: with the algorithms, compiler options and tiles that were found fastest on this device."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from gati_jax import __version__
from gati_jax.caches import Candidate, Network, network_with_algorithms
from gati_jax.certification import ArithmeticCheck
from gati_jax.errors import InputError
from gati_jax.models import Algorithm, Architecture, Chain, layers, with_algorithms
from gati_jax.planning import CostTable
from gati_jax.runtime import CompilerOptions
from gati_jax.runtime.batched import BatchedCascade, Schedule, predict_tiled
from gati_jax.runtime.branches import predict_nested
from gati_jax.runtime.cascade import Cascade, Prediction, predict_one, predict_only
from gati_jax.runtime.hosted import predict_hosted

from .compiler import OPTIONS, ROUNDED, Driver, are_tried
from .costs import Backend, measure_costs, measure_steadily

LARGEST_BUCKET = 256  # rows in one program
MOST_TILES = 16  # each is one more loop in every span
MOST_ROWS = 4096
_WORD = re.compile(r"[\w.+-]{0,120}", re.ASCII)  # they are shown, and come from files of others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """What was found fastest for ``size`` rows at once."""

    size: int
    milliseconds: float
    """Time of the whole base."""
    options: CompilerOptions
    algorithms: Mapping[str, Algorithm]
    """By kind of layer; other kinds keep the compiler's own convolution."""
    costs: CostTable | None = None
    """Of the bundle's blocks and lookups, see ``measure_costs``."""
    driver: Driver = "loop"
    """Of a cascade in tiles of this size."""

    def __post_init__(self) -> None:
        """Check the values, for tunings are read from untrusted files."""
        if not (1 <= self.size <= MOST_ROWS and 0 < self.milliseconds < np.inf):
            raise InputError(
                f"tile: expected 1 to {MOST_ROWS} rows in a positive time, got {self.size} in {self.milliseconds}"
            )
        options = self.options[: -len(ROUNDED)] if self.options[-len(ROUNDED) :] == ROUNDED else self.options
        if not any(are_tried(options, platform) for platform in OPTIONS):
            raise InputError(f"options: expected those that tuning tries, got {self.options}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was found fastest on one device; smallest tile first."""

    device: str
    tiles: tuple[Tile, ...]
    jaxlib: str = ""
    """The compiler's version: others may not know these options, or be faster without them."""
    onnxruntime: str = ""
    """The version of ONNX Runtime, if that runs the cascade instead; then tiles are batches that were measured."""
    checks: tuple[ArithmeticCheck, ...] = ()
    """How often a bundle's cascades answer otherwise than in the reference arithmetic, see ``check_tuning``."""

    def __post_init__(self) -> None:
        """Check that tiles rise from one for a single request, and are not too many."""
        sizes = [tile.size for tile in self.tiles]
        for text in (self.device, self.jaxlib, self.onnxruntime):
            if not _WORD.fullmatch(text):
                raise InputError(
                    f"tuning: expected a device and versions of up to 120 plain characters, got {text[:80]!r}"
                )
        if len(self.checks) > MOST_TILES:
            raise InputError(f"checks: expected at most {MOST_TILES}, got {len(self.checks)}")
        if self.onnxruntime and any(tile.options or tile.algorithms for tile in self.tiles):
            raise InputError("tiles: expected no options and no algorithms, which ONNX Runtime does not take, got some")
        if sizes[:1] != [1] or sizes != sorted(set(sizes)) or len(sizes) > MOST_TILES:
            raise InputError(
                f"tiles: expected up to {MOST_TILES} rising sizes from 1 on, got {sizes[: MOST_TILES + 1]}"
            )

    @property
    def backend(self) -> Backend:
        """What runs the cascade."""
        return "onnxruntime" if self.onnxruntime else "xla"

    @property
    def is_reference(self) -> bool:
        """Whether this is the reference arithmetic: the compiler's own programs without options."""
        other = any(tile.options or tile.algorithms or tile.driver != "loop" for tile in self.tiles)
        return self.backend == "xla" and not other

    @property
    def programs(self) -> str:
        """A digest of what decides on answers: the device, the compiler, and the options and algorithms of tiles."""
        if self.onnxruntime:
            # Another version of this library may make other graphs.
            parts = (self.device, self.onnxruntime, __version__)
            return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        tiles: list[tuple[object, ...]] = [(t.size, t.options, sorted(t.algorithms.items())) for t in self.tiles]
        tiles += [(tile.size, tile.driver) for tile in self.tiles if tile.driver != "loop"]
        return hashlib.sha256(repr((self.device, self.jaxlib, tiles)).encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True, eq=False)
class TunedCascade:
    """A cascade and what was found fastest for it.

    Of a cascade in float32 the arithmetic is the reference's in another order: logits differ in their last bits. A
    request whose score is that close to a threshold, or whose logits are that close to a tie, may be answered
    differently. A cascade in bfloat16 has certificates of its own, see ``bfloat16``.
    """

    cascade: Cascade
    tuning: Tuning

    def predict_one(self, image: Shaped[Array | np.ndarray, "*input"]) -> Prediction:
        """Answer one request."""
        tile = self.tuning.tiles[0]
        if tile.driver == "loop":
            return predict_one(self._single, image, tile.options)
        return jax.tree.map(lambda rows: rows[0], self._undivided(np.asarray(image)[None], tile))

    def predict(self, images: Shaped[Array | np.ndarray, "batch *input"]) -> Prediction:
        """Answer a batch, padded to a power of two, for each of which there is one program; padding takes no time.

        Raises:
            InputError: There are no images.
        """
        if len(images) == 0:
            raise InputError("images: expected at least one, got none")
        parts = [self._bucket(images[i : i + LARGEST_BUCKET]) for i in range(0, len(images), LARGEST_BUCKET)]
        # By NumPy: JAX would compile a program for every number of rows.
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

    def each_way(self, images: Shaped[np.ndarray, "batch *input"]) -> Iterator[Prediction]:
        """Answer every image by itself, then in tiles of each size alone, then in batches with tiles as scheduled."""
        starts = range(0, len(images), LARGEST_BUCKET)
        for tile in self.tuning.tiles:
            if tile.size > LARGEST_BUCKET:
                continue  # never used
            if tile.driver != "loop":
                steps = range(0, len(images), tile.size)
                parts = [self._undivided(images[i : i + tile.size], tile) for i in steps]
            elif tile.size == 1:
                parts = [predict_only(self._single, images[i : i + 1], tile.options) for i in range(len(images))]
            else:
                alone = BatchedCascade.of(self._tile(tile.size), Schedule.of({tile.size: 1.0}))
                parts = [_in_tiles(alone, images[i : i + LARGEST_BUCKET], tile.options) for i in starts]
            yield jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
        yield self.predict(images)

    @functools.cached_property
    def without_caches(self) -> "TunedCascade":
        """The full network, tuned like the cascade."""
        return dataclasses.replace(self, cascade=Cascade(self.cascade.chain, (), jnp.zeros(0)))

    def schedule(self, batch: int) -> Schedule:
        """Return the fastest tiles for a batch of this size."""
        return Schedule.of({tile.size: tile.milliseconds for tile in self.tuning.tiles}, batch=batch)

    def costs(self, batch: int) -> dict[int, CostTable]:
        """Return the measured costs of each of these tiles, by size.

        Raises:
            InputError: The costs of some tile have not been measured.
        """
        tables = {tile.size: tile.costs for tile in self.tuning.tiles}
        found = {size: table for size in self.schedule(batch).sizes if (table := tables[size]) is not None}
        if len(found) < len(self.schedule(batch).sizes):
            raise InputError("tuning: expected measured costs for every tile; run gati-jax tune --bundle DIR")
        return found

    def measured(self, *, rounds: int = 21) -> Tuning:
        """Return the tuning with the costs of every tile's blocks and lookups, measured now."""
        tiles = []
        for tile in self.tuning.tiles:
            cascade, how = self._tile(tile.size), {"options": tile.options, "sites": self.cascade.sites}
            once = functools.partial(
                measure_costs, cascade.chain, cascade.caches, rounds=rounds, batch=tile.size, **how
            )
            tiles.append(dataclasses.replace(tile, costs=measure_steadily(once)))
        return dataclasses.replace(self.tuning, tiles=tuple(tiles))

    def _bucket(self, images: Shaped[Array | np.ndarray, "batch *input"]) -> Prediction:
        first = self.tuning.tiles[0]
        if len(images) == 1:
            if first.driver != "loop":
                return self._undivided(images, first)
            return predict_only(self._single, images, first.options)
        batched = self.batched(_bucket_of(len(images)))
        tile = next(t for t in self.tuning.tiles if t.size == batched.schedule.sizes[0])
        return _in_tiles(batched, images, tile.options) if tile.driver == "loop" else self._undivided(images, tile)

    def _undivided(self, images: Shaped[Array | np.ndarray, "batch *input"], tile: Tile) -> Prediction:
        """Answer a batch by a tile's driver, which does not divide it into tiles."""
        n, predict = len(images), predict_nested if tile.driver == "nest" else predict_hosted
        answer = predict(self._tile(tile.size), _padded(images, _bucket_of(n)), n, tile.options)
        return jax.tree.map(lambda rows: np.asarray(rows)[:n], answer)

    @functools.cached_property
    def _single(self) -> Cascade:
        return self._tile(1)

    @functools.cached_property
    def _tile(self) -> Callable[[int], Cascade]:
        """The cascade by tile size, made once for each; ``functools.cache`` on a method would keep it alive."""
        tiles = {tile.size: tile for tile in self.tuning.tiles}
        return functools.cache(lambda size: tuned_cascade(self.cascade, tiles[size]))

    @functools.cached_property
    def batched(self) -> Callable[[int], BatchedCascade]:
        """The cascade in its tiles by number of rows, made once for each bucket."""

        def build(bucket: int) -> BatchedCascade:
            schedule = self.schedule(bucket)
            return BatchedCascade(cascades=tuple(map(self._tile, schedule.sizes)), schedule=schedule)

        return functools.cache(build)


def _bucket_of(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _in_tiles(
    batched: BatchedCascade, images: Shaped[Array | np.ndarray, "batch *input"], options: CompilerOptions
) -> Prediction:
    """Answer a batch in tiles, padded to its bucket."""
    n = len(images)
    bucket = _bucket_of(max(n, *batched.schedule.sizes))
    answer = predict_tiled(batched, _padded(images, bucket), n, options)
    return answer if n == bucket else jax.tree.map(lambda rows: np.asarray(rows)[:n], answer)


def _padded(images: Shaped[Array | np.ndarray, "batch *input"], rows: int) -> Shaped[Array | np.ndarray, "rows *input"]:
    if len(images) == rows:
        return images
    return np.pad(np.asarray(images), [(0, rows - len(images))] + [(0, 0)] * (images.ndim - 1))


def applicable(chain: Chain, caches: Sequence[Candidate]) -> dict[str, Sequence[Algorithm]]:
    """Return the algorithms that can do each kind of layer of the base and of the small networks among the caches."""
    networks = [chain.network, *(c.predictor.network for c in caches if isinstance(c.predictor, Network))]
    blocks = [block for network in networks if isinstance(network, Architecture) for block in layers(network)]
    return {layer.kind: layer.applicable for block in blocks for layer in block}


def tuning_for(tuning: Tuning, chain: Chain, caches: Sequence[Candidate]) -> Tuning:
    """Return a tuning without the algorithms of caches that are not among these."""
    known = applicable(chain, caches)
    chosen = [{kind: a for kind, a in tile.algorithms.items() if kind in known} for tile in tuning.tiles]
    pairs = zip(tuning.tiles, chosen, strict=True)
    return dataclasses.replace(tuning, tiles=tuple(dataclasses.replace(tile, algorithms=few) for tile, few in pairs))


def tuned_chain(chain: Chain, tile: Tile) -> Chain:
    """Return a chain with its convolutions by a tile's algorithms."""
    return with_algorithms(chain, tile.algorithms) if isinstance(chain.network, Architecture) else chain


def tuned_cascade(cascade: Cascade, tile: Tile) -> Cascade:
    """Return a cascade with its base, and the small networks among its caches, by a tile's algorithms."""
    caches = tuple(tuned_cache(cache, tile) for cache in cascade.caches)
    return Cascade(tuned_chain(cascade.chain, tile), caches, cascade.thresholds)


def tuned_cache(cache: Candidate, tile: Tile) -> Candidate:
    """Return a cache with its convolutions by a tile's algorithms if it is a small network, else as it is."""
    if not isinstance(cache.predictor, Network):
        return cache
    predictor, variables = network_with_algorithms(cache.predictor, cache.params["predictor"], tile.algorithms)
    return dataclasses.replace(cache, predictor=predictor, params={**cache.params, "predictor": variables})
