"""Measured costs: what each block and each lookup takes on this device, the programs taking turns."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from gati_jax.caches import Candidate, lookup
from gati_jax.models import Chain
from gati_jax.planning import CostTable

from .cascade import Cascade
from .drivers import predict_one
from .numerics import reference
from .packing import Packed, pack, unpack


def device_name() -> str:
    """Name the default device, fit for a file name."""
    device = jax.devices()[0]
    return f"{device.platform}-{device.device_kind}".lower().replace(" ", "-").replace("/", "-")


def time_interleaved(
    programs: Mapping[str, Callable[[], object]], *, rounds: int
) -> dict[str, Float[np.ndarray, " rounds"]]:
    """Time programs in turn, so that a disturbance of the machine meets all of them.

    Args:
        programs: Each returns what ``jax.block_until_ready`` can wait for. All are run once before, to warm up.
        rounds: How often each is timed.

    Returns:
        Milliseconds of every run.
    """
    for program in programs.values():
        jax.block_until_ready(program())
    times = {name: np.empty(rounds) for name in programs}
    for i in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            times[name][i] = (time.perf_counter() - start) * 1e3
    return times


def spread(times: Float[np.ndarray, " rounds"]) -> float:
    """Return the interquartile range over the median."""
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
    return float((high - low) / median)


def prefix_program(chain: Chain, site: int, images: Shaped[Array | np.ndarray, "batch *input"]) -> Callable[[], Array]:
    """Return a compiled call of the base up to ``site``; N includes the classifier."""
    packed = pack(chain)
    return lambda: _prefix(packed, images, site=site)


# All parameters are handed over, as to the whole network: that is part of its time up to any site.
@functools.partial(jax.jit, static_argnames="site", keep_unused=True)
@reference
def _prefix(packed: Packed[Chain], images: Shaped[Array | np.ndarray, "batch *input"], *, site: int) -> Array:
    chain = unpack(packed)
    x = chain.span(chain.prepare(images), 0, site)
    return chain.classify(x) if site == len(chain) else x


def measure_costs(chain: Chain, candidates: Iterable[Candidate], *, rounds: int = 60) -> CostTable:
    """Measure every block (as differences of prefixes of the base) and every lookup, one request at a time.

    Args:
        chain: The base.
        candidates: Whose lookups to time.
        rounds: Interleaved repeats, of which the medians are taken.
    """
    image = jnp.zeros(chain.input_spec.shape, chain.input_spec.dtype)
    prefixes = {str(site): prefix_program(chain, site, image[None]) for site in range(1, len(chain) + 1)}
    times = time_interleaved(prefixes, rounds=rounds)
    until = np.maximum.accumulate([0.0, *(float(np.median(v)) for v in times.values())])
    return CostTable(
        device=device_name(),
        batch=1,
        blocks_ms=tuple(np.diff(until).tolist()),
        lookup_ms=_time_lookups(chain, candidates, image, max(5, rounds // 2)),
        spread=spread(times[str(len(chain))]),
    )


def _time_lookups(
    chain: Chain, candidates: Iterable[Candidate], image: Shaped[Array, "*input"], rounds: int
) -> dict[str, float]:
    """Return what each lookup adds to the cascade around it.

    Alone, a lookup is too short to time: starting its program takes longer. So as many as there are sites are timed at
    once, in a cascade in which every one of them misses, and what that takes longer than the base is shared out in
    proportion to their times alone.
    """
    groups: list[dict[int, Candidate]] = []
    for candidate in candidates:
        free = next((group for group in groups if candidate.site not in group), None)
        if free is None:
            groups.append(free := {})
        free[candidate.site] = candidate
    milliseconds = {}
    for group in groups:
        caches = tuple(group[site] for site in sorted(group))
        programs = {"base": functools.partial(predict_one, _all_miss(chain, ()), image)}
        programs["cascade"] = functools.partial(predict_one, _all_miss(chain, caches), image)
        for cache in caches:
            spec = chain.site_specs[cache.site]
            activation = jax.random.normal(jax.random.key(0), (1, *spec.shape)).astype(spec.dtype)
            programs[cache.name] = functools.partial(_lookup, pack(cache), activation)
        median = {name: float(np.median(ms)) for name, ms in time_interleaved(programs, rounds=rounds).items()}
        alone = sum(median[cache.name] for cache in caches)
        added = max(0.0, median["cascade"] - median["base"])
        milliseconds |= {cache.name: added * median[cache.name] / alone for cache in caches}
    return milliseconds


def _all_miss(chain: Chain, caches: tuple[Candidate, ...]) -> Cascade:
    return Cascade(chain, caches, jnp.full(len(caches), jnp.inf))


@jax.jit
@reference
def _lookup(packed: Packed[Candidate], activation: Float[Array, "batch *site"]) -> tuple[Array, Array]:
    return lookup(unpack(packed), activation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """A cascade beside its full network, one request at a time, on the same images in the same rounds."""

    full_ms: float
    cascade_ms: float
    exit_ms: dict[int, float]
    """The full network's time up to each exit."""
    exits: tuple[int, ...]
    """Where each of the timed requests left."""
    spread: float
    """Interquartile range over median of the speed-up, over rounds."""

    @property
    def speedup(self) -> float:
        """How many times faster the cascade answers."""
        return self.full_ms / self.cascade_ms

    @property
    def ideal(self) -> float:
        """The ideal speed-up of these requests: lookups, and the driver itself, left out."""
        return self.full_ms / float(np.mean([self.exit_ms[exit_] for exit_ in self.exits]))

    @property
    def conversion(self) -> float:
        """The share of the ideal speed-up that is real."""
        return self.speedup / self.ideal


def measure_speed(cascade: Cascade, images: Shaped[Array | np.ndarray, "n *input"], *, rounds: int = 7) -> Speed:
    """Time the cascade and its full network on each image.

    A request's time is its median over the rounds; means are over requests.

    Args:
        cascade: See ``Cascade``.
        images: Requests, [n, ...].
        rounds: How often each request is timed.
    """
    depth = len(cascade.chain)
    times: dict[str, list[np.ndarray]] = {}
    for image in images:
        programs: dict[str, Callable[[], object]] = {"cascade": lambda image=image: predict_one(cascade, image)}
        for site in (*cascade.sites, depth):
            programs[str(site)] = prefix_program(cascade.chain, site, image[None])
        for name, ms in time_interleaved(programs, rounds=rounds).items():
            times.setdefault(name, []).append(ms)
    by_request = {name: np.stack(ms) for name, ms in times.items()}  # float[n, rounds]
    mean = {name: float(np.median(ms, axis=1).mean()) for name, ms in by_request.items()}
    return Speed(
        full_ms=mean[str(depth)],
        cascade_ms=mean["cascade"],
        exit_ms={site: mean[str(site)] for site in (*cascade.sites, depth)},
        exits=tuple(int(predict_one(cascade, image).exit) for image in images),
        spread=spread(by_request[str(depth)].mean(0) / by_request["cascade"].mean(0)),
    )
