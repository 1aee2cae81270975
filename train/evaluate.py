"""Evaluate a saved bundle on a split: DIR/evaluation.json and DIR/report.html.

Every request of the split is answered by the jitted cascade and by the base; a sample of them is timed, one at a time.
"""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

import gati_jax
from gati_jax import Bundle, InputError, Prediction, data
from gati_jax.planning import ReplayTable
from gati_jax.profiling import measure_speed
from gati_jax.report import render
from train import cli, latency

from .caches import gap_entry
from .config import Config, build_config

_log = logging.getLogger("train.evaluate")
EXAMPLE = "python -m train.evaluate --bundle runs/r56/bundle --out runs/r56/eval"
CHUNK = 250


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments = parser().parse_args(argv)

    # --- Bundle and data --------------------------------------------------------------------------------------------
    bundle = gati_jax.load_bundle(arguments.bundle)
    config = fitted_on(bundle, arguments.bundle)
    rows = getattr(config.data.splits, arguments.split)
    split = data.load(config.data.name, rows, arguments.data_dir or config.data.dir)
    check_fingerprint(bundle, arguments.split, split)
    if arguments.split == "select":
        _log.warning("the plan was composed on select, with other selectors: its agreement here says little")

    # --- Answers ----------------------------------------------------------------------------------------------------
    prediction = answers(bundle, split.images)
    exits = np.asarray(prediction.exit)
    _log.info("the base and every cache answer the %d requests alone", len(split))
    table = gati_jax.replay(bundle.chain, bundle.cascade.caches, split.images, labels=split.labels)
    timed = split.images[: arguments.timed]
    _log.info("timing %d requests, one at a time", len(timed))
    speed = measure_speed(bundle.cascade, timed, tuned=bundle.tuned)
    fast = latency.fast(bundle, split.images, exits, arguments.batches, arguments.timed)

    # --- Result -----------------------------------------------------------------------------------------------------
    result = {
        "dataset": config.data.name,
        "split": rows,
        "network": config.base.network,
        **quality(bundle, prediction, table),
        "cost": latency.cost(bundle, exits, speed, fast),
        "memory": {"base_bytes": bundle.chain.bytes, "cache_bytes": sum(c.bytes for c in bundle.cascade.caches)},
        "versions": cli.versions(),
        "seed": config.seed,
        "date": datetime.now(UTC).date().isoformat(),
    }
    result["oracle"] = {"saved_share": latency.oracle_saved_share(table, speed)}
    cli.write_result(arguments.out / "evaluation.json", result)
    (arguments.out / "report.html").write_text(render(result), encoding="utf-8")
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)
        print(f"written: {arguments.out / 'evaluation.json'}, {arguments.out / 'report.html'}")


def parser() -> cli.Parser:
    """Return what the command line may say."""
    p = cli.parser("Evaluate a saved bundle.", EXAMPLE)
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="folder written by train.caches")
    p.add_argument(
        "--split",
        choices=("select", "certify", "test"),
        default="test",
        help="split of the bundle's config (default: test)",
    )
    p.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="TensorFlow Datasets folder, if it is not where the bundle was fitted",
    )
    p.add_argument(
        "--timed",
        type=cli.positive,
        default=150,
        metavar="N",
        help="requests to time, from the split's first on (default: 150)",
    )
    p.add_argument(
        "--batches",
        type=cli.positive,
        nargs="+",
        default=[1, 8, 32, 128],
        metavar="N",
        help="batch sizes to time where the bundle has been tuned for this device (default: 1 8 32 128)",
    )
    return p


def fitted_on(bundle: Bundle, path: Path) -> Config:
    """Return the experiment that a bundle comes from.

    Raises:
        InputError: It does not say.
    """
    if not bundle.provenance.config:
        raise InputError(f"bundle: {path} does not say what it was fitted on; expected one written by train.caches")
    return build_config(bundle.provenance.config)


def answers(bundle: Bundle, images: np.ndarray) -> Prediction:
    """Answer in the certified arithmetic, even where the bundle is tuned: quality, times and certificate agree."""
    starts = cli.track(range(0, len(images), CHUNK), "answering")
    chunks = [gati_jax.infer_batch(bundle, images[i : i + CHUNK], numerics="reference") for i in starts]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)


def check_fingerprint(bundle: Bundle, name: str, split: data.Dataset) -> None:
    """Check that a split that the bundle was made with still has the same rows.

    Raises:
        InputError: It has others.
    """
    then = bundle.provenance.data_fingerprints.get(name)
    now = data.fingerprint(data.row_digests(split.images))
    if then not in {None, now}:
        raise InputError(
            f"data: expected the rows of {name} that the bundle was made with ({then}), got others ({now})"
        )


def quality(bundle: Bundle, prediction: Prediction, table: ReplayTable) -> dict[str, Any]:
    """Say how often the cascade agrees with the base, with the labels, and at which exits."""
    agrees = prediction.class_index == table.answers
    certificate = bundle.certificate
    exits = []
    for exit_ in (*bundle.cascade.sites, len(bundle.chain)):
        here = prediction.exit == exit_
        share = float(agrees[here].mean()) if here.any() else None
        exits.append({"exit": exit_, "hits": int(here.sum()), "hit_rate": float(here.mean()), "agreement": share})
    return {
        "n": len(table),
        "base": {"accuracy": accuracy(table.answers, table.labels)},
        "cascade": {"accuracy": accuracy(prediction.class_index, table.labels), "agreement": float(agrees.mean())},
        "certificate": {
            **{
                name: getattr(certificate, name)
                for name in ("name", "epsilon", "delta", "n", "disagreements", "method", "numerics", "looks", "plans")
            },
            **gap_entry(certificate),
            "certified": certificate.certified,
            "base_saw_data": certificate.base_saw_data,
            "holds": bool(certificate.certified and 1 - agrees.mean() <= certificate.epsilon),
        },
        "exits": exits,
    }


def loss(gap: dict[str, Any] | None) -> str:
    """Say how much accuracy may be lost."""
    if gap is None:
        return "no labels, or nothing certified"
    return f"{gap['upper']:.4f}, delta {gap['delta']} ({gap['mean']:.4f} of {gap['n']} certify requests)"


def accuracy(classes: ArrayLike, labels: np.ndarray | None) -> float | None:
    """Return the share of right classes, where labels are known."""
    return None if labels is None else float(np.mean(np.asarray(classes) == labels))


def show(result: dict[str, Any]) -> None:
    """Print the result table."""
    rows = [
        (e["exit"], e["hits"], f"{e['hit_rate']:.1%}", "-" if e["agreement"] is None else f"{e['agreement']:.2%}")
        for e in result["exits"]
    ]
    cli.show(
        f"{result['network']} on {result['dataset']} {result['split']}",
        ("exit", "requests", "share", "agreement with the base"),
        rows,
    )
    certificate, measured = result["certificate"], result["cost"]["measured"][0]
    labelled = result["base"]["accuracy"] is not None
    base, cascade = result["base"]["accuracy"], result["cascade"]["accuracy"]
    holds = "holds" if certificate["holds"] else "does NOT hold"
    bound = f"disagreement <= {certificate['epsilon']}, delta {certificate['delta']}: {holds} here"
    times = f"{measured['full_ms']:.3f} -> {measured['cascade_ms']:.3f} ms, spread {measured['spread']:.0%}"
    over = f"over the {measured['full']} full network"
    over += ", which is faster than the reference one" if measured["full"] == "tuned" else ""
    memory = result["memory"]
    lines = [
        ("agreement with the base", f"{result['cascade']['agreement']:.4f} of {result['n']} requests"),
        ("accuracy, base -> cascade", f"{base:.4f} -> {cascade:.4f}" if labelled else "no labels"),
        ("accuracy, lost at most", loss(certificate["accuracy_gap"])),
        ("certificate", bound if certificate["certified"] else "nothing certified: the base answers every request"),
        ("ideal speed-up", f"{result['cost']['ideal_speedup']:.3f}"),
        ("measured speed-up, batch 1", f"{measured['speedup']:.3f} ({times})"),
        ("conversion", f"{measured['conversion']:.3f}, {over}"),
        ("memory, base + caches", f"{memory['base_bytes'] / 1e6:.2f} + {memory['cache_bytes'] / 1e6:.2f} MB"),
    ]
    cli.show("Result", ("", "value"), lines)
    if fast := result["cost"]["measured"][1:]:
        keys = ("full_ms", "cascade_ms", "predicted_ms", "speedup", "ideal", "conversion", "spread")
        rows = [(row["batch"], row["full"], *(f"{row[key]:.3f}" for key in keys)) for row in fast]
        titles = ("batch", "full", "full ms", "cascade ms", "predicted ms", "speed-up", "ideal", "conversion", "spread")
        cli.show("Tuned for this device", titles, rows)


if __name__ == "__main__":
    cli.run(main)
