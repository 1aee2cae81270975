"""Our cascade, our full network and ONNX Runtime's behind the same engine: latency under load, and goodput.

Every contender has a process of its own, with the load generator in it. Contenders take turns on the same arrivals,
round by round, in shuffled order. Ratios are to our full network, round by round; figures are medians over the rounds,
spreads the interquartile range over the median. Rates are shares of our full network's capacity.
"""

import argparse
import dataclasses
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import gati_jax
from gati_jax import InputError
from gati_jax.profiling import device_name
from gati_jax.profiling.costs import spread
from train import cli
from train.config import build_config

from .compare import PAUSE_SECONDS, RUNTIMES, Worker, commit, version_of, worker
from .contenders import without_caches
from .load import Load, above_0
from .served import CASCADE, CONTENDERS, FULL, ONNX

_log = logging.getLogger("benchmarks.serving")
EXAMPLE = "python -m benchmarks.serving --bundle runs/r18/bundle --out results.json"
SATURATING = 64  # clients that keep every bucket full
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.4, 2.8)
GOOD = 0.99
Rounds = dict[str, list[dict[str, Any]]]
"""By contender, the figures of every round."""


class Criterion(NamedTuple):
    """A target of the benchmark."""

    what: str
    measured: float
    least: float = 0.0
    most: float = float("inf")

    @property
    def holds(self) -> bool:
        """Whether it is met."""
        return self.least <= self.measured <= self.most


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser().parse_args(argv)
    bundle = gati_jax.load_bundle(arguments.bundle)
    config = build_config(bundle.provenance.config)
    images = config.data.load(config.data.splits.test).images[: arguments.images]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        np.save(folder / "base.npy", np.asarray(gati_jax.infer_batch(without_caches(bundle), images).class_index))
        workers: dict[str, Worker] = {}
        for name in arguments.contenders:
            given = (name, str(arguments.bundle), str(len(images)), str(folder / "base.npy"))
            started = stack.enter_context(worker(*given, module="benchmarks.served"))
            if started.ask() != "ready":
                print(f"{name} is left out: {started.last_words()}", file=sys.stderr)
            else:
                workers[name] = started
        if FULL not in workers:
            raise InputError(f"--contenders: expected {FULL!r} among those that run, for ratios to it")
        result = compare(workers, arguments)
    result |= {
        "network": config.base.network,
        "images": len(images),
        "machine": device_name(),
        "versions": cli.versions() | {name: v for name in RUNTIMES if (v := version_of(name))},
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    cli.report(result, show, out=arguments.out, as_json=arguments.json)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    p.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    p.add_argument(
        "--slo-factor", type=above_0, default=2.0, metavar="X", help="times the full network's unloaded latency"
    )
    p.add_argument("--load", type=above_0, default=0.8, metavar="SHARE", help="of the full network's capacity")
    p.add_argument("--shares", type=above_0, nargs="+", default=list(SHARES), metavar="SHARE", help="rates for goodput")
    p.add_argument("--burst", type=above_0, metavar="X", help="arrivals in bursts of X times the rate between them")
    p.add_argument("--seconds", type=above_0, default=10.0, metavar="S", help="of every load (default: 10)")
    p.add_argument(
        "--load-seconds",
        type=above_0,
        metavar="S",
        help="of the load at --load, for its tail (default: --seconds)",
    )
    p.add_argument("--rounds", type=cli.positive, default=5, metavar="N", help="(default: 5)")
    p.add_argument("--images", type=cli.positive, default=1000, metavar="N", help="test images (default: 1000)")
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    return p


def compare(workers: Mapping[str, Worker], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    seconds, rounds = arguments.seconds, arguments.rounds
    load_seconds = arguments.load_seconds or seconds
    turns = len(workers) * rounds * (load_seconds + (2 + len(arguments.shares)) * seconds)
    _log.info("%s: %.1f minutes of load", ", ".join(workers), turns / 60)
    alone = take_turns(workers, Load(kind="closed", clients=1, seconds=seconds), rounds)
    full = take_turns(workers, Load(kind="closed", clients=SATURATING, seconds=seconds), rounds)
    slo_ms = arguments.slo_factor * median(alone[FULL], "mean_ms")
    capacity = median(full[FULL], "throughput")
    kind = "bursty" if arguments.burst else "poisson"
    opened = Load(kind=kind, seconds=seconds, burst=arguments.burst or 1.0, slo_ms=slo_ms)
    loaded = take_turns(
        workers, dataclasses.replace(opened, rate=arguments.load * capacity, seconds=load_seconds), rounds
    )
    rates = [share * capacity for share in arguments.shares]
    grid = [take_turns(workers, dataclasses.replace(opened, rate=rate), rounds) for rate in rates]
    return report(alone, full, loaded, dict(zip(rates, grid, strict=True))) | {"slo_ms": slo_ms, "load": arguments.load}


def take_turns(
    workers: Mapping[str, Worker], load: Load, rounds: int, *, pause: Callable[[float], None] = time.sleep
) -> Rounds:
    """Put a load on every contender in turn; in a round all get the same arrivals."""
    results: Rounds = {name: [] for name in workers}
    order, random = list(workers), np.random.default_rng(0)
    for seed in range(rounds):
        random.shuffle(order)  # no contender always follows the same one
        for name in order:
            pause(PAUSE_SECONDS)
            results[name].append(
                workers[name].ask(json.dumps(dataclasses.asdict(dataclasses.replace(load, seed=seed))))
            )
    return results


def median(results: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the median over the rounds; infinite if one had no answers."""
    return float(np.median([np.inf if one[key] is None else one[key] for one in results]))


def report(alone: Rounds, full: Rounds, loaded: Rounds, grid: Mapping[float, Rounds]) -> dict[str, Any]:
    """Combine the figures, and check them against the criteria."""
    rows = []
    for name, results in loaded.items():
        goodput = {rate: median(by[name], "goodput") for rate, by in grid.items()}
        share = {rate: median(by[name], "goodput_share") for rate, by in grid.items()}
        row: dict[str, Any] = {"contender": name, "unloaded_ms": median(alone[name], "mean_ms")}
        row |= {"unloaded_p99_ms": median(alone[name], "p99_ms"), "capacity": median(full[name], "throughput")}
        for key in ("mean_ms", "p99_ms"):
            ratios = np.array([mine[key] / theirs[key] for mine, theirs in zip(results, loaded[FULL], strict=True)])
            row |= {key: median(results, key), f"{key[:-3]}_ratio": float(np.median(ratios))}
            row[f"{key[:-3]}_spread"] = spread(ratios)
        row |= {key: median(results, key) for key in ("rate", "agreement", "generator_cores", "late_share")}
        row |= {"exits": [one["exits"] for one in results], "goodput": max(goodput.values())}
        row |= {
            "highest_rate": max((rate for rate, value in share.items() if value >= GOOD), default=0.0),
            "by_rate": [{"rate": r, "goodput": goodput[r], "goodput_share": share[r]} for r in grid],
        }
        everything = [alone, full, loaded, *grid.values()]
        reasons = {reason for by in everything for one in by[name] for reason in one["invalid_because"]}
        rows.append(row | {"invalid_because": sorted(reasons)})
    return {"rows": rows, "criteria": [c._asdict() | {"holds": c.holds} for c in criteria(rows)]}


def criteria(rows: Sequence[Mapping[str, Any]]) -> list[Criterion]:
    """Return the cascade's targets with the measured values."""
    by = {row["contender"]: row for row in rows}
    if CASCADE not in by:
        return []
    cascade = by[CASCADE]
    latency = ((key, cascade[f"{key}_ratio"]) for key in ("mean", "p99"))
    shown = [Criterion(f"{key} latency, to our full network's", ratio, most=0.5) for key, ratio in latency]
    for name, least in ((FULL, 1.7), (ONNX, 1.2)):
        if name in by and by[name]["goodput"]:
            times = cascade["goodput"] / by[name]["goodput"]
            shown.append(Criterion(f"goodput, to {name}'s", times, least=least))
    return shown


def show(result: Mapping[str, Any]) -> None:
    """Print the tables."""
    rows = result["rows"]
    keys = ("unloaded_ms", "capacity", "rate", "mean_ms", "p99_ms", "mean_ratio", "p99_ratio", "p99_spread")
    keys += ("goodput", "highest_rate", "agreement", "generator_cores")
    cells = [(row["contender"], *(float(row[key]) for key in keys)) for row in rows]
    cli.show(
        f"{result['network']}, {result['machine']}, at {result['load']:.0%} of capacity", ("contender", *keys), cells
    )
    columns = ("rate", *(row["contender"] for row in rows))
    by_rate = zip(*(row["by_rate"] for row in rows), strict=True)
    lines = [
        (f"{at[0]['rate']:.0f}", *(f"{x['goodput']:.1f} ({x['goodput_share']:.1%})" for x in at)) for at in by_rate
    ]
    cli.show(f"goodput: answers within {result['slo_ms']:.1f} ms, a second", columns, lines)
    invalid = any(row["invalid_because"] for row in rows)
    for one in result["criteria"]:
        wanted = f"at least {one['least']}" if one["least"] else f"at most {one['most']}"
        verdict = ("holds" if one["holds"] else "FAILS") + (", but see below" if invalid else "")
        print(f"{verdict}: {one['what']}: {one['measured']:.2f} ({wanted})")
    for row in rows:
        for reason in row["invalid_because"]:
            print(f"not valid, {row['contender']}: {reason}")


if __name__ == "__main__":
    cli.run(main)
