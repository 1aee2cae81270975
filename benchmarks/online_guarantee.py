"""Whether the monitor keeps its promise where a server restarts often, and where shadow requests are lost.

``restarts``: independent requests that disagree on exactly epsilon, so that an alarm is a false one; at most delta of
the streams may have any. Every so many requests the server restarts: with what the last one wrote down, and, for
comparison, with a fresh monitor. ``lost``: a nearest cache answers half of the requests, wrong on 20 % of these, and a
share of the shadows is lost; every stream should have an alarm. Intervals are Clopper and Pearson's, of 95 %.
"""

import functools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from gati_jax.adaptation import LOST, NEAREST, Monitor, MonitorConfig, MonitorState, Observation
from train import cli

from .alarms import interval

EXAMPLE = "python -m benchmarks.online_guarantee --workers 2"
DEPTH, HITS, WRONG = 8, 0.5, 0.2
BLOCK = 5000  # requests drawn at a time
LOSSES = (0.0, 0.5, 0.9, 1.0)
MISS = Observation(DEPTH, float("inf"), 0, 1.0, 0)


class Stream(NamedTuple):
    """Requests of one kind."""

    requests: int
    wrong: float
    """Share of the hits that disagree."""
    lost: float = 0.0
    """Share of the shadows."""
    every: int = 0
    """Requests between two restarts; 0: there are none."""
    keeps: bool = True
    """Whether a restart has what the last server wrote down."""


@functools.cache
def observed(q: float) -> tuple[tuple[Observation, ...], ...]:
    """Return what the monitor sees, by what comes (a miss, a hit that agrees, disagrees, is lost) and the coin."""
    unseen, *seen = (Observation(NEAREST, 1.0, 0, q, base) for base in (None, 0, 1, LOST))
    return ((MISS, MISS), *((unseen, one) for one in seen))


def restarted(monitor: Monitor, *, keeps: bool) -> Monitor:
    """Return the next server's monitor."""
    fresh = Monitor(monitor.config, DEPTH)
    if keeps:
        fresh.resume(MonitorState.model_validate_json(monitor.state.model_dump_json()))
    return fresh


def first_alarm(seed: int, *, config: MonitorConfig, stream: Stream) -> int | None:
    """Return the requests up to a stream's first alarm; None where there is none."""
    rng, monitor = np.random.default_rng(seed), Monitor(config, DEPTH)
    for start in range(0, stream.requests, BLOCK):
        kind, wrong, loses, coins = rng.random((4, min(BLOCK, stream.requests - start)))
        kinds = np.where(kind >= HITS, 0, np.where(loses < stream.lost, 3, np.where(wrong < stream.wrong, 2, 1)))
        for i, (what, coin) in enumerate(zip(kinds.tolist(), coins.tolist(), strict=True), start):
            if stream.every and i and i % stream.every == 0:
                monitor = restarted(monitor, keeps=stream.keeps)
            q = monitor.q
            if monitor.watch(observed(q)[what][coin < q]):
                return i + 1
    return None


def row(name: str, firsts: Iterable[int | None]) -> dict[str, Any]:
    """Return a line of the table."""
    found = list(firsts)
    alarms = [first for first in found if first is not None]
    low, high = interval(len(alarms), len(found))
    return {
        "streams of": name,
        "streams": len(found),
        "with an alarm": len(alarms),
        "share": len(alarms) / len(found),
        "low": low,
        "high": high,
        "median requests before it": float(np.median(alarms)) if alarms else None,
    }


def main() -> None:
    """Simulate and print."""
    p = cli.parser("Simulate restarts of a server, and lost shadow requests.", EXAMPLE, out=False)
    p.add_argument("--part", choices=("restarts", "lost", "all"), default="all")
    p.add_argument("--streams", type=cli.positive, default=300, metavar="N", help="with restarts (default: 300)")
    p.add_argument("--requests", type=cli.positive, default=200_000, metavar="N", help="of each (default: 200000)")
    p.add_argument("--every", type=cli.positive, default=5000, metavar="N", help="between restarts (default: 5000)")
    p.add_argument("--lost-streams", type=cli.positive, default=100, metavar="N", help="a share lost (default: 100)")
    p.add_argument("--lost-requests", type=cli.positive, default=20_000, metavar="N", help="of each (default: 20000)")
    p.add_argument("--epsilon", type=cli.share, default=0.05, metavar="X", help="default: 0.05")
    p.add_argument("--delta", type=cli.share, default=0.05, metavar="X", help="default: 0.05")
    p.add_argument("--workers", type=cli.positive, default=1, metavar="N", help="processes (default: 1)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    args = p.parse_args()
    config = MonitorConfig(epsilon=args.epsilon, delta=args.delta, drift=False)
    tolerable = Stream(args.requests, args.epsilon / HITS, every=args.every)
    parts = {
        "restarts": {
            f"a restart every {args.every}": (tolerable, args.streams),
            "the same, without memory": (tolerable._replace(keeps=False), args.streams),
        },
        "lost": {
            f"{share:.0%} lost": (Stream(args.lost_requests, WRONG, lost=share), args.lost_streams) for share in LOSSES
        },
    }
    found: dict[str, Any] = {"settings": vars(args)}
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for part in parts if args.part == "all" else [args.part]:
            began = time.perf_counter()
            runs = ((name, firsts(pool.imap, args.seed, config, *of)) for name, of in parts[part].items())
            found[part] = {"rows": [row(name, run) for name, run in runs]}
            found[part]["seconds"] = time.perf_counter() - began
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for part, table in found.items():
        if part != "settings":
            print(f"\n{part} ({table['seconds']:.0f} s)\n\n| {' | '.join(table['rows'][0])} |\n{'| --- ' * 7}|")
            for line in table["rows"]:
                cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in line.values())
                print(f"| {' | '.join(cells)} |")


def firsts(
    run: Callable[..., Iterable[int | None]], seed: int, config: MonitorConfig, stream: Stream, count: int
) -> Iterable[int | None]:
    """Return the first alarms of so many streams."""
    return run(functools.partial(first_alarm, config=config, stream=stream), range(seed, seed + count), chunksize=1)


if __name__ == "__main__":
    cli.run(main)
