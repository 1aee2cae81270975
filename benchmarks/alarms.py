"""How soon the monitor raises an alarm where the disagreement jumps, and how often it does where it should not.

    python -m benchmarks.alarms --runs 200 --streams 1000 --out build/alarms --json

Simulated requests: a share hits, at sites drawn at random, with normal scores; each disagrees with the risk of its
phase, independently of all else. ``jump``: 50,000 quiet requests at epsilon / 3, then 5 epsilon. ``jump, scores
shift``: with the jump, scores fall by half a standard deviation. ``tolerable``: exactly epsilon throughout, where an
alarm is a false one; the interval is Clopper and Pearson's, of 95 %. Times are of one `watch`, in quiet.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from gati_jax.adaptation import Monitor, MonitorConfig, Observation

DEPTH, SITES, HIT_SHARE = 8, 3, 0.7
SHIFT = 0.5  # standard deviations of the scores
BLOCK = 5000  # requests drawn at a time
INTERVAL = 0.95


class Phase(NamedTuple):
    """Requests of one kind."""

    requests: int
    risk: float  # of a served request; of a hit, it is larger
    score: float = 0.0


class Run(NamedTuple):
    """One stream, up to its first alarm or its end."""

    requests: int
    alarm: bool
    shadows: int
    hits: int
    drifts: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delays:
    """Alarms after a jump."""

    runs: int
    early: int
    """Alarms before the jump; they count in nothing else."""
    missed: int
    """No alarm before the stream's end; they count as that long."""
    median: float
    p95: float
    shadow_share: float
    """Share of all hits up to the alarm that were shadowed."""


def blocks(phases: tuple[Phase, ...], rng: np.random.Generator) -> Iterator[tuple[np.ndarray, ...]]:
    """Draw requests by the thousand: whether they hit, the site, the score, whether they disagree, the coin."""
    for phase in phases:
        for begin in range(0, phase.requests, BLOCK):
            n = min(BLOCK, phase.requests - begin)
            hits, wrong = rng.random(n) < HIT_SHARE, rng.random(n) < phase.risk / HIT_SHARE
            yield hits, rng.integers(0, SITES, n), rng.normal(phase.score, 1, n), wrong, rng.random(n)


def requests(phases: tuple[Phase, ...], rng: np.random.Generator) -> Iterator[tuple[bool, int, float, bool, float]]:
    """Draw requests one after another."""
    for block in blocks(phases, rng):
        yield from zip(*(column.tolist() for column in block), strict=True)


def simulate(seed: int, *, config: MonitorConfig, phases: tuple[Phase, ...]) -> Run:
    """Serve one stream up to its first alarm."""
    monitor = Monitor(config, DEPTH)
    alarm = None
    for hits, site, score, wrong, coin in requests(phases, np.random.default_rng(seed)):
        if hits:
            q = monitor.q
            alarm = monitor.watch(Observation(site, score, int(wrong), q, 0 if coin < q else None))
        else:
            alarm = monitor.watch(Observation(DEPTH, float("inf"), 0, 1.0, 0))
        if alarm:
            break
    report = monitor.report
    return Run(report.requests, alarm is not None, sum(report.shadows.values()), report.hits, report.drifts)


def delays(runs: list[Run], quiet: int) -> Delays:
    """Sum up streams whose risk jumps after ``quiet`` requests."""
    late = [run for run in runs if not (run.alarm and run.requests <= quiet)]
    waits = np.array([run.requests - quiet for run in late])
    return Delays(
        runs=len(runs),
        early=len(runs) - len(late),
        missed=sum(not run.alarm for run in late),
        median=float(np.median(waits)),
        p95=float(np.percentile(waits, 95)),
        shadow_share=sum(run.shadows for run in late) / sum(run.hits for run in late),
    )


def interval(alarms: int, streams: int) -> tuple[float, float]:
    """Return Clopper and Pearson's interval for the share of streams with an alarm."""
    found = binomtest(alarms, streams).proportion_ci(INTERVAL, "exact")
    return float(found.low), float(found.high)


def microseconds(config: MonitorConfig, count: int = 200_000) -> float:
    """Time `watch` in quiet: the mean, in the best of five parts."""
    phases = (Phase(count, 0.0),)
    observations = [
        Observation(site, score, 0, config.quiet_q, 0 if coin < config.quiet_q else None)
        if hits
        else Observation(DEPTH, float("inf"), 0, 1.0, 0)
        for hits, site, score, _, coin in requests(phases, np.random.default_rng(0))
    ]
    monitor, best = Monitor(config, DEPTH), float("inf")
    for part in range(5):
        began = time.perf_counter()
        for observation in observations[part::5]:
            monitor.watch(observation)
        best = min(best, (time.perf_counter() - began) / len(observations[part::5]))
    return 1e6 * best


def main() -> None:
    """Simulate all and print the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alarms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200, help="streams with a jump, with and without a shift")
    parser.add_argument("--streams", type=int, default=1000, help="streams at exactly epsilon")
    parser.add_argument("--quiet", type=int, default=50_000, help="requests before the jump")
    parser.add_argument("--length", type=int, default=20_000, help="requests of a stream at epsilon, and after a jump")
    parser.add_argument("--epsilon", type=float, default=0.01)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--quiet-q", type=float, default=0.02, help="the share of hits shadowed in quiet")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for alarms.json")
    parser.add_argument("--json", action="store_true", help="print that, instead of lines")
    args = parser.parse_args()
    config = MonitorConfig(epsilon=args.epsilon, delta=args.delta, quiet_q=args.quiet_q)
    epsilon, ends = args.epsilon, args.length
    quiet = Phase(args.quiet, epsilon / 3)
    kinds = {
        "jump": ((quiet, Phase(ends, 5 * epsilon)), args.runs),
        "jump, scores shift": ((quiet, Phase(ends, 5 * epsilon, -SHIFT)), args.runs),
        "tolerable": ((Phase(ends, epsilon),), args.streams),
    }
    runs: dict[str, list[Run]] = {}
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for i, (name, (phases, count)) in enumerate(kinds.items()):
            seeds = range((args.seed + i) * 10**6, (args.seed + i) * 10**6 + count)
            runs[name] = pool.map(functools.partial(simulate, config=config, phases=phases), seeds, chunksize=5)
    alarms = sum(run.alarm for run in runs["tolerable"])
    found = {
        "settings": dataclasses.asdict(config) | {"quiet": args.quiet, "length": ends, "seed": args.seed},
        **{name: dataclasses.asdict(delays(runs[name], args.quiet)) for name in ("jump", "jump, scores shift")},
        "tolerable": {
            "streams": args.streams,
            "alarms": alarms,
            "share": alarms / max(1, args.streams),
            "interval": interval(alarms, args.streams),
            "shadow_share": sum(r.shadows for r in runs["tolerable"]) / sum(r.hits for r in runs["tolerable"]),
        },
        "microseconds": microseconds(config),
        "microseconds_without_drift": microseconds(dataclasses.replace(config, drift=False)),
    }
    text = json.dumps(found, indent=2)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "alarms.json").write_text(text + "\n", encoding="utf-8")
    print(text if args.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
