"""Put 0.5 to 4 times a server's capacity on it, and see whether it stays up: health, goodput, refusals, memory.

The server and the load generator (``benchmarks.sockets``) have a process each, on the same cores. Capacity is measured
in closed loop before and after each load, and taken as the mean of both, because machines are noisy. Then requests of
one image each come at Poisson times, on kept connections or on a new one each, and latency counts from the scheduled
time. Meanwhile health and metrics are asked for twice a second, each time on a new connection.
"""

import argparse
import contextlib
import dataclasses
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

import gati_jax
from gati_jax import data
from gati_jax.profiling import device_name
from train import cli
from train.config import build_config
from train.results import Record

from . import arrivals
from .compare import commit
from .load import above_0
from .process import LIVE, METRICS, READY, Server, inferences, neighbours, serving
from .sockets import CLOSED, SILENT, Outcomes, Stream, drive, message
from .summary import LATE_SECONDS, MOST_LATE, latencies

_log = logging.getLogger("benchmarks.overload")
EXAMPLE = "python -m benchmarks.overload --bundle runs/digits/caches/bundle --out results.json"
FACTORS = (0.5, 1.0, 2.0, 4.0)
CLIENTS = 64  # that keep every bucket full
PLACES = 256  # the server's --capacity
PROBES = {"live": (LIVE, False), "live, admin": (LIVE, True), "ready": (READY, False), "metrics": (METRICS, False)}
PROBES |= {"ready, admin": (READY, True), "metrics, admin": (METRICS, True)}
PROBE_SECONDS = 0.5
MOST_PROBES = 20  # of a kind at once
MOST_CLOSED = 200_000  # requests of a measurement of capacity
OK = 200
OVER = 2.0  # the least factor that is an overload
MOST_SECONDS = {"live": 1.0, "ready": 1.0, "metrics": 2.0}
MOST_GROWTH, LEAST_GOODPUT = 0.05, 0.9
PROGRESS_SECONDS = 10.0


class Counts(Record):
    """What was sent, and what came back."""

    capacity: float
    """Answers a second in closed loop."""
    seconds: float
    rate: float
    sent: int
    answered: int
    refused: dict[str, int]
    """By HTTP's status."""
    lost: int
    """Connections closed without an answer, and requests without one in time."""
    different: int
    """Answers of another class than without load."""


class LoadResult(Counts):
    """What became of one load."""

    connections: str
    factor: float
    """The rate over the capacity that was measured before it."""
    goodput: float
    """Answers a second."""
    p50_ms: float | None
    p99_ms: float | None
    refusal_p99_ms: float | None
    bound_ms: float
    """Places over goodput, plus the deadline: the most that p99 should be."""
    probes: dict[str, float]
    """The worst time, in seconds; infinite ones are counted as lost."""
    probes_lost: int
    rss_mib: tuple[float, ...]
    """Resident memory at the start, after each minute and at the end."""
    server_cores: float
    generator_cores: float
    late_share: float
    invalid_because: tuple[str, ...]

    @property
    def share(self) -> float:
        """Goodput over capacity."""
        return self.goodput / self.capacity


class Criterion(Record):
    """A target."""

    what: str
    measured: float
    most: float | None = None
    least: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it is met."""
        return (self.most is None or self.measured <= self.most) and (self.least is None or self.measured >= self.least)


class Overload(Record):
    """The whole result."""

    network: str
    backend: str
    machine: str
    neighbours: int
    deadline_ms: float | None
    runs: tuple[LoadResult, ...]
    versions: dict[str, str]
    commit: str
    date: str


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser().parse_args(argv)
    bundle = gati_jax.load_bundle(arguments.bundle)
    config = build_config(bundle.provenance.config)
    images = data.load(config.data.name, config.data.splits.test, config.data.dir).images[: arguments.images]
    runs = len(arguments.connections) * len(arguments.factors)
    _log.info("%d loads: %.1f minutes", runs, runs * (arguments.seconds + 2 * arguments.capacity_seconds) / 60)
    options = ["--capacity", str(PLACES), *(["--backend", arguments.backend] if arguments.backend else ())]
    with serving(arguments.bundle, *options) as server, neighbours(arguments.neighbours):
        loads = measure(server, images, arguments)
    result = Overload(
        network=config.base.network,
        backend=arguments.backend or "default",
        machine=device_name(),
        neighbours=arguments.neighbours,
        deadline_ms=arguments.deadline_ms,
        runs=tuple(loads),
        versions=cli.versions(),
        commit=commit(),
        date=datetime.now(UTC).date().isoformat(),
    )
    if arguments.out:
        cli.write_result(arguments.out, result.as_json())
    cli.report(result.as_json(), lambda _: show(result), out=None, as_json=arguments.json)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    p.add_argument("--backend", choices=("xla", "onnxruntime"), help="the server's (default: its own choice)")
    p.add_argument("--seconds", type=above_0, default=60.0, metavar="S", help="of each load (default: 60)")
    p.add_argument(
        "--capacity-seconds", type=above_0, default=5.0, metavar="S", help="of each measurement (default: 5)"
    )
    p.add_argument("--factors", type=above_0, nargs="+", default=list(FACTORS), metavar="X", help="times the capacity")
    p.add_argument("--connections", nargs="+", choices=("kept", "new"), default=["kept", "new"])
    p.add_argument("--deadline-ms", type=above_0, metavar="MS", help="of each request (default: none)")
    p.add_argument(
        "--neighbours", type=int, default=0, metavar="N", help="processes that are busy beside it (default: 0)"
    )
    p.add_argument("--images", type=cli.positive, default=500, metavar="N", help="test images (default: 500)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    return p


def measure(server: Server, images: np.ndarray, arguments: argparse.Namespace) -> list[LoadResult]:
    """Run all loads on a server that is ready."""
    found = list[LoadResult]()
    limits = {} if arguments.deadline_ms is None else {"deadline_ms": arguments.deadline_ms}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        asked = Stream(port=server.http, messages=inferences(images), rows=np.arange(len(images)), clients=1, reads=1)
        expected = pool.submit(drive, [asked]).result()[0].values[:, 0]
        for connections in arguments.connections:
            keep = connections == "kept"
            base = dataclasses.replace(asked, messages=inferences(images, keep=keep, **limits), keep=keep)
            capacity = capacity_of(pool, base, seconds=arguments.capacity_seconds, seed=arguments.seed)
            for factor in arguments.factors:
                _log.info("%s, %g times %.0f/s", connections, factor, capacity)
                times = arrivals.poisson(factor * capacity, arguments.seconds, seed=arguments.seed)
                rows = arrivals.draw_rows(len(times), images=len(images), seed=arguments.seed)
                streams = [dataclasses.replace(base, seconds=times, rows=rows), *probes(server, arguments.seconds)]
                watched = watch(server, pool.submit(drive, streams))
                after = capacity_of(pool, base, seconds=arguments.capacity_seconds, seed=arguments.seed)
                found.append(summarize(watched, arguments, expected, connections, factor, (capacity + after) / 2))
                capacity = after
    return found


def capacity_of(pool: Executor, stream: Stream, *, seconds: float, seed: int) -> float:
    """Return the answers a second in closed loop."""
    rows = arrivals.draw_rows(MOST_CLOSED, images=len(stream.messages), seed=seed)
    closed = dataclasses.replace(stream, rows=rows, clients=CLIENTS, until=seconds)
    (outcomes,) = pool.submit(drive, [closed]).result()
    return max(1.0, float(((outcomes.status == OK) & (outcomes.done <= seconds)).sum()) / seconds)


def probes(server: Server, seconds: float) -> list[Stream]:
    """Return the requests for health and metrics, one stream for each of ``PROBES``."""
    at = np.arange(0.0, seconds, PROBE_SECONDS)
    return [
        Stream(
            port=server.admin if admin else server.http,
            messages=[message(path, keep=False)],
            rows=np.zeros(len(at), np.int64),
            seconds=at + i * PROBE_SECONDS / len(PROBES),
            keep=False,
            connections=MOST_PROBES,
        )
        for i, (path, admin) in enumerate(PROBES.values())
    ]


class Watched(NamedTuple):
    """A load, and the server meanwhile."""

    outcomes: Sequence[Outcomes]
    rss_mib: tuple[float, ...]
    """At the start, after each minute, and at the end."""
    cores: float


def watch(server: Server, running: "Future[list[Outcomes]]") -> Watched:
    """Wait for a load, printing how the server does."""
    rss, busy, started = [server.rss_mib()], server.busy(), time.monotonic()
    for turn in itertools.count(1):
        with contextlib.suppress(TimeoutError):
            running.result(max(0.0, started + turn * PROGRESS_SECONDS - time.monotonic()))
        now = server.rss_mib()
        if running.done():
            seconds = time.monotonic() - started
            return Watched(running.result(), (*rss, now), (server.busy() - busy) / seconds)
        _log.info("%.0f s, %.0f MiB", turn * PROGRESS_SECONDS, now)
        if turn * PROGRESS_SECONDS % 60 == 0:
            rss.append(now)
    raise AssertionError


def summarize(
    watched: Watched,
    arguments: argparse.Namespace,
    expected: np.ndarray,
    connections: str,
    factor: float,
    capacity: float,
) -> LoadResult:
    """Return the figures of a load."""
    asked, *probed = watched.outcomes
    answered = asked.status == OK
    ms = (asked.done - asked.scheduled) * 1e3
    late = float((asked.sent - asked.scheduled > LATE_SECONDS).mean())
    goodput = float(answered.sum()) / max(arguments.seconds, float(asked.done[answered].max(initial=0.0)))
    codes = Counter(asked.status[~answered].tolist())
    lost = codes.pop(CLOSED, 0) + codes.pop(SILENT, 0)
    reasons = (
        [f"{late:.1%} of the requests were sent more than {LATE_SECONDS * 1e3:g} ms late"] if late > MOST_LATE else []
    )
    reasons += [f"{lost} requests had no answer; the first: {asked.error or 'silence'}"] if lost else []
    times = latencies(ms[answered])
    return LoadResult(
        connections=connections,
        factor=factor,
        capacity=capacity,
        seconds=arguments.seconds,
        rate=len(asked.rows) / arguments.seconds,
        sent=len(asked.rows),
        answered=int(answered.sum()),
        refused={str(code): count for code, count in sorted(codes.items())},
        lost=lost,
        different=int((asked.values[answered, 0] != expected[asked.rows[answered]]).sum()),
        goodput=goodput,
        p50_ms=times["p50_ms"],
        p99_ms=times["p99_ms"],
        refusal_p99_ms=latencies(ms[asked.status > OK])["p99_ms"],
        bound_ms=PLACES / max(goodput, 1e-9) * 1e3 + (arguments.deadline_ms or 0.0),
        probes={
            name: float((one.done - one.scheduled)[one.status == OK].max(initial=0.0))
            for name, one in zip(PROBES, probed, strict=True)
        },
        probes_lost=sum(int((one.status != OK).sum()) for one in probed),
        rss_mib=watched.rss_mib,
        server_cores=watched.cores,
        generator_cores=asked.busy / asked.seconds,
        late_share=late,
        invalid_because=tuple(reasons),
    )


def criteria(result: Overload) -> list[Criterion]:
    """Return the targets with the measured values."""
    runs = result.runs
    over = [run for run in runs if run.factor >= OVER]
    found = [
        Criterion(
            what=f"{kind}, the slowest, in seconds",
            measured=max(time for run in runs for name, time in run.probes.items() if name.startswith(kind)),
            most=most,
        )
        for kind, most in MOST_SECONDS.items()
    ]
    found.append(
        Criterion(what="requests for health or metrics without 200", measured=sum(r.probes_lost for r in runs), most=0)
    )
    found.append(Criterion(what="requests without an answer", measured=sum(run.lost for run in runs), most=0))
    if over:
        found.append(
            Criterion(
                what="goodput over capacity, the least", measured=min(run.share for run in over), least=LEAST_GOODPUT
            )
        )
        worst = max((run.p99_ms or math.inf) / run.bound_ms for run in over)
        found.append(Criterion(what="p99 of the answered over its bound, the most", measured=worst, most=1.0))
    # The first load fills the server's pools.
    growth = max(max(run.rss_mib) for run in runs) / runs[0].rss_mib[-1] - 1
    found.append(Criterion(what="growth of resident memory after the first load", measured=growth, most=MOST_GROWTH))
    return found


COLUMNS = ("load", "rate", "goodput", "of capacity", "p50 ms", "p99 ms", "bound ms", "refused", "lost", "live s")
COLUMNS += ("ready s", "metrics s", "MiB", "server cores", "generator cores")


def cells(run: LoadResult) -> list[str]:
    """Return a row of the table: probes are the worst of both ports."""
    worst = [max(time for name, time in run.probes.items() if name.startswith(kind)) for kind in MOST_SECONDS]
    times = ["-" if value is None else f"{value:.0f}" for value in (run.p50_ms, run.p99_ms, run.bound_ms)]
    refused = ", ".join(f"{count} x {code}" for code, count in run.refused.items()) or "0"
    return [
        f"{run.connections}, {run.factor:g}x{'' if not run.invalid_because else ' (not valid)'}",
        f"{run.rate:.0f}",
        f"{run.goodput:.0f}",
        f"{run.share:.0%}",
        *times,
        refused,
        str(run.lost),
        *(f"{time:.2f}" for time in worst),
        f"{run.rss_mib[0]:.0f} to {run.rss_mib[-1]:.0f}",
        f"{run.server_cores:.2f}",
        f"{run.generator_cores:.2f}",
    ]


def show(result: Overload) -> None:
    """Print the table, and the targets."""
    cli.show(f"{result.network}, {result.machine}, {result.backend}", COLUMNS, map(cells, result.runs))
    for one in criteria(result):
        wanted = f"at least {one.least:g}" if one.least is not None else f"at most {one.most:g}"
        print(f"{'holds' if one.holds else 'FAILS'}: {one.what}: {one.measured:.3g} ({wanted})")
    for run in result.runs:
        for reason in run.invalid_because:
            print(f"not valid, {run.connections}, {run.factor:g}x: {reason}")


if __name__ == "__main__":
    cli.run(main)
