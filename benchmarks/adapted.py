"""What adaptation takes and saves in measured time: a trace, request by request, beside the full network.

Every request is answered as a server with one client would: input cache, cascade (tuned, where the bundle is), and the
base once more where the request is shadowed. Every so many requests the same image also goes through the cascade alone
and through the full network alone, right before or after, so that all three see the same machine load. Nothing is
refitted; where an alarm closes a cache, the base answers from then on.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

import gati_jax
from gati_jax import InputError
from gati_jax.adaptation import (
    AdaptationController,
    ControllerConfig,
    ExactCacheConfig,
    MonitorConfig,
    NearestCacheConfig,
    Trace,
    load_trace,
)
from gati_jax.certification import trial_level
from gati_jax.profiling import device_name
from gati_jax.profiling.costs import spread
from train import cli

from .contenders import without_caches

EXAMPLE = "python -m benchmarks.adapted --bundle runs/r18/bundle --trace runs/zipf.safetensors --out zipf-time.json"
PARTS = 10  # of the trace, whose ratios show the spread
WARM = 5  # uncounted calls of everything


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    p.add_argument("--trace", type=Path, required=True, metavar="FILE", help="written by benchmarks.traces")
    p.add_argument("--requests", type=cli.positive, metavar="N", help="of the trace, from its start (default: all)")
    p.add_argument("--every", type=cli.positive, default=20, metavar="N", help="requests between two comparisons")
    p.add_argument("--without", nargs="+", choices=("exact", "nearest"), default=[], metavar="LAYER")
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    arguments = p.parse_args(argv)
    bundle, trace = gati_jax.load_bundle(arguments.bundle), load_trace(arguments.trace)
    if trace.images is None:
        raise InputError(f"--trace: expected images in {arguments.trace}, got rows of a data set alone")
    config = ControllerConfig(
        monitor=MonitorConfig(epsilon=bundle.certificate.epsilon),
        exact=None if "exact" in arguments.without else ExactCacheConfig(),
        nearest=None if "nearest" in arguments.without else NearestCacheConfig(),
    )
    result = measure(bundle, trace, config, requests=arguments.requests or len(trace), every=arguments.every)
    result |= {"trace": arguments.trace.name, "machine": device_name(), "versions": cli.versions()}
    if arguments.out:
        cli.write_result(arguments.out, result)
    if arguments.json:
        print(json.dumps(result))
        return
    for key in ("n", "adapted_ms", "cascade_ms", "full_ms"):
        print(f"{key}: {result[key]:.4g}")
    for key in ("speedup", "cost"):
        print(f"{key}: {result[key]:.3f} (spread {result[key + '_spread']:.0%} over {PARTS} parts)")
    print(f"disagreement: {result['disagreement']:.3%}, alarms: {result['alarms']}")


def measure(
    bundle: gati_jax.Bundle, trace: Trace, config: ControllerConfig, *, requests: int, every: int
) -> dict[str, Any]:
    """Return mean milliseconds of a request, adapted, by the cascade alone, and by the full network."""
    assert trace.images is not None  # noqa: S101 (narrows the type)
    base = without_caches(bundle)
    controller = AdaptationController(bundle, config, level=lambda: trial_level(config.monitor.delta, 1))
    for image in trace.images[:WARM]:
        for one in (bundle, base):
            np.asarray(gati_jax.infer(one, image).logits)
    rows = min(requests, len(trace))
    adapted, cascade, full = np.zeros(rows), np.full(rows, np.nan), np.full(rows, np.nan)
    wrong: list[bool] = []
    for i, item in enumerate(trace.item[:rows].tolist()):
        image, now = trace.images[item], float(trace.seconds[i])
        compared = i % every == 0
        if compared and i % (2 * every):  # by turns before and after
            cascade[i], full[i] = timed(bundle, image)[0], timed(base, image)[0]
        began = time.perf_counter()
        answer = serve(controller, bundle, base, image, now)
        adapted[i] = time.perf_counter() - began
        if compared:
            if not i % (2 * every):
                cascade[i], full[i] = timed(bundle, image)[0], timed(base, image)[0]
            wrong.append(answer != timed(base, image)[1])
    parts = np.array_split(np.arange(rows), PARTS)
    speedups = np.array([np.nanmean(full[part]) / adapted[part].mean() for part in parts])
    costs = np.array([adapted[part].mean() / np.nanmean(cascade[part]) for part in parts])
    return {
        "n": rows,
        "compared": len(wrong),
        "adapted_ms": adapted.mean() * 1e3,
        "cascade_ms": np.nanmean(cascade) * 1e3,
        "full_ms": np.nanmean(full) * 1e3,
        "speedup": float(np.nanmean(full) / adapted.mean()),
        "speedup_spread": spread(speedups),
        "cost": float(adapted.mean() / np.nanmean(cascade)),
        "cost_spread": spread(costs),
        "disagreement": float(np.mean(wrong)),
        "alarms": controller.event_counts["alarm"],
    }


def serve(
    controller: AdaptationController, bundle: gati_jax.Bundle, base: gati_jax.Bundle, image: np.ndarray, now: float
) -> int:
    """Answer one request, and compute its shadow where it has one; return the class."""
    (ticket,) = controller.ask(image[None], now)
    if ticket.cached is not None:
        class_index, shadow = ticket.cached.class_index, controller.from_cache(ticket)
    else:
        safe = ticket.frequent or not np.isfinite(controller.served.thresholds).all()  # a cache is closed or paused
        p = gati_jax.infer(base if safe else bundle, image)
        exit_, score, logits = int(p.exit), float(p.score), np.asarray(p.logits)
        class_index, shadow = int(logits.argmax()), controller.answered(ticket, exit_, score, logits, now)
    if shadow:
        controller.shadowed(ticket, np.asarray(gati_jax.infer(base, image).logits), now)
    return class_index


def timed(bundle: gati_jax.Bundle, image: np.ndarray) -> tuple[float, int]:
    """Return the seconds that an answer takes, and its class."""
    began = time.perf_counter()
    class_index = int(np.asarray(gati_jax.infer(bundle, image).class_index))
    return time.perf_counter() - began, class_index


if __name__ == "__main__":
    cli.run(main)
