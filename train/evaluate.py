"""Evaluate a saved bundle on a split: DIR/evaluation.json and DIR/report.html.

Every request of the split is answered as requests are by default, and by the base; some of them are timed.
"""

import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import ArrayLike

import gati_jax
from gati_jax import Bundle, Certificate, InputError, Prediction, data
from gati_jax.certification import AnyLedger, find_ledger
from train import cli, latency

from .config import Config, build_config
from .results import BaseQuality, CascadeQuality, EvaluatedCertificate, Evaluation, Exit, Memory, Oracle, ServedResult

_log = logging.getLogger("train.evaluate")
EXAMPLE = "python -m train.evaluate --bundle runs/r56/bundle --out runs/r56/eval"
CHUNK = 250
FULL = {
    "reference": "XLA's reference programs",
    "tuned": "tuned like the cascade",
    "xla": "the best of XLA's programs",
    "onnxruntime": "ONNX Runtime",
}
SLOW = 1.3


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments = parser().parse_args(argv)

    # --- Bundle and data --------------------------------------------------------------------------------------------
    bundle = cli.read_bundle(arguments)
    config = fitted_on(bundle, arguments.bundle, arguments.data_name)
    rows = getattr(config.data.splits, arguments.split)
    split = config.data.load(rows, arguments.data_dir, own=True)
    check_fingerprint(bundle, arguments.split, split)
    close_shown(arguments.ledger, bundle, split.images, arguments.split, reveal=arguments.reveal)
    if arguments.split == "select":
        _log.warning("the plan was composed on select, with other selectors: its agreement here says little")

    # --- Answers ----------------------------------------------------------------------------------------------------
    prediction = answers(bundle, split.images)
    exits = np.asarray(prediction.exit)
    _log.info("replaying the %d requests through the base and every cache", len(split))
    table = gati_jax.replay(bundle.chain, bundle.cascade.caches, split.images, labels=split.labels)
    speed, measured = latency.measure(bundle, split.images, exits, arguments.batches, arguments.timed)

    # --- Result -----------------------------------------------------------------------------------------------------
    agrees = np.asarray(prediction.class_index == table.answers)
    quality = CascadeQuality(accuracy=accuracy(prediction.class_index, table.labels), agreement=float(agrees.mean()))
    result = Evaluation(
        dataset=config.data.name,
        split=rows,
        network=config.base.title,
        n=len(table),
        base=BaseQuality(accuracy=accuracy(table.answers, table.labels)),
        cascade=quality,
        certificate=evaluated(bundle.certificate, quality.agreement),
        served=ServedResult.of(bound := bundle.bound_of(), text=str(bound)),
        exits=tuple(exit_of(site, exits == site, agrees) for site in (*bundle.cascade.sites, len(bundle.chain))),
        cost=latency.cost(exits, speed, measured),
        memory=Memory(base_bytes=bundle.chain.bytes, cache_bytes=sum(c.bytes for c in bundle.cascade.caches)),
        oracle=Oracle(saved_share=latency.oracle_saved_share(table, speed)),
        versions=cli.versions(),
        seed=config.seed,
        date=datetime.now(UTC).date().isoformat(),
    )
    result.write(arguments.out / "evaluation.json", print_json=arguments.json)
    (arguments.out / "report.html").write_text(render(result.as_json()), encoding="utf-8")
    if not arguments.json:
        show(result)
        print(f"written: {arguments.out / 'evaluation.json'}, {arguments.out / 'report.html'}")


def parser() -> cli.Parser:
    """Return the command line's parser."""
    p = cli.parser("Evaluate a saved bundle.", EXAMPLE)
    cli.add_bundle(p)
    splits = ("select", "certify", "test")
    p.add_argument("--split", choices=splits, default="test", help="of the bundle's config (default: test)")
    cli.add_looks(p)
    cli.add_data(p)
    p.add_argument(
        "--timed", type=cli.positive, default=150, metavar="N", help="requests to time, from the first (default: 150)"
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


def fitted_on(bundle: Bundle, path: Path, own: str | None = None) -> Config:
    """Return the experiment that a bundle comes from.

    Args:
        bundle: The bundle.
        path: Its folder, for messages.
        own: The data's name as the user gives it: code that a bundle names is run only if it is the same.

    Raises:
        InputError: It does not say, or its data come from code that the user has not named.
    """
    if not bundle.provenance.config:
        raise InputError(f"bundle: {path} does not say what it was fitted on; expected one written by train.caches")
    config = build_config(bundle.provenance.config)
    if own != config.data.name and (own is not None or config.data.names_code):
        why = ": that is code, which a bundle cannot ask to run" if config.data.names_code else ""
        raise InputError(
            f"--data-name: expected {config.data.name}, on which {path} was fitted{why}, got {own or 'nothing'}"
        )
    return config


def certify_images(bundle: Bundle, path: Path, folder: Path | None, own: str | None = None) -> data.Images:
    """Return the images that a bundle was certified on.

    Raises:
        InputError: They cannot be had, or are others now.
    """
    config = fitted_on(bundle, path, own)
    certify = config.data.load(config.data.splits.certify, folder, own=True)
    check_fingerprint(bundle, "certify", certify)
    return certify.images


def close_shown(ledger: AnyLedger, bundle: Bundle, images: data.Images, name: str, *, reveal: bool) -> None:
    """Close the rows that are about to be shown: a plan that is chosen by what they show cannot be certified on them.

    Raises:
        InputError: They are the certify rows, some are open, and that they are closed is not what was asked for.
    """
    rows, counted = data.row_digests(images), find_ledger(ledger)
    if counted is None:
        _log.warning("no ledger knows that these rows are shown: certify no plan on them that was chosen by it")
        return
    if name == "certify" and not reveal and len(counted.still_open(rows)):
        raise InputError(
            "split: expected test, or certify with --reveal, which closes these rows for other plans: what they show"
            " could decide what is certified on them next"
        )
    plans = {name: (plan, bundle.certificates[name].epsilon) for name, plan in bundle.plans.items()}
    counted.reveal(rows, plans, bundle.certificate.delta)
    _log.info("these rows certify no other plan from now on, by %s", counted.path or "this process")


def answers(bundle: Bundle, images: data.Images) -> Prediction:
    """Answer as requests are answered by default: ``Evaluation.served`` says what holds of it."""
    starts = cli.track(range(0, len(images), CHUNK), "answering")
    chunks = [gati_jax.infer_batch(bundle, images[i : i + CHUNK]) for i in starts]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)


def check_fingerprint(bundle: Bundle, name: str, split: data.Dataset) -> None:
    """Check that a split has the rows that the bundle was made with."""
    then = bundle.provenance.data_fingerprints.get(name)
    now = data.fingerprint(data.row_digests(split.images))
    if then not in {None, now}:
        raise InputError(
            f"data: expected the rows of {name} that the bundle was made with ({then}), got others ({now})"
        )


def evaluated(certificate: Certificate, agreement: float) -> EvaluatedCertificate:
    """Return the certificate, and whether its bound holds on this split."""
    holds = certificate.certified and 1 - agreement <= certificate.mean_bound
    return EvaluatedCertificate.of(certificate, holds=holds)


def exit_of(site: int, here: np.ndarray, agrees: np.ndarray) -> Exit:
    """Summarise the requests that leave at a site: which do, and which of all agree with the base, are bool[n]."""
    agreement = float(agrees[here].mean()) if here.any() else None
    return Exit(exit=site, hits=int(here.sum()), hit_rate=float(here.mean()), agreement=agreement)


def accuracy(classes: ArrayLike, labels: np.ndarray | None) -> float | None:
    """Return the share of right classes, where labels are known."""
    return None if labels is None else float(np.mean(np.asarray(classes) == labels))


def show(result: Evaluation) -> None:
    """Print the result tables."""
    rows = [
        (e.exit, e.hits, f"{e.hit_rate:.1%}", "-" if e.agreement is None else f"{e.agreement:.2%}")
        for e in result.exits
    ]
    title = f"{result.network} on {result.dataset} {result.split}"
    cli.show(title, ("exit", "requests", "share", "agreement with the base"), rows)
    certificate, cost, memory = result.certificate, result.cost, result.memory
    one_by_one, *_ = cost.measured
    base, cascade = result.base.accuracy, result.cascade.accuracy
    holds = "holds" if certificate.holds else "does NOT hold"
    bound = f"{certificate.promise}, delta {certificate.delta}, {certificate.basis}: {holds} here"
    times = f"{one_by_one.full_ms:.3f} -> {one_by_one.cascade_ms:.3f} ms, spread {one_by_one.spread:.0%}"
    over = f"over the fastest full network here ({FULL[one_by_one.full]})"
    lost = "no labels, or nothing certified"
    if gap := certificate.accuracy_gap:
        lost = f"{gap.upper:.4f}, delta {gap.delta} ({gap.mean:.4f} of {gap.n} certify requests)"
    lines = [
        ("agreement with the base", f"{result.cascade.agreement:.4f} of {result.n} requests"),
        ("accuracy, base -> cascade", "no labels" if base is None else f"{base:.4f} -> {cascade:.4f}"),
        ("accuracy, lost at most", lost),
        ("certificate", bound if certificate.certified else "nothing certified: the base answers every request"),
        ("answers by default", result.served.text if result.served else "-"),
        ("ideal speed-up", f"{cost.ideal_speedup:.3f}"),
        ("measured speed-up, batch 1", f"{one_by_one.speedup:.3f} ({times})"),
        ("conversion", f"{one_by_one.conversion:.3f}, {over}"),
        ("memory, base + caches", f"{memory.base_bytes / 1e6:.2f} + {memory.cache_bytes / 1e6:.2f} MB"),
    ]
    if (slow := one_by_one.reference_ms) and slow > SLOW * one_by_one.full_ms:
        print(
            f"XLA's reference programs take {slow / one_by_one.full_ms:.1f} times as long as the fastest full network"
            f" here ({FULL[one_by_one.full]}): speed-ups are over the latter"
        )
    cli.show("Result", ("", "value"), lines)
    if one_by_one.numerics == "fast":
        keys = ("full_ms", "cascade_ms", "predicted_ms", "speedup", "ideal", "conversion", "spread")
        rows = [(row.batch, row.full, *(f"{getattr(row, key):.3f}" for key in keys)) for row in cost.measured]
        titles = ("batch", "full", "full ms", "cascade ms", "predicted ms", "speed-up", "ideal", "conversion", "spread")
        cli.show(f"Tuned for this device: {one_by_one.backend}", titles, rows)


def render(evaluation: Mapping[str, Any]) -> str:
    """Return an ``evaluation.json`` as one HTML page without scripts or outside files. Every value is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = lambda value, digits=2: "-" if value is None else f"{value:.{digits}%}"
    return environment.get_template("evaluation.html.jinja").render(evaluation)


if __name__ == "__main__":
    cli.run(main)
