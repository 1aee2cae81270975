"""Images a second while training: this project's epochs beside plain PyTorch, on the same network in one run.

Each has a process of its own; they take turns in random order, a number of steps each, after a warm-up turn. Ours runs
the program of ``train.base``, with crops, flips, cutout and a moving average. PyTorch does without: it gets normalised
batches in memory and runs forward, backward and step. Ratios are ours over theirs, round by round; their spread is the
interquartile range over the median. If a spread is large, or the machine had other work at the start, the result marks
its figures as not valid.
"""

import argparse
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from gati_jax.models import NAMES
from gati_jax.profiling.costs import spread
from train import cli

from .compare import PAUSE_SECONDS, Worker, circumstances, take_turns, worker
from .training_worker import CONTENDERS, OURS

EXAMPLE = "python -m benchmarks.training --network resnet20 --batch 128 --steps 4 --rounds 7"
MOST_SPREAD = 0.2
MOST_LOAD = 0.25  # a core's, over the minute before


def main() -> None:
    """Run the benchmark."""
    arguments = parser().parse_args()
    cli.report(compare(arguments), show, out=arguments.out, as_json=arguments.json)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    others = [name for name in CONTENDERS if name != OURS]
    p.add_argument("--network", choices=NAMES, default="resnet20", help="for 32x32 images (default: resnet20)")
    p.add_argument("--batch", type=cli.positive, default=128, metavar="N", help="(default: 128)")
    p.add_argument("--steps", type=cli.positive, default=4, metavar="N", help="in a turn (default: 4)")
    p.add_argument("--rounds", type=cli.positive, default=7, metavar="N", help="(default: 7)")
    p.add_argument("--bfloat16", action="store_true", help="all contenders compute in bfloat16")
    p.add_argument(
        "--beside", nargs="+", choices=others, default=["torch eager"], metavar="NAME", help=", ".join(others)
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    return p


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the contenders and let them take turns."""
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    task = [arguments.network, str(arguments.batch), str(arguments.steps), str(int(arguments.bfloat16))]
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in (OURS, *arguments.beside):
            workers[name] = stack.enter_context(worker(name, *task, module="benchmarks.training_worker"))
            if workers[name].ask() != "ready":
                raise SystemExit(f"error: {name} did not start: {workers[name].last_words()}")
        seconds = take_turns(workers, lambda _: "turn", arguments.rounds, warm_up=1, pause=PAUSE_SECONDS)
    images = arguments.batch * arguments.steps
    rows = []
    for name, times in seconds.items():
        row = {"contender": name, "images_per_second": images / float(np.median(times)), "round_seconds": times}
        if name != OURS:
            ratio = np.array(times) / np.array(seconds[OURS])
            row |= {"ratio": float(np.median(ratio)), "spread": spread(ratio)}
        rows.append(row)
    return {
        "network": arguments.network,
        "batch": arguments.batch,
        "steps": arguments.steps,
        "bfloat16": arguments.bfloat16,
        "rows": rows,
        "load": load,
        "not_valid": doubts(load, {row["contender"]: row["spread"] for row in rows if "spread" in row}),
        **circumstances(("torch",)),
    }


def doubts(load: float, spreads: dict[str, float]) -> list[str]:
    """Return the reasons why the figures are not valid; empty if they are."""
    found = [f"the machine had other work: a load of {load:.2f} a core"] if load > MOST_LOAD else []
    wide = [f"the ratio to {name} spreads by {value:.0%}" for name, value in spreads.items() if value > MOST_SPREAD]
    return found + wide


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    rows = [
        (
            row["contender"],
            f"{row['images_per_second']:.0f}",
            *((f"{row['ratio']:.2f}", f"{row['spread']:.0%}") if "ratio" in row else ("", "")),
        )
        for row in result["rows"]
    ]
    title = f"training {result['network']}, batch {result['batch']}, {result['machine']}"
    cli.show(title, ("contender", "images/s", f"{OURS} over it", "spread"), rows)
    for doubt in result["not_valid"]:
        print(f"NOT valid: {doubt}")


if __name__ == "__main__":
    cli.run(main)
