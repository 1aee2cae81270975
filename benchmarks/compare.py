"""Compare a bundle's latency with the alternatives that a user has, at several batch sizes.

Every contender has a process of its own, on the same cores, and they take turns: in each round all of them answer the
same images, so that a disturbance of the machine affects all alike. Times include converting uint8 images to the input
of the runtime, and fetching the logits. Ratios are to the first contender, round by round; their spread is the
interquartile range over the median.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np

import gati_jax
from gati_jax import Bundle
from gati_jax.profiling import device_name
from gati_jax.profiling.costs import spread
from gati_jax.profiling.speed import path_ms
from train import cli
from train.config import build_config

from .contenders import CONTENDERS

EXAMPLE = "python -m benchmarks.compare --bundle runs/r56/bundle --smaller resnet20=WEIGHTS --out results.json"
WARM_UP = 1
IMAGES_A_TURN, LEAST_CALLS = 64, 3
RUNTIMES = ("onnxruntime", "openvino", "torch", "earlyon")
CASCADE, FULL = "gati-jax cascade", ("gati-jax full", "jax.jit full")
PAUSE_SECONDS = 0.1  # the threads of the contender before keep spinning for a while


class Worker:
    """A contender's process."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        """Talk to ``process``; ``errors`` is the file of its standard error."""
        self._process, self._errors = process, errors

    def last_words(self) -> str:
        """Return the last line on its standard error."""
        self._errors.seek(0)
        return next((line.strip() for line in reversed(self._errors.readlines()) if line.strip()), "no message")

    def ask(self, line: str = "") -> Any:  # noqa: ANN401 (JSON)
        """Send a command, if there is one, and wait for the answer."""
        assert self._process.stdin is not None  # noqa: S101 (narrows the type)
        assert self._process.stdout is not None  # noqa: S101
        if line:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        return json.loads(self._process.stdout.readline() or "null")


@contextmanager
def worker(name: str, *arguments: str, module: str = "benchmarks.worker") -> Generator[Worker]:
    """Start a contender's process; it ends with the context."""
    command = [sys.executable, "-m", module, name, *arguments]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True) as process,  # noqa: S603
    ):
        try:
            yield Worker(process, errors)
        finally:
            process.kill()


def main() -> None:
    """Run the benchmark."""
    arguments = parser().parse_args()
    result = compare(arguments)
    cli.report(result, show, out=arguments.out, as_json=arguments.json)


def smaller(text: str) -> tuple[str, str]:
    """Parse NETWORK=WEIGHTS.

    Raises:
        ArgumentTypeError: The text has another form.
    """
    network, _, weights = text.partition("=")
    if not (network and weights):
        raise argparse.ArgumentTypeError(
            f"expected NETWORK=WEIGHTS, such as resnet20=resnet20.safetensors, got {text!r}"
        )
    return network, weights


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    p.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar="NAME",
        help=f"any of: {', '.join(CONTENDERS)} (default: all; those that are not installed are left out)",
    )
    p.add_argument(
        "--smaller",
        nargs="*",
        type=smaller,
        default=[],
        metavar="NETWORK=WEIGHTS",
        help="smaller networks to compare with",
    )
    p.add_argument("--batches", type=cli.positive, nargs="+", default=[1, 8, 32, 128], metavar="N")
    p.add_argument("--rounds", type=cli.positive, default=15, metavar="N", help="(default: 15)")
    p.add_argument(
        "--images", type=cli.positive, default=1000, metavar="N", help="test images to answer (default: 1000)"
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    return p


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the contenders, time them in turns, and collect their answers."""
    bundle = gati_jax.load_bundle(arguments.bundle)
    config = build_config(bundle.provenance.config)
    test = config.data.load(config.data.splits.test)
    ideal = ideal_speedups(bundle, test.images[: arguments.images], arguments.batches, arguments.rounds)
    runs = {name: (name, config.base.network, str(config.base.weights)) for name in arguments.contenders}
    for network, weights in arguments.smaller:
        for runtime in ("jax.jit full", "onnxruntime full"):
            runs[f"{runtime} {network}"] = (runtime, network, weights)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for title, (name, network, weights) in runs.items():
            started = stack.enter_context(worker(name, str(arguments.bundle), network, weights, str(arguments.images)))
            if started.ask() == "ready":
                workers[title] = started
            else:
                print(f"{title} is left out: {started.last_words()}", file=sys.stderr)
        times = {title: {} for title in workers}
        for batch in arguments.batches:
            for title, ms in time_batches(workers, batch, arguments.rounds).items():
                times[title][batch] = ms
        answers = {title: one.ask("answers") for title, one in workers.items()}
    result = report(times, answers, test.labels, config.base.network, ideal)
    certificate = {name: getattr(bundle.certificate, name) for name in ("epsilon", "delta", "certified")}
    return result | {"images": arguments.images, "certificate": certificate}


def ideal_speedups(bundle: Bundle, images: np.ndarray, batches: Sequence[int], rounds: int) -> dict[int, float]:
    """Return by batch size the speed-up of the timed images' exits if lookups took no time.

    Empty for a bundle that is not tuned: it has no measured times.
    """
    tuned = bundle.tuned
    if tuned is None:
        return {}
    exits = np.asarray(gati_jax.infer_batch(bundle, images).exit)
    ideal = {}
    for batch in batches:
        costs = tuned.costs(batch)[tuned.schedule(batch).sizes[0]]
        path = path_ms(tuned.cascade, costs)
        timed = np.arange(rounds * batch * calls_a_turn(batch)) % len(exits)
        ideal[batch] = costs.full_ms / float(np.mean([path[exit_] for exit_ in exits[timed].tolist()]))
    return ideal


def calls_a_turn(batch: int) -> int:
    """Return how many batches are timed in a turn; of small ones more, because they vary more."""
    return max(LEAST_CALLS, IMAGES_A_TURN // batch)


def time_batches(workers: Mapping[str, Worker], batch: int, rounds: int) -> dict[str, np.ndarray]:
    """Return the milliseconds of every call, [rounds, calls]; every round has other images."""
    calls = calls_a_turn(batch)
    times = take_turns(
        workers, lambda i: f"time {i * batch * calls} {batch} {calls}", rounds, warm_up=WARM_UP, pause=PAUSE_SECONDS
    )
    return {title: np.array(ms) for title, ms in times.items()}


def take_turns(
    workers: Mapping[str, Worker], command: Callable[[int], str], rounds: int, *, warm_up: int, pause: float
) -> dict[str, list[Any]]:
    """Send the same commands to all workers, round by round, in shuffled order.

    Args:
        workers: By name.
        command: The command of a round, counted from 0; warm-up rounds have the first.
        rounds: How many.
        warm_up: Rounds before, which are not counted.
        pause: Seconds before each turn.

    Returns:
        By name, the answer of every round.
    """
    answers: dict[str, list[Any]] = {name: [] for name in workers}
    order, random = list(workers), np.random.default_rng(0)
    for i in range(-warm_up, rounds):
        random.shuffle(order)  # no contender always follows the same one
        for name in order:
            time.sleep(pause)
            answer = workers[name].ask(command(max(i, 0)))
            if i >= 0:
                answers[name].append(answer)
    return answers


def report(times: Any, answers: Any, labels: Any, network: str, ideal: Mapping[int, float]) -> dict[str, Any]:  # noqa: ANN401
    """Return the result; the conversion is computed from the faster of this project's full networks."""
    first = next(iter(times))
    reference = np.array(answers.get("jax.jit full", answers[first])[0])
    rows = []
    for title, by_batch in times.items():
        classes, peak = np.array(answers[title][0]), answers[title][1]
        for batch, ms in by_batch.items():
            ratio = ms.mean(1) / times[first][batch].mean(1)
            p50, p95, p99 = np.quantile(ms, (0.5, 0.95, 0.99))
            mean = float(np.median(ms.mean(1)))
            rows.append(
                {
                    "contender": title,
                    "batch": batch,
                    "mean_ms": mean,
                    "round_ms": ms.mean(1).tolist(),
                    "p50_ms": p50,
                    "p95_ms": p95,
                    "p99_ms": p99,
                    "images_per_second": batch / mean * 1e3,
                    "ratio": float(np.median(ratio)),
                    "spread": spread(ratio),
                    "accuracy": float((classes == labels[: len(classes)]).mean()),
                    "agreement": float((classes == reference).mean()),
                    "peak_mib": peak,
                }
            )
            if title == CASCADE and batch in ideal:
                full = min(np.median(times[name][batch].mean(1)) for name in FULL if name in times)
                rows[-1] |= {"ideal": ideal[batch], "conversion": float(full / mean / ideal[batch])}
    return {
        "network": network,
        "rows": rows,
        **circumstances(RUNTIMES),
    }


def circumstances(packages: Sequence[str]) -> dict[str, Any]:
    """Return the machine, the versions (of these packages too, if installed), the commit and the date."""
    return {
        "machine": device_name(),
        "versions": cli.versions() | {name: v for name in packages if (v := version_of(name))},
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def commit() -> str:
    """Return the commit of the checkout; empty outside one."""
    head = ["git", "rev-parse", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603


def version_of(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(result: dict[str, Any]) -> None:
    """Print one table for each batch size."""
    columns = (
        "contender",
        "mean ms",
        "p50 ms",
        "p95 ms",
        "images/s",
        "ratio",
        "spread",
        "accuracy",
        "agreement",
        "conversion",
        "peak MiB",
    )
    for batch in sorted({row["batch"] for row in result["rows"]}):
        rows = [
            (
                row["contender"],
                *(f"{row[key]:.2f}" for key in ("mean_ms", "p50_ms", "p95_ms")),
                f"{row['images_per_second']:.0f}",
                f"{row['ratio']:.2f}",
                f"{row['spread']:.0%}",
                *(f"{row[key]:.2%}" for key in ("accuracy", "agreement")),
                f"{row['conversion']:.2f}" if "conversion" in row else "",
                f"{row['peak_mib'] or 0:.0f}",
            )
            for row in result["rows"]
            if row["batch"] == batch
        ]
        cli.show(f"{result['network']}, batch {batch}, {result['machine']}", columns, rows)


if __name__ == "__main__":
    cli.run(main)
