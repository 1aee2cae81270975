"""Put a load on a running server and report latencies, throughput and goodput.

In open loop (--rate, --trace) requests are sent at their scheduled times, from which latency counts. In closed loop
(--clients) each client waits for its answer before it sends the next request. --search finds the highest rate at which
a given share of the requests is answered within the SLO.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Shaped

from benchmarks import arrivals, targets
from gati_jax import InputError, data
from gati_jax.adaptation import Trace, load_trace, save_trace
from train import cli

from .driving import Ask, closed_loop, open_loop, run
from .summary import highest, summarize

EXAMPLE = "python -m benchmarks.load --url grpc://127.0.0.1:8001 --data cifar10 --split test[:1000] --rate 150"
COLUMNS = ("mean_ms", "p50_ms", "p95_ms", "p99_ms", "p99_9_ms", "throughput", "goodput", "refused", "late")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """The parameters of a load."""

    kind: Literal["poisson", "bursty", "closed", "trace"]
    seconds: float = 20.0
    rate: float = 0.0
    clients: int = 1
    trace: str = ""
    burst: float = 5.0
    """The rate within bursts over the rate between them."""
    seed: int = 0
    warm_up: float = 1.0
    """Seconds at the start whose requests are not counted."""
    slo_ms: float | None = None


def make_trace(load: Load, images: int) -> Trace:
    """Return the requests of an open loop.

    Raises:
        InputError: A recorded trace asks for an image that does not exist.
    """
    if load.kind == "trace":
        trace = load_trace(load.trace)
        if trace.item.max() >= images:
            raise InputError(f"trace: expected items below {images}, the number of images, got {trace.item.max()}")
        return trace
    if load.kind == "bursty":
        seconds = arrivals.bursty(load.rate, load.seconds, seed=load.seed, ratio=load.burst)
    else:
        seconds = arrivals.poisson(load.rate, load.seconds, seed=load.seed)
    return arrivals.of_rows(seconds, images=images, seed=load.seed)


async def measure(
    ask: Ask,
    load: Load,
    *,
    images: int,
    expected: Int[np.ndarray, " images"] | None = None,
    cpu: Callable[[], float] = time.process_time,
) -> dict[str, Any]:
    """Put a load on a server and return the figures."""
    if load.kind == "closed":
        rows = arrivals.draw_rows(max(1000, images), images=images, seed=load.seed).tolist()
        result = await closed_loop(ask, rows, clients=load.clients, seconds=load.seconds, cpu=cpu)
    else:
        result = await open_loop(ask, make_trace(load, images), cpu=cpu)
    return summarize(result, slo_ms=load.slo_ms, expected=expected, warm_up=load.warm_up)


async def search(ask: Ask, load: Load, *, share: float, images: int) -> dict[str, Any]:
    """Return the highest rate at which ``share`` of the requests meets the SLO, and all rates tried."""
    tried: list[dict[str, Any]] = []

    async def holds(rate: float) -> bool:
        tried.append(await measure(ask, dataclasses.replace(load, rate=rate, seed=len(tried)), images=images))
        return tried[-1]["valid"] and tried[-1]["goodput_share"] >= share

    return {"highest_rate": await highest(holds, load.rate), "share": share, "slo_ms": load.slo_ms, "tried": tried}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the load."""
    arguments = parser().parse_args(argv)
    load = load_of(arguments)
    images = images_of(arguments)
    expected = expected_classes(arguments.expected, len(images)) if arguments.expected else None
    if arguments.save_trace:
        save_trace(arguments.save_trace, make_trace(load, len(images)))
    parameters = dict(arguments.parameter)

    async def against_the_server() -> dict[str, Any]:
        async with targets.server(arguments.url, arguments.model, images, parameters) as ask:
            if arguments.search:
                return await search(ask, load, share=arguments.share, images=len(images))
            return await measure(ask, load, images=len(images), expected=expected)

    result = {"load": dataclasses.asdict(load), "url": arguments.url, "parameters": parameters}
    result |= run(against_the_server())
    cli.report(result, show, out=arguments.out, as_json=arguments.json)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    p.add_argument("--url", required=True, metavar="URL", help="http://HOST:PORT or grpc://HOST:PORT")
    p.add_argument("--model", default="gati", metavar="NAME", help="the model's name there (default: gati)")
    p.add_argument("--data", metavar="NAME", help="data set, as in configs; not for a trace that has its own images")
    p.add_argument("--split", default="test", metavar="ROWS", help="its part that requests draw from (default: test)")
    p.add_argument("--data-dir", type=Path, metavar="DIR")
    p.add_argument("--expected", type=Path, metavar="FILE", help=".npy of the classes expected, int[rows]")
    p.add_argument("--parameter", type=parameter, action="append", default=[], metavar="NAME=VALUE", help="of requests")
    how = p.add_mutually_exclusive_group(required=True)
    how.add_argument("--rate", type=above_0, metavar="R", help="requests a second in open loop")
    how.add_argument("--trace", metavar="FILE", help="a recorded workload, see benchmarks/traces.py")
    how.add_argument("--clients", type=cli.positive, metavar="N", help="in closed loop")
    how.add_argument("--search", type=above_0, metavar="R", help="the highest rate that holds, beginning with R")
    p.add_argument("--burst", type=above_0, metavar="X", help="come in bursts of X times the rate between them")
    p.add_argument("--seconds", type=above_0, default=20.0, metavar="S", help="(default: 20)")
    p.add_argument("--warm-up", type=float, default=1.0, metavar="S", help="not counted (default: 1)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--slo-ms", type=above_0, metavar="MS", help="what counts as good")
    p.add_argument("--share", type=float, default=0.99, help="of requests within the SLO, for --search (default: 0.99)")
    p.add_argument("--save-trace", type=Path, metavar="FILE", help="keep what is sent, as .safetensors")
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    return p


def above_0(text: str) -> float:
    """Read a number above 0."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def parameter(text: str) -> tuple[str, str | float | bool]:
    """Read a parameter of the protocol: JSON, or else a string."""
    name, _, value = text.partition("=")
    try:
        read = json.loads(value)
    except ValueError:
        return name, value
    return name, read if isinstance(read, str | int | float) else value


def load_of(arguments: argparse.Namespace) -> Load:
    """Read the load from the command line.

    Raises:
        InputError: Options that exclude or need each other.
    """
    if arguments.search and arguments.slo_ms is None:
        raise InputError("--search: expected --slo-ms beside it, got none")
    if arguments.save_trace and arguments.rate is None:
        raise InputError("--save-trace: expected --rate beside it, got none")
    if arguments.burst and not (arguments.rate or arguments.search):
        raise InputError("--burst: expected --rate or --search beside it, got none")
    kind = "closed" if arguments.clients else "trace" if arguments.trace else "bursty" if arguments.burst else "poisson"
    names = ("seconds", "seed", "warm_up", "slo_ms", "clients", "trace", "burst")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return Load(kind=kind, rate=arguments.rate or arguments.search or 0.0, **given)


def images_of(arguments: argparse.Namespace) -> Shaped[np.ndarray, "images ..."]:
    """Read the images: the trace's own, or those of a data set.

    Raises:
        InputError: Neither is given, or both.
    """
    own = load_trace(arguments.trace).images if arguments.trace else None
    if (own is None) == (arguments.data is None):
        found = "neither" if own is None else "both"
        raise InputError(f"--data: expected a data set, or a trace with images of its own, got {found}")
    return np.asarray(data.load(arguments.data, arguments.split, arguments.data_dir).images) if own is None else own


def expected_classes(path: Path, images: int) -> Int[np.ndarray, " images"]:
    """Read the expected classes.

    Raises:
        InputError: Not one class for each image.
    """
    classes = np.load(path, allow_pickle=False)
    if classes.shape != (images,) or classes.dtype.kind not in "iu":
        found = f"{classes.dtype}{list(classes.shape)}"
        raise InputError(f"--expected: expected int[{images}], a class for each image, got {found}")
    return classes


def show(result: dict[str, Any]) -> None:
    """Print a table, and the reasons why a run is not valid."""
    runs = result.get("tried", [result])
    rows = [
        (f"{one['rate']:.1f}", *(f"{one[key]:.4g}" if one.get(key) is not None else "" for key in COLUMNS))
        for one in runs
    ]
    cli.show(result["url"], ("rate", *COLUMNS), rows)
    for one in runs:
        for reason in one["invalid_because"]:
            print(f"not valid ({one['rate']:.1f} a second): {reason}")
    if "highest_rate" in result:
        print(f"highest rate: {result['highest_rate']:.1f} a second")
    elif result["exits"]:
        print("exits:", ", ".join(f"{site}: {count}" for site, count in result["exits"].items()))


if __name__ == "__main__":
    cli.run(main)
