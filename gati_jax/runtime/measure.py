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


def prefix_program(chain: Chain, site: int, images: Shaped[Array, "batch *input"]) -> Callable[[], Array]:
    """Return a compiled call of the base up to ``site``; N includes the classifier."""
    packed = pack(chain)
    return lambda: _prefix(packed, images, site=site)


@functools.partial(jax.jit, static_argnames="site")
def _prefix(packed: Packed[Chain], images: Shaped[Array, "batch *input"], *, site: int) -> Array:
    chain = unpack(packed)
    x = chain.span(chain.prepare(images), 0, site)
    return chain.classify(x) if site == len(chain) else x


def measure_costs(chain: Chain, candidates: Iterable[Candidate], *, batch: int = 1, rounds: int = 60) -> CostTable:
    """Measure every block (as differences of prefixes of the base) and every lookup.

    Args:
        chain: The base.
        candidates: Whose lookups to time.
        batch: Rows in a call.
        rounds: Interleaved repeats, of which the medians are taken.
    """
    spec = chain.input_spec
    images = jnp.zeros((batch, *spec.shape), spec.dtype)
    prefixes = {str(site): prefix_program(chain, site, images) for site in range(1, len(chain) + 1)}
    times = time_interleaved(prefixes, rounds=rounds)
    until = np.maximum.accumulate([0.0, *(float(np.median(v)) for v in times.values())])
    lookup_ms = _time_lookups(chain, tuple(candidates), images, max(5, rounds // 3))
    return CostTable(
        device=device_name(),
        batch=batch,
        blocks_ms=tuple(np.diff(until).tolist()),
        lookup_ms=lookup_ms,
        spread=spread(times[str(len(chain))]),
    )


def _time_lookups(chain: Chain, candidates: tuple[Candidate, ...], images: Array, rounds: int) -> dict[str, float]:
    """Return what each lookup adds to the program around it.

    Alone, a lookup is too short to time: starting its program takes longer. So all of them are timed inside one run of
    the base, where their weights are as cold as in a request, and the sum is shared out by their times alone.
    """
    if not candidates:
        return {}
    programs: dict[str, Callable[[], object]] = {
        "without": functools.partial(_with_lookups, pack(chain), (), images),
        "with": functools.partial(_with_lookups, pack(chain), pack(candidates), images),
    }
    for i, candidate in enumerate(candidates):
        spec = chain.site_specs[candidate.site]
        activation = jax.random.normal(jax.random.key(0), (len(images), *spec.shape)).astype(spec.dtype)
        programs[str(i)] = functools.partial(_lookup, pack(candidate), activation)
    median = {name: float(np.median(ms)) for name, ms in time_interleaved(programs, rounds=rounds).items()}
    total = max(0.0, median["with"] - median["without"])
    alone = np.array([median[str(i)] for i in range(len(candidates))])
    shares = alone / alone.sum()
    return {candidate.name: float(total * share) for candidate, share in zip(candidates, shares, strict=True)}


@jax.jit
def _lookup(packed: Packed[Candidate], activation: Float[Array, "batch *site"]) -> tuple[Array, Array]:
    return lookup(unpack(packed), activation)


@jax.jit
def _with_lookups(
    chain: Packed[Chain], candidates: Packed[tuple[Candidate, ...]] | tuple[()], images: Shaped[Array, "batch *input"]
) -> tuple[Array, list[tuple[Array, Array]]]:
    base = unpack(chain)
    sites, logits = base.activations(base.prepare(images))
    items = unpack(candidates) if isinstance(candidates, Packed) else ()
    return logits, [lookup(item, sites[item.site]) for item in items]


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


def measure_speed(cascade: Cascade, images: Shaped[Array, "n *input"], *, rounds: int = 7) -> Speed:
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
