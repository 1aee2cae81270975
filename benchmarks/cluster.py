"""Simulate a cluster of many replicas on paper: a trace through ``python -m serve.ray``, without Ray.

Of each number of replicas, three runs under the same rate a replica: all is well; one replica is lost, and replaced
after some time; and a bundle is swapped, either as ``serve.ray`` does it (``both``: old and new are in memory, and
steps are slower while the new one compiles) or by taking one replica away after another (``away``). See
``benchmarks.replicas`` for the model: proxies, power of two choices, buckets. A run ends after so many requests; where
that is sooner than a replacement, figures are those while the replica is missing.

Then the alarm of one controller over all replicas, see ``benchmarks.one_controller``: how many requests and seconds
after a jump of the disagreement it comes, and how many answers were wrong until the last replica has closed. Its load
is the share of its time that the controller needs for calls and observations: at 1 and above it cannot follow, and no
delay is given. Delta is that of one controller, whatever the number of replicas; the last column bounds that of
watchers of their own in each replica, together.

Step times and shares come from a bundle, measured here, or from the result of another run (``--steps``).
"""

import argparse
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import Float64
from pydantic import Field

from gati_jax import InputError
from gati_jax.adaptation import MonitorConfig, load_trace
from train import cli
from train.results import Record

from . import arrivals, one_controller
from .compare import commit
from .load import above_0
from .one_controller import Traffic
from .replicas import ANSWERED, LOST, REFUSED, Cluster, Incident, Kind, Steps, simulate
from .summary import latencies

EXAMPLE = "python -m benchmarks.cluster --bundle runs/digits/caches/bundle --rate 1000 --out cluster.json"
REPLICAS = (1, 2, 10, 100, 1000)
EVENT = 0.25  # of a run, when something happens
Ms = Annotated[float, Field(ge=0)]


class Measured(Record):
    """Of a bundle: what simulations start from."""

    name: str
    stage_ms: dict[int, tuple[Ms, ...]]
    """By bucket, of every stage."""
    leave: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    epsilon: float
    """What is promised."""
    delta: float


class Run(Record):
    """What became of the requests of a run."""

    incident: Kind
    seconds: float
    sent: int
    goodput: float
    """Answers a second within ``--slo-ms``."""
    p50_ms: float | None
    p99_ms: float | None
    refused: int
    lost: int


class Alarm(Record):
    """One controller's alarm."""

    load: float
    """Share of its time that the controller needs; at 1 and above it cannot follow."""
    requests: float | None
    """Median, from the jump; None where most streams had no alarm after it."""
    seconds: float | None
    """Until the last replica has closed."""
    wrong: float | None
    """Disagreeing answers from the jump until then."""
    early: int
    missed: int


class Row(Record):
    """A number of replicas."""

    replicas: int
    rate: float
    runs: tuple[Run, ...]
    alarm: Alarm
    delta_alone: float
    """The most that the risk of a false alarm would be with a watcher of its own in each replica."""


class Result(Record):
    """The whole result."""

    steps: Measured
    settings: dict[str, object]
    rows: tuple[Row, ...]
    commit: str
    date: str


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate."""
    arguments = parser().parse_args(argv)
    steps = read_steps(arguments.steps) if arguments.steps else measure(arguments.bundle)
    result = Result(
        steps=steps,
        settings={name: value for name, value in vars(arguments).items() if isinstance(value, int | float | str)},
        rows=tuple(row(count, steps, arguments) for count in arguments.replicas),
        commit=commit(),
        date=datetime.now(UTC).date().isoformat(),
    )
    cli.report(result.as_json(), lambda _: show(result), out=arguments.out, as_json=arguments.json)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundle", type=Path, metavar="DIR", help="steps are measured here, shares on its test split")
    source.add_argument("--steps", type=Path, metavar="FILE", help="the JSON of another run, whose steps are taken")
    p.add_argument("--replicas", type=cli.positive, nargs="+", default=list(REPLICAS), metavar="N")
    p.add_argument("--trace", type=Path, metavar="FILE", help="arrivals, at --rate (default: independent ones)")
    ms = {"type": float, "metavar": "MS"}
    for flag, default, what in (
        ("--rate", 1000.0, "requests a second of each replica"),
        ("--seconds", 60.0, "of a run at most"),
        ("--replace-seconds", 20.0, "until a lost replica has been replaced"),
        ("--swap-seconds", 20.0, "that a replica compiles a new bundle, or is away for it"),
        ("--slower", 2.0, "times as long takes a step while a bundle compiles"),
    ):
        p.add_argument(flag, type=above_0, default=default, metavar="X", help=f"{what} (default: {default:g})")
    p.add_argument("--swap", choices=("both", "away"), default="both", help="(default: both)")
    p.add_argument("--requests", type=cli.positive, default=100_000, metavar="N", help="of a run (default: 100000)")
    p.add_argument("--per-node", type=cli.positive, default=1, metavar="N", help="replicas by proxy (default: 1)")
    p.add_argument("--any-node", action="store_true", help="proxies choose among all replicas, not their node's first")
    p.add_argument("--capacity", type=cli.positive, default=256, metavar="N", help="of each (default: 256)")
    p.add_argument("--proxy-ms", default=0.5, **ms, help="of a proxy for a request (default: 0.5)")
    p.add_argument("--app-ms", default=0.3, **ms, help="of a replica for one, besides steps (default: 0.3)")
    p.add_argument("--network-ms", default=1.0, **ms, help="from a proxy to a replica and back (default: 1)")
    p.add_argument("--alarm-ms", default=5.0, **ms, help="from the controller to a replica (default: 5)")
    p.add_argument("--controller-us", type=float, default=1000.0, metavar="US", help="for a request (default: 1000)")
    p.add_argument("--slo-ms", default=50.0, **ms, help="of goodput (default: 50)")
    p.add_argument("--streams", type=cli.positive, default=5, metavar="N", help="with a jump (default: 5)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    return p


def read_steps(path: Path) -> Measured:
    """Read the steps of another run's result.

    Raises:
        InputError: It is none.
    """
    try:
        return Measured.model_validate(json.loads(path.read_text())["steps"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"--steps: expected the JSON of another run, got {path}: {error}") from None


def measure(folder: Path) -> Measured:
    """Measure the steps of a bundle's default route by the server's runner, and its shares on the test split."""
    import gati_jax  # noqa: PLC0415 (with --steps, no network is needed)
    from serve.assemble import runner_of  # noqa: PLC0415
    from serve.engine import routes  # noqa: PLC0415
    from train.config import build_config  # noqa: PLC0415

    bundle = gati_jax.load_bundle(folder)
    made = runner_of(routes.load(bundle), 16).routes
    route = made[routes.default(made)]
    config = build_config(bundle.provenance.config)
    exits = np.asarray(gati_jax.infer_batch(bundle, config.data.load(config.data.splits.test).images).exit)
    entering = [int((exits >= exit_).sum()) for exit_ in route.exits]
    leave = [float((exits == exit_).sum()) / max(1, n) for exit_, n in zip(route.exits, entering, strict=True)]
    return Measured(
        name=route.name,
        stage_ms=dict(route.stage_ms),
        leave=(*leave[:-1], 1.0),
        epsilon=route.epsilon or bundle.certificate.epsilon,
        delta=bundle.certificate.delta,
    )


def times(arguments: argparse.Namespace, rate: float) -> Float64[np.ndarray, " n"]:
    """Return when requests come: the trace's times, or a Poisson process's, at this rate."""
    count = max(1, min(arguments.requests, round(rate * arguments.seconds)))
    if arguments.trace is None:
        return arrivals.poisson(rate, count / rate, seed=arguments.seed, count=count)
    recorded = load_trace(arguments.trace).seconds
    length = max(float(recorded[-1]) * len(recorded) / max(1, len(recorded) - 1), 1e-9)
    rounds = math.ceil(count / len(recorded))  # played again where it is too short
    played = (recorded[None, :] + length * np.arange(rounds)[:, None]).ravel()[:count]
    return played * (len(recorded) / length / rate)


def row(count: int, steps: Measured, arguments: argparse.Namespace) -> Row:
    """Simulate a number of replicas."""
    cluster = Cluster(
        replicas=count,
        per_node=arguments.per_node,
        any_node=arguments.any_node,
        capacity=arguments.capacity,
        proxy_ms=arguments.proxy_ms,
        app_ms=arguments.app_ms,
        network_ms=arguments.network_ms,
    )
    rate, known = arguments.rate * count, Steps(stage_ms=steps.stage_ms, leave=steps.leave)
    at = times(arguments, rate)
    begins = EVENT * float(at[-1])
    incidents = (
        Incident(),
        Incident("lost", begins, arguments.replace_seconds),
        Incident(arguments.swap, begins, arguments.swap_seconds, arguments.slower),
    )
    runs = [run(cluster, known, at, incident, arguments) for incident in incidents]
    latency = (runs[0].p50_ms or 0.0) / 1e3
    alarm = watch(count, rate, latency, steps, arguments)
    return Row(replicas=count, rate=rate, runs=tuple(runs), alarm=alarm, delta_alone=min(1.0, count * steps.delta))


def run(
    cluster: Cluster, steps: Steps, at: Float64[np.ndarray, " n"], incident: Incident, arguments: argparse.Namespace
) -> Run:
    """Simulate one stream."""
    found = simulate(cluster, steps, at, incident, seed=arguments.seed)
    answered = found.status == ANSWERED
    ms, seconds = (found.done - at)[answered] * 1e3, float(at[-1])
    all_ms = latencies(ms)
    return Run(
        incident=incident.kind,
        seconds=seconds,
        sent=len(at),
        goodput=float((ms <= arguments.slo_ms).sum()) / seconds,
        p50_ms=all_ms["p50_ms"],
        p99_ms=all_ms["p99_ms"],
        refused=int((found.status == REFUSED).sum()),
        lost=int((found.status == LOST).sum()),
    )


def watch(count: int, rate: float, latency: float, steps: Measured, arguments: argparse.Namespace) -> Alarm:
    """Watch streams with a jump, as one controller would."""
    load = rate * arguments.controller_us / 1e6
    if load >= 1:
        return Alarm(load=load, requests=None, seconds=None, wrong=None, early=0, missed=0)
    config = MonitorConfig(epsilon=steps.epsilon, delta=steps.delta, in_flight=count * arguments.capacity, drift=False)
    hits = float(1 - np.prod(1 - np.array(steps.leave[:-1])))
    closing = arguments.alarm_ms / 1e3 + latency
    risk = Traffic.jump * steps.epsilon
    if hits < risk:
        raise InputError(f"--bundle: expected caches that answer {risk:.0%} of the requests or more, got {hits:.0%}")
    traffic = Traffic(rate=rate, latency=latency, hits=hits)
    delays = [one_controller.delay(traffic, config, seed=seed) for seed in range(arguments.streams)]
    watched = [one.requests if one.raised else math.inf for one in delays if not one.early]
    requests = float(np.median(watched)) if watched else math.inf
    seconds = requests / rate + closing
    came = math.isfinite(requests)
    return Alarm(
        load=load,
        requests=requests if came else None,
        seconds=seconds if came else None,
        wrong=seconds * rate * risk if came else None,
        early=sum(one.early for one in delays),
        missed=sum(not one.raised for one in delays),
    )


def cell(value: float | None) -> str:
    """Return a number as the tables show it."""
    return "-" if value is None else f"{value:.4g}"


def show(result: Result) -> None:
    """Print both tables."""
    columns = ("replicas", "rate", "incident", "seconds", "goodput", "p50 ms", "p99 ms", "refused", "lost")
    rows = [
        (str(one.replicas), f"{one.rate:.0f}", run.incident, f"{run.seconds:.2f}", f"{run.goodput:.0f}",
         cell(run.p50_ms), cell(run.p99_ms), str(run.refused), str(run.lost))
        for one in result.rows for run in one.runs
    ]  # fmt: skip
    cli.show(f"simulated, {result.steps.name}", columns, rows)
    columns = ("replicas", "controller's load", "alarm after requests", "closed after s", "wrong until then", "delta")
    alarms = [
        (str(one.replicas), f"{one.alarm.load:.2f}", cell(one.alarm.requests), cell(one.alarm.seconds),
         cell(one.alarm.wrong), f"{result.steps.delta:g}", f"{one.delta_alone:g}")
        for one in result.rows
    ]  # fmt: skip
    cli.show(f"alarm, {result.steps.epsilon:.2%} promised", (*columns, "delta, watchers alone"), alarms)


if __name__ == "__main__":
    cli.run(main)
