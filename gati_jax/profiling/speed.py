"""The speed-up of a cascade over its full network: the ideal one, and the one that is measured."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from gati_jax.caches import Network
from gati_jax.errors import InputError
from gati_jax.planning import CostTable
from gati_jax.runtime.batched import Schedule
from gati_jax.runtime.cascade import Cascade, predict_one

from .backends import AnyBatch
from .costs import lookup_program, prefix_program, spread, time_interleaved, time_turns, watched_items
from .tuned_cascade import TunedCascade

_RESAMPLED = 500
_DIGITS = 5  # of a millisecond

FullNetwork = Literal["reference", "tuned", "xla", "onnxruntime"]
"""By the reference programs, as the cascade is tuned, or as another backend runs it fastest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Times of a cascade and of the fastest full network, on the same images in the same rounds.

    Milliseconds are those of a whole batch.
    """

    full_ms: float
    cascade_ms: float
    exit_ms: dict[int, float]
    """The full network's time up to each exit. A small network at site 0 is part of every exit's time: unlike a lookup,
    it is not left out of the ideal speed-up."""
    exits: tuple[int, ...]
    """The exit of each of the timed requests."""
    spread: float
    """Interquartile range over median of the speed-up, over rounds."""
    interval: tuple[float, float] | None = None
    """Of the speed-up, with confidence 95 %: the bootstrap's over requests and rounds."""
    typical: float | None = None
    """The speed-up if every run of the full network, and every request that leaves at one exit, took the median time of
    its kind: far from ``speedup``, a few slow runs decide that one. Of single requests only."""
    batch: int = 1
    full: FullNetwork = "reference"
    """Which full network is the fastest one, and so compared with."""
    reference_ms: float = 0.0
    """The full network's time by the reference programs."""
    full_each_ms: tuple[float, ...] = ()
    """Every run of the full network: the rounds of the first request (of the first batch), of the second, and so on."""
    cascade_each_ms: tuple[float, ...] = ()
    """The cascade's, in the same order."""

    @property
    def speedup(self) -> float:
        """How many times faster the cascade answers."""
        return self.full_ms / self.cascade_ms

    @property
    def ideal(self) -> float:
        """The speed-up that these exits would give if lookups and the driver itself took no time."""
        return self.full_ms / float(np.mean([self.exit_ms[exit_] for exit_ in self.exits]))

    @property
    def conversion(self) -> float:
        """The share of the ideal speed-up that is reached."""
        return self.speedup / self.ideal


def measure_speed(
    cascade: Cascade,
    images: Shaped[Array | np.ndarray, "n *input"],
    *,
    full: Mapping[FullNetwork, TunedCascade] | None = None,
    rounds: int = 7,
    progress: bool = False,
) -> Speed:
    """Time the cascade, by the reference arithmetic, and its full network on each image.

    A request's time is its median over the rounds; means are over requests.

    Args:
        cascade: See ``Cascade``.
        images: Requests, [n, ...].
        full: Other ways to run the full network: the fastest is compared with.
        rounds: How often each request is timed.
        progress: Whether to draw a progress bar on a terminal.
    """
    depth, full = len(cascade.chain), full or {}
    networks = [cache for cache in cascade.caches if isinstance(cache.predictor, Network)]
    times: dict[str, list[np.ndarray]] = {}
    for image in watched_items(list(images), "timing requests", progress=progress):
        programs: dict[str, Callable[[], object]] = {"cascade": lambda image=image: predict_one(cascade, image)}
        for site in (*cascade.sites, depth):
            programs[str(site)] = prefix_program(cascade.chain, site, image[None])
        for cache in networks:
            programs[cache.name] = lookup_program(cache, cascade.chain.prepare(image[None]))
        for name, network in full.items():
            programs[name] = functools.partial(network.without_caches.predict_one, image)
        for name, ms in time_interleaved(programs, rounds=rounds).items():
            times.setdefault(name, []).append(ms)
    by_request = {name: np.stack(ms) for name, ms in times.items()}  # float[n, rounds]
    mean = {name: float(np.median(ms, axis=1).mean()) for name, ms in by_request.items()}
    names: dict[str, FullNetwork] = {str(depth): "reference", **{name: name for name in full}}
    fastest = min(names, key=lambda name: mean[name])
    # Blocks were timed of the reference network; an exit saves the same share of the faster one.
    scale = mean[fastest] / mean[str(depth)]
    exits = tuple(int(predict_one(cascade, image).exit) for image in images)
    return Speed(
        full_ms=mean[fastest],
        cascade_ms=mean["cascade"],
        exit_ms={
            site: scale * (mean[str(site)] + sum(mean[cache.name] for cache in networks if cache.site <= site))
            for site in (*cascade.sites, depth)
        },
        exits=exits,
        spread=spread(by_request[fastest].mean(0) / by_request["cascade"].mean(0)),
        interval=speedup_interval(by_request[fastest], by_request["cascade"]),
        typical=_typical(by_request[fastest], by_request["cascade"], exits),
        full=names[fastest],
        reference_ms=mean[str(depth)],
        full_each_ms=_every_run(by_request[fastest]),
        cascade_each_ms=_every_run(by_request["cascade"]),
    )


def measure_batches(
    tuned: TunedCascade,
    images: Shaped[np.ndarray, "n *input"],
    *,
    batch: int,
    full: Mapping[FullNetwork, TunedCascade] | None = None,
    rounds: int = 7,
    progress: bool = False,
) -> Speed:
    """Time a tuned cascade and the full network, tuned, not tuned, and other ways, on ``images`` in groups.

    Args:
        tuned: With measured costs.
        images: Requests; what does not fill a group is left out.
        batch: Requests in a group.
        full: As for ``measure_speed``.
        rounds: How often each group is timed.
        progress: Whether to draw a progress bar on a terminal.

    Raises:
        InputError: Fewer images than one group, or a tuning without costs.
    """
    groups = [images[i : i + batch] for i in range(0, len(images) - batch + 1, batch)]
    if not groups:
        raise InputError(f"images: expected at least one group of {batch}, got {len(images)}")
    depth, chain = len(tuned.cascade.chain), tuned.cascade.chain
    ways: dict[FullNetwork, TunedCascade] = {"tuned": tuned, **(full or {})}
    networks: dict[FullNetwork, list[Callable[[], object]]] = {
        "reference": [prefix_program(chain, depth, group) for group in groups]
    }
    for name, way in ways.items():
        networks[name] = [functools.partial(way.without_caches.predict, group) for group in groups]
    programs = {"cascade": [functools.partial(tuned.predict, group) for group in groups], **networks}
    exits = np.concatenate([np.asarray(tuned.predict(group).exit) for group in groups])
    by_group = time_turns(programs, rounds, progress=progress)
    mean = {name: float(np.median(ms, axis=0).mean()) for name, ms in by_group.items()}
    fastest = min(networks, key=lambda name: mean[name])
    costs = tuned.costs(batch)[tuned.schedule(batch).sizes[0]]
    share = {site: ms / costs.full_ms for site, ms in path_ms(tuned.cascade, costs).items()}
    return Speed(
        full_ms=mean[fastest],
        cascade_ms=mean["cascade"],
        exit_ms={site: mean[fastest] * part for site, part in share.items()},
        exits=tuple(exits.tolist()),
        spread=spread(by_group[fastest].mean(1) / by_group["cascade"].mean(1)),
        interval=speedup_interval(by_group[fastest].T, by_group["cascade"].T),
        batch=batch,
        full=fastest,
        reference_ms=mean["reference"],
        full_each_ms=_every_run(by_group[fastest].T),
        cascade_each_ms=_every_run(by_group["cascade"].T),
    )


def speedup_interval(
    full: Float[np.ndarray, "requests rounds"], cascade: Float[np.ndarray, "requests rounds"]
) -> tuple[float, float]:
    """Return between which speed-ups other requests and other rounds would lie, with confidence 95 %.

    Requests and rounds are drawn anew, with replacement; a request's time is its median over the rounds.

    Args:
        full: Times of the full network.
        cascade: Those of the cascade on the same requests, in the same rounds.

    Example:
        >>> speedup_interval(np.full((4, 3), 3.0), np.full((4, 3), 2.0))
        (1.5, 1.5)
    """
    random, (requests, rounds) = np.random.default_rng(0), full.shape
    ratios = np.empty(_RESAMPLED)
    for i in range(_RESAMPLED):
        drawn = np.ix_(random.integers(0, requests, requests), random.integers(0, rounds, rounds))
        ratios[i] = np.median(full[drawn], axis=1).mean() / np.median(cascade[drawn], axis=1).mean()
    low, high = np.quantile(ratios, (0.025, 0.975)).tolist()
    return low, high


def _typical(
    full: Float[np.ndarray, "requests rounds"], cascade: Float[np.ndarray, "requests rounds"], exits: Sequence[int]
) -> float:
    """Return the speed-up by the medians of each kind of run, see ``Speed.typical``."""
    left = np.array(exits)
    median = {exit_: float(np.median(cascade[left == exit_])) for exit_ in set(exits)}
    return float(np.median(full) / np.mean([median[exit_] for exit_ in exits]))


def _every_run(ms: Float[np.ndarray, "requests rounds"]) -> tuple[float, ...]:
    return tuple(ms.round(_DIGITS).ravel().tolist())


def path_ms(cascade: Cascade, costs: CostTable) -> dict[int, float]:
    """Return the time up to each exit: blocks and small networks on the way; other lookups are left out."""
    networks = [(c.site, costs.lookup_ms[c.name]) for c in cascade.caches if isinstance(c.predictor, Network)]
    return {
        exit_: costs.until(exit_) + sum(ms for site, ms in networks if site <= exit_)
        for exit_ in (*cascade.sites, len(cascade.chain))
    }


def stages_ms(cascade: Cascade, costs: CostTable) -> tuple[float, ...]:
    """Return the time of every stage: its blocks and its lookup."""
    stops, names = (*cascade.sites, len(cascade.chain)), (*(cache.name for cache in cascade.caches), None)
    return tuple(
        costs.until(site) - costs.until(before) + (costs.lookup_ms[name] if name else 0.0)
        for before, site, name in zip((0, *cascade.sites), stops, names, strict=True)
    )


def expected_ms(
    cascade: Cascade,
    costs: Mapping[int, CostTable],
    schedule: Schedule | AnyBatch,
    exits: Int[np.ndarray, " n"],
    batch: int,
) -> float:
    """Return the mean time of a batch that measured costs predict: each stage's tiles for the rows that reach it.

    Args:
        cascade: The cascade.
        costs: Measured costs by tile size.
        schedule: The tiles, or batches of any size.
        exits: The exit of each request, [n]; taken in groups of ``batch``, one after another.
        batch: Requests in a group.

    Raises:
        InputError: Fewer requests than one group.
    """
    by_size = {size: stages_ms(cascade, table) for size, table in costs.items()}
    stops = (*cascade.sites, len(cascade.chain))
    stage_ms = [{size: ms[i] for size, ms in by_size.items()} for i in range(len(stops))]
    groups = exits[: len(exits) // batch * batch].reshape(-1, batch)
    if not len(groups):
        raise InputError(f"exits: expected at least one group of {batch}, got {len(exits)}")
    alive = np.stack([(groups >= site).sum(1) for site in stops], axis=1)  # int[groups, stages]
    rows = [sum(schedule.milliseconds(int(n), ms) for n, ms in zip(group, stage_ms, strict=True)) for group in alive]
    return float(np.mean(rows))
