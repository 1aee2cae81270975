"""One request at a time: a bundle's cascade beside the full networks that it replaces.

Contenders take turns on the same images: the plain jitted network, the public ``infer``, and its program without the
checks around it. Ratios are over the plain network; their spread is that of the rounds.
"""

import argparse
import functools
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gati_jax
from gati_jax import data
from gati_jax.runtime import predict_one, time_interleaved
from gati_jax.runtime.measure import device_name, spread
from train import cli
from train.config import build_config

EXAMPLE = "python -m benchmarks.single --bundle runs/r56/bundle"


def main() -> None:
    """Run the benchmark."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.single",
        description=__doc__,
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    p.add_argument("--requests", type=cli.positive, default=100, metavar="N", help="test images to time (default: 100)")
    p.add_argument("--rounds", type=cli.positive, default=7, metavar="N", help="times each (default: 7)")
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    p.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = p.parse_args()

    bundle = gati_jax.load_bundle(arguments.bundle)
    config = build_config(bundle.provenance.config)
    images = data.load(config.data.name, config.data.splits.test, config.data.dir).images[: arguments.requests]
    plain = jax.jit(lambda chain, image: chain(chain.prepare(image[None])))
    contenders = {
        "plain jax.jit": lambda image: plain(bundle.chain, image),
        "gati_jax.infer": functools.partial(gati_jax.infer, bundle),
        "its program": lambda image: predict_one(bundle.cascade, image),
    }
    result = compare(contenders, images, arguments.rounds) | {
        "network": config.base.network,
        "device": device_name(),
        "batch": 1,
        "requests": len(images),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": cli.versions(),
    }
    if arguments.out:
        cli.write_result(arguments.out, result)
    if arguments.json:
        print(json.dumps(result))
        return
    columns = ("contender", "mean ms", "p50 ms", "p95 ms", "speed-up", "spread")
    rows = [
        (name, *(f"{row[k]:.3f}" for k in ("mean_ms", "p50_ms", "p95_ms", "speedup")), f"{row['spread']:.0%}")
        for name, row in result["contenders"].items()
    ]
    cli.show(f"{config.base.network}, batch 1, {device_name()}", columns, rows)


def compare(contenders: dict[str, Any], images: np.ndarray, rounds: int) -> dict[str, Any]:
    """Time every contender on every image; a request's time is its median over the rounds."""
    times: dict[str, list[np.ndarray]] = {name: [] for name in contenders}
    for image in images:
        on_device = jnp.asarray(image)
        programs = {name: functools.partial(contender, on_device) for name, contender in contenders.items()}
        for name, ms in time_interleaved(programs, rounds=rounds).items():
            times[name].append(ms)
    first = np.stack(times[next(iter(contenders))])
    rows = {}
    for name, ms in times.items():
        by_request = np.median(np.stack(ms), axis=1)
        ratio = first.mean(0) / np.stack(ms).mean(0)
        rows[name] = {
            "mean_ms": float(by_request.mean()),
            "p50_ms": float(np.quantile(by_request, 0.5)),
            "p95_ms": float(np.quantile(by_request, 0.95)),
            "speedup": float(np.median(first, axis=1).mean() / by_request.mean()),
            "spread": spread(ratio),
        }
    return {"contenders": rows}


if __name__ == "__main__":
    cli.run(main)
