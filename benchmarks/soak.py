"""Keep a server busy for long, with traffic that drifts, and see whether anything is lost, grows or is left behind.

The rate is a share of the capacity that is measured at the start. The load comes in turns of half a minute, on kept
connections and on new ones alternately. The share of pictures that are shifted and noisy goes from none to all and
back, ``--days`` times. Between two turns, when no connection is open, memory and descriptors are read; the first turns,
which fill pools and caches, do not count among the slopes.
"""

import argparse
import dataclasses
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.stats

import gati_jax
from gati_jax import data
from gati_jax.profiling import device_name
from train import cli
from train.config import build_config
from train.results import Record

from . import arrivals
from .compare import commit
from .contenders import without_caches
from .load import above_0
from .overload import OK, Counts, capacity_of
from .process import Server, inferences, serving
from .sockets import CLOSED, SILENT, Stream, drive
from .summary import LATE_SECONDS, latencies

_log = logging.getLogger("benchmarks.soak")
EXAMPLE = "python -m benchmarks.soak --bundle runs/digits/caches/bundle --requests 1000000 --hours 1 --adapt"
TURN = 30.0  # seconds
QUIET = 1.0  # seconds for connections to be closed before descriptors are counted
SKIPPED = 0.2  # share of the turns that do not count among the slopes
MOST_GROWTH = 0.05
NOISE = 0.1  # standard deviation over the largest value, of drifted pictures
CONFIDENCE = 0.95


class Turn(Record):
    """Half a minute of load."""

    sent: int
    answered: int
    refused: dict[str, int]
    lost: int
    different: int
    """Answers of another class than the base's."""
    exits: dict[str, int]
    p99_ms: float | None
    drifted: float
    """Share of the pictures."""
    rss_mib: float
    descriptors: int
    late_share: float


class Slope(Record):
    """A straight line through the turns, by least squares."""

    per_hour: float
    low: float
    high: float
    """The ends of its 95 % confidence interval."""
    growth: float
    """Over the turns, as a share of the mean."""


class Soak(Counts):
    """The whole result."""

    network: str
    machine: str
    adapt: bool
    rss: Slope
    descriptors: Slope
    left_behind: tuple[str, ...]
    """Temporary files after the stop."""
    exit_code: int
    turns: tuple[Turn, ...]
    versions: dict[str, str]
    commit: str
    date: str

    @property
    def problems(self) -> list[str]:
        """What should not be."""
        found = [f"{self.lost} requests without an answer"] if self.lost else []
        found += [f"{name} left behind" for name in self.left_behind]
        for what, slope in (("memory", self.rss), ("descriptors", self.descriptors)):
            if slope.low > 0 and slope.growth > MOST_GROWTH:
                found.append(f"{what} grew by {slope.growth:.1%}")
        return found + ([f"exit code {self.exit_code}"] if self.exit_code else [])


class Pictures(NamedTuple):
    """Pictures as they were, then as many drifted ones, with the base's answers."""

    images: np.ndarray
    expected: np.ndarray


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser().parse_args(argv)
    bundle = gati_jax.load_bundle(arguments.bundle)
    config = build_config(bundle.provenance.config)
    images = data.load(config.data.name, config.data.splits.test, config.data.dir).images[: arguments.images]
    images = np.concatenate([images, drifted(images, np.random.default_rng(arguments.seed))])
    expected = np.asarray(gati_jax.infer_batch(without_caches(bundle), images).class_index)
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "adapt"
        options = ["--adapt", "--adapt-dir", str(kept)] if arguments.adapt else []
        with serving(arguments.bundle, *options) as server:
            capacity, rate, turns = measure(server, Pictures(images, expected), arguments)
            code = server.stop()
            left = left_behind(server.folder, kept)
    result = Soak(
        network=config.base.network,
        machine=device_name(),
        adapt=arguments.adapt,
        seconds=len(turns) * TURN,
        capacity=capacity,
        rate=rate,
        sent=sum(turn.sent for turn in turns),
        answered=sum(turn.answered for turn in turns),
        refused=sum((Counter(turn.refused) for turn in turns), Counter()),
        lost=sum(turn.lost for turn in turns),
        different=sum(turn.different for turn in turns),
        rss=slope([turn.rss_mib for turn in turns]),
        descriptors=slope([turn.descriptors for turn in turns]),
        left_behind=left,
        exit_code=code,
        turns=tuple(turns),
        versions=cli.versions(),
        commit=commit(),
        date=datetime.now(UTC).date().isoformat(),
    )
    cli.report(result.as_json(), lambda _: show(result), out=arguments.out, as_json=arguments.json)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    p.add_argument("--hours", type=above_0, default=1.0, metavar="H", help="(default: 1)")
    p.add_argument("--requests", type=cli.positive, metavar="N", help="in that time (default: at --share of capacity)")
    p.add_argument("--share", type=above_0, default=0.5, metavar="X", help="of the capacity (default: 0.5)")
    p.add_argument("--adapt", action="store_true", help="let the server adapt, in a folder that is deleted afterwards")
    p.add_argument("--days", type=above_0, default=2.0, metavar="N", help="how often the traffic drifts and comes back")
    p.add_argument("--images", type=cli.positive, default=500, metavar="N", help="test images (default: 500)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    return p


def drifted(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return pictures that are shifted by an eighth of their width, and noisy."""
    most, shift = images.max(), max(1, images.shape[2] // 8)
    moved = np.roll(images.astype(np.float32), shift, axis=2)
    noisy = np.clip(moved + random.normal(0, NOISE * float(most), images.shape), 0, most)
    return (np.round(noisy) if images.dtype == np.uint8 else noisy).astype(images.dtype)


def measure(server: Server, pictures: Pictures, arguments: argparse.Namespace) -> tuple[float, float, list[Turn]]:
    """Run all turns; returns the capacity, the rate and what became of each turn."""
    count, found = max(3, round(arguments.hours * 3600 / TURN)), list[Turn]()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        streams = [
            Stream(
                port=server.http,
                messages=inferences(pictures.images, keep=keep),
                rows=np.arange(len(pictures.images)),
                keep=keep,
                reads=2,
            )
            for keep in (True, False)
        ]
        capacity = capacity_of(pool, streams[0], seconds=5.0, seed=arguments.seed)
        rate = arguments.requests / (count * TURN) if arguments.requests else arguments.share * capacity
        _log.info("%d turns of %g s at %.0f a second; capacity %.0f", count, TURN, rate, capacity)
        for number in range(count):
            share = 0.5 - 0.5 * float(np.cos(2 * np.pi * arguments.days * number / count))
            times = arrivals.poisson(rate, TURN, seed=number + arguments.seed)
            random, half = np.random.default_rng([arguments.seed, number]), len(pictures.images) // 2
            rows = random.integers(0, half, len(times)) + half * (random.random(len(times)) < share)
            stream = dataclasses.replace(streams[number % 2], seconds=times, rows=rows)
            (asked,) = pool.submit(drive, [stream]).result()
            time.sleep(QUIET)
            answered = asked.status == OK
            codes = Counter(asked.status[~answered].tolist())
            lost = codes.pop(CLOSED, 0) + codes.pop(SILENT, 0)
            turn = Turn(
                sent=len(asked.rows),
                answered=int(answered.sum()),
                refused={str(code): n for code, n in codes.items()},
                lost=lost,
                different=int((asked.values[answered, 0] != pictures.expected[asked.rows[answered]]).sum()),
                exits={str(key): n for key, n in sorted(Counter(asked.values[answered, 1].tolist()).items())},
                p99_ms=latencies((asked.done - asked.scheduled)[answered] * 1e3)["p99_ms"],
                drifted=share,
                rss_mib=server.rss_mib(),
                descriptors=server.descriptors(),
                late_share=float((asked.sent - asked.scheduled > LATE_SECONDS).mean()),
            )
            found.append(turn)
            _log.info(line(number + 1, count, turn))
    return capacity, rate, found


def line(number: int, count: int, turn: Turn) -> str:
    """Return a line about a turn."""
    different = turn.different / max(1, turn.answered)
    return (
        f"turn {number} of {count}: {turn.sent} sent, {turn.lost} lost, {sum(turn.refused.values())} refused, "
        f"{different:.2%} differ, {turn.drifted:.0%} drifted, {turn.rss_mib:.0f} MiB, {turn.descriptors} descriptors"
    )


def slope(values: Sequence[float]) -> Slope:
    """Return the line through the values of turns, without the first ones.

    Example:
        >>> slope([9.0, 1.0, 2.0, 3.0, 4.0, 5.0]).per_hour  # of turns of half a minute
        120.0
    """
    counted = np.array(values[round(SKIPPED * len(values)) :], float)
    hours, free = np.arange(len(counted)) * TURN / 3600, max(1, len(counted) - 2)
    away = hours - hours.mean()
    rising = float(away @ counted / (away @ away))
    rest = counted - counted.mean() - rising * away
    error = float(np.sqrt(rest @ rest / free / (away @ away)))
    wide = error * float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, free))
    growth = rising * float(hours[-1]) / float(counted.mean())
    return Slope(per_hour=rising, low=rising - wide, high=rising + wide, growth=growth)


def left_behind(temporary: Path, kept: Path) -> tuple[str, ...]:
    """Return the temporary files of a server that has stopped: of the system's folder, and of adaptation's."""
    own = [path for path in temporary.rglob("*") if path.is_file()]
    half = [path for path in kept.rglob(".*") if path.is_file() and path.name != ".lock"] if kept.exists() else []
    return tuple(sorted(path.name for path in (*own, *half)))


def show(result: Soak) -> None:
    """Print the result."""
    columns = ("sent", "answered", "refused", "lost", "differ", "p99 ms", "drifted", "MiB", "descriptors")
    rows = [
        (
            t.sent,
            t.answered,
            sum(t.refused.values()),
            t.lost,
            t.different,
            t.p99_ms,
            t.drifted,
            t.rss_mib,
            t.descriptors,
        )
        for t in result.turns
    ]
    cli.show(f"{result.network}, {result.machine}, {result.rate:.0f} a second", columns, rows)
    for what, unit, one in (("memory", "MiB", result.rss), ("descriptors", "", result.descriptors)):
        print(
            f"{what}: {one.per_hour:+.2f} {unit} an hour ({one.low:+.2f} to {one.high:+.2f}), {one.growth:+.1%} in all"
        )
    print(f"{result.sent} sent, {result.lost} lost, {result.different} differ from the base's answers")
    for problem in result.problems:
        print(f"FAILS: {problem}")


if __name__ == "__main__":
    cli.run(main)
