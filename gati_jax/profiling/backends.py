"""The two backends, XLA's programs and ONNX Runtime's sessions: how a tuning runs a cascade, and which one is faster.

ONNX Runtime is an optional dependency, imported when a cascade is to run on it. It takes batches of any size, and so
has no tiles to choose: a tuning for it says what batches of a few sizes cost, and times in between are interpolated.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from gati_jax.caches import Candidate, Network
from gati_jax.data import Images
from gati_jax.errors import InputError
from gati_jax.models import Chain
from gati_jax.planning import CostTable, ReplayTable
from gati_jax.runtime import Cascade, Prediction

from .costs import (
    Call,
    announce,
    device_name,
    measure_steadily,
    spread,
    time_interleaved,
    time_lookups,
    warn_if_unsteady,
)
from .tuned_cascade import MOST_ROWS, MOST_TILES, Tile, TunedCascade, Tuning

if TYPE_CHECKING:
    from gati_jax.export.sessions import OnnxCascade, Spans

BATCHES = (1, 8, 32, 128)  # whose costs are measured
_WAYS = (1, 8, 256)  # rows at once: the arithmetic of one row, of few, and of as many as are run together


class AnyBatch(NamedTuple):
    """Batches of any size, whose times are interpolated between those that were measured."""

    sizes: tuple[int, ...]
    """The measured ones, the nearest first."""

    def milliseconds(self, rows: int, batch_ms: Mapping[int, float]) -> float:
        """Return the time that ``rows`` rows take, by the times of measured batches."""
        if rows == 0:
            return 0.0
        sizes = sorted(batch_ms)
        scale = max(1.0, rows / sizes[-1])
        return scale * float(np.interp(rows, sizes, [batch_ms[size] for size in sizes]))


@dataclasses.dataclass(frozen=True, eq=False)
class OnnxTunedCascade(TunedCascade):
    """A cascade on ONNX Runtime, with the costs that were measured there."""

    shared: "Spans | None" = None
    """The base's sessions, which several cascades may share; None: its own."""

    def predict_one(self, image: Shaped[Array | np.ndarray, "*input"]) -> Prediction:
        """Answer one request."""
        return jax.tree.map(lambda rows: rows[0], self._sessions.predict(np.asarray(image)[None]))

    def predict(self, images: Shaped[Array | np.ndarray, "batch *input"]) -> Prediction:
        """Answer a batch.

        Raises:
            InputError: There are no images.
        """
        if len(images) == 0:
            raise InputError("images: expected at least one, got none")
        return self._sessions.predict(np.asarray(images))

    def each_way(self, images: Shaped[np.ndarray, "batch *input"]) -> Iterator[Prediction]:
        """Answer every image by itself, then in small batches, then in large ones."""
        for size in _WAYS:
            parts = [self._sessions.predict(images[i : i + size]) for i in range(0, len(images), size)]
            yield jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

    @functools.cached_property
    def without_caches(self) -> "OnnxTunedCascade":
        """The full network, in one session."""
        return OnnxTunedCascade(Cascade(self.cascade.chain, (), jnp.zeros(0)), self.tuning)

    def schedule(self, batch: int) -> AnyBatch:  # pyright: ignore[reportIncompatibleMethodOverride] (for costs alone)
        """Return the measured batches, the nearest first."""
        sizes = (tile.size for tile in self.tuning.tiles)
        return AnyBatch(tuple(sorted(sizes, key=lambda size: abs(np.log(size / batch)))))

    def measured(self, *, rounds: int = 21) -> Tuning:
        """Return the tuning with the costs of the blocks and lookups in batches of every size, measured now."""
        chain, caches, sites = self.cascade.chain, self.cascade.caches, self.cascade.sites
        tiles = []
        for tile in self.tuning.tiles:
            enough = max(5, rounds * 8 // (7 + tile.size))  # large batches take long, and vary less
            once = functools.partial(measure_onnx_costs, chain, caches, rounds=enough, batch=tile.size, sites=sites)
            costs = measure_steadily(once)
            tiles.append(dataclasses.replace(tile, milliseconds=costs.full_ms, costs=costs))
        return dataclasses.replace(self.tuning, tiles=tuple(tiles))

    @functools.cached_property
    def _sessions(self) -> "OnnxCascade":
        from gati_jax.export.sessions import OnnxCascade  # noqa: PLC0415 (of the extra onnx)

        return OnnxCascade(self.cascade, self.shared)


def spans_of(chain: Chain, caches: Iterable[Candidate]) -> "Spans":
    """Return the sessions of a base that cascades with any of these caches can share.

    Those of all caches of a bundle, whether open or not, are those that its plans were certified with.
    """
    from gati_jax.export.sessions import Spans  # noqa: PLC0415 (of the extra onnx)

    return Spans(chain, {cache.site for cache in caches})


def run_by(tuning: Tuning, cascade: Cascade, spans: "Spans | None" = None) -> TunedCascade:
    """Return a cascade as a tuning runs it; ``spans`` are sessions of its base, if those are to be shared."""
    if tuning.backend == "onnxruntime":
        return OnnxTunedCascade(cascade, tuning, spans)
    return TunedCascade(cascade, tuning)


def onnx_unavailable(chain: Chain, caches: Iterable[Candidate] = ()) -> str:
    """Return why ONNX Runtime cannot run a base with these caches here; empty if it can."""
    try:
        from gati_jax.export.sessions import check_exportable  # noqa: PLC0415 (of the extra onnx)
    except ImportError as error:
        return f"{error.name or 'onnxruntime'} cannot be imported: pip install 'gati-jax[onnx]'"
    try:
        check_exportable(chain, caches)
    except InputError as error:
        return str(error).partition(": ")[2]
    return ""


def onnx_version() -> str:
    """Return the version of ONNX Runtime; empty without it."""
    try:
        from gati_jax.export.sessions import VERSION  # noqa: PLC0415 (of the extra onnx)
    except ImportError:
        return ""
    return VERSION


def replays_on_onnx(
    table: ReplayTable, chain: Chain, caches: Sequence[Candidate], images: Images
) -> tuple[ReplayTable, ...]:
    """Return replays on ONNX Runtime: of images one by one, and in batches; for ``certify_together``.

    Args:
        table: The reference replay of these caches and images.
        chain: The base.
        caches: In the order of their sites.
        images: [n, ...].
    """
    from gati_jax.export.sessions import OnnxCascade  # noqa: PLC0415 (of the extra onnx)

    on_onnx, found = OnnxCascade(Cascade(chain, tuple(caches), jnp.full(len(caches), jnp.inf))), []
    table = table.take([cache.name for cache in caches])
    for size in _WAYS:
        parts = [on_onnx.every_output(images[i : i + size]) for i in range(0, len(images), size)]
        base = np.concatenate([part[0] for part in parts])
        logits, scores = (np.concatenate([part[i] for part in parts], axis=1) for i in (1, 2))
        answers, classes = base.argmax(-1).astype(np.int32), logits.argmax(-1).astype(np.int32)
        found.append(dataclasses.replace(table, answers=answers, classes=classes, scores=scores))
    return tuple(found)


def cannot_run(tuning: Tuning, chain: Chain, caches: Iterable[Candidate]) -> str:
    """Return why a tuning's backend cannot run here, or is another version than was tuned; empty if neither."""
    if tuning.backend == "xla":
        known = {"", version("jaxlib")}
        return "" if tuning.jaxlib in known else f"expected one of jaxlib {version('jaxlib')}, got {tuning.jaxlib}"
    if why := onnx_unavailable(chain, caches):
        return why
    same = tuning.onnxruntime == onnx_version()
    return "" if same else f"expected one of onnxruntime {onnx_version()}, got {tuning.onnxruntime}"


def onnx_tuning(chain: Chain, caches: Sequence[Candidate] = (), *, sizes: Sequence[int] = BATCHES) -> Tuning:
    """Return a tuning for ONNX Runtime, without costs: it has nothing to search for.

    Raises:
        InputError: It cannot run the base or a cache here, or there are too many sizes, or one is out of range.
    """
    if why := onnx_unavailable(chain, caches):
        raise InputError(f"backend: {why}")
    if len({*sizes}) >= MOST_TILES or not all(1 <= size <= MOST_ROWS for size in sizes):
        raise InputError(f"sizes: expected up to {MOST_TILES} of 1 to {MOST_ROWS} rows, got {list(sizes)}")
    tiles = tuple(Tile(size=size, milliseconds=1.0, options=(), algorithms={}) for size in sorted({1, *sizes}))
    return Tuning(device=device_name("onnxruntime"), tiles=tiles, onnxruntime=onnx_version())


def measure_onnx_costs(
    chain: Chain,
    candidates: Iterable[Candidate],
    *,
    rounds: int = 60,
    batch: int = 1,
    sites: Iterable[int] | None = None,
) -> CostTable:
    """Measure the time of every block and of every lookup on ONNX Runtime; arguments as for ``measure_costs``.

    Spans between two sites are timed as they run. Together they take longer than the whole base in one session. That
    excess comes with the caches that cut the base, so it is part of the time of their lookups, and not of the blocks.
    """
    depth, candidates = len(chain), tuple(candidates)
    stops = [*sorted({site for site in (range(1, depth) if sites is None else sites) if site}), depth]
    announce("ONNX Runtime", len(stops), len(candidates), batch, rounds)
    programs = _OnnxPrograms(chain, batch)
    times = time_interleaved({"full": programs.all_miss(()), **programs.spans(stops)}, rounds=rounds)
    span_ms = np.array([np.median(times[str(stop)]) for stop in stops])
    full_ms = float(np.median(times["full"]))
    until = np.cumsum(span_ms) * full_ms / span_ms.sum()
    blocks = np.diff(np.interp(range(depth + 1), [0, *stops], [0.0, *until]))
    costs = CostTable(
        device=device_name("onnxruntime"),
        batch=batch,
        blocks_ms=tuple(blocks.tolist()),
        lookup_ms=time_lookups(programs, candidates, max(5, rounds // 2)),
        spread=spread(times["full"]),
    )
    warn_if_unsteady(costs)
    return costs


class _OnnxPrograms:
    """ONNX Runtime's sessions, to be timed; see ``Programs``."""

    def __init__(self, chain: Chain, batch: int) -> None:
        from gati_jax.export import sessions  # noqa: PLC0415 (of the extra onnx)

        self._new, self._chain = sessions, chain
        dtype = chain.input_spec.dtype if chain.normalization is None else np.uint8
        self._images = np.zeros((batch, *chain.input_spec.shape), dtype)

    def lookup(self, cache: Candidate) -> Call:
        lookup = self._new.Lookup(self._chain, cache)
        if cache.site == 0 and isinstance(cache.predictor, Network):  # it is timed with what prepares images for it
            spans = self._new.Spans(self._chain, [0])
            return lambda: lookup(spans.first(self._images, 0))
        x = self._activation(cache.site)
        return lambda: lookup(x)

    def all_miss(self, caches: tuple[Candidate, ...]) -> Call:
        cascade = Cascade(self._chain, caches, jnp.full(len(caches), jnp.inf))
        return functools.partial(self._new.OnnxCascade(cascade).predict, self._images)

    def spans(self, stops: Sequence[int]) -> dict[str, Call]:
        """Return the spans that end at these sites."""
        spans, rows = self._new.Spans(self._chain, stops), np.arange(len(self._images))
        calls: dict[str, Call] = {str(stops[0]): lambda: spans.first(self._images, stops[0])}
        for start, stop in itertools.pairwise(stops):
            x = self._activation(start)
            calls[str(stop)] = functools.partial(spans.run, x, rows, start, stop)
        return calls

    def _activation(self, site: int) -> object:
        *positions, channels = (spec := self._chain.site_specs[site]).shape
        drawn = np.random.default_rng(0).standard_normal((len(self._images), channels, *positions), np.float32)
        # Whole numbers are indices, as of tokens.
        return self._new.to_value(drawn if spec.dtype == np.float32 else np.zeros(drawn.shape, spec.dtype))


def fastest(tunings: Iterable[Tuning]) -> tuple[Tuning, ...]:
    """Return tunings of the same network, the fastest first: by the time of one request times that a row of many."""

    def each(tuning: Tuning) -> float:
        one, many = tuning.tiles[0], tuning.tiles[-1]
        return one.milliseconds * many.milliseconds / many.size

    return tuple(sorted(tunings, key=each))
