"""Evaluate a saved bundle on a split: DIR/evaluation.json, DIR/report.html and its figures as DIR/figures/*.png.

Every request of the split is answered as requests are by default, and by the base; some of them are timed.
"""

import json
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import gati_jax
from gati_jax import Bundle, InputError, data
from gati_jax.evaluation.run import BATCHES, TIMED

from . import cli
from .config import Config, build_config
from .report import draw_wall, write_report
from .results import Evaluation

_log = logging.getLogger("train.evaluate")  # not __name__, which is "__main__"
EXAMPLE = "python -m train.evaluate --bundle runs/r56/bundle --out runs/r56/eval"


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments = parser().parse_args(argv)

    bundle = cli.read_bundle(arguments)
    config = fitted_on(bundle, arguments.bundle, arguments.data_name)
    rows = getattr(config.data.splits, arguments.split)
    split = config.data.load(rows, arguments.data_dir, own=True)
    check_fingerprint(bundle, arguments.split, split)
    if split.groups is not None:
        unlike = (
            "" if bundle.certificate.by_group else ", and the certificate is by rows: nothing is promised of groups"
        )
        text = "%s: rows come in %d groups; what is shown counts rows one by one%s"
        _log.warning(text, rows, len(np.unique(split.groups)), unlike)

    found = gati_jax.evaluate(
        bundle,
        split.images,
        split.labels,
        timed=arguments.timed,
        batches=arguments.batches,
        ledger=arguments.ledger,
        reveal=arguments.reveal,
    )
    result = Evaluation.of(
        found,
        dataset=config.data.name,
        split=rows,
        network=config.base.title,
        versions=cli.versions(),
        seed=config.seed,
        date=datetime.now(UTC).date().isoformat(),
        commands=commands(bundle, config, argv),
    )
    result.write(arguments.out / "evaluation.json", print_json=arguments.json)
    write_report(arguments.out, result, draw_wall(split.images, [sample.row for sample in result.samples]))
    if not arguments.json:
        print(result.summary(f"{result.network} on {result.dataset} {result.split}"))
        print(f"written: {arguments.out / 'evaluation.json'}, {arguments.out / 'report.html'}")


def commands(bundle: Bundle, config: Config, argv: Sequence[str] | None) -> tuple[str, ...]:
    """Return the commands that made the network and the bundle, where they say so, and this evaluation."""
    ours = sys.argv if argv is None else ["train/evaluate.py", *argv]
    known = tuple(cli.command_line(words) for words in (bundle.provenance.command, ours) if words)
    return (*base_command(config.base.weights), *known)


def base_command(weights: Path | None) -> tuple[str, ...]:
    """Return the command that trained the network, if ``train.base`` did, here: it writes base.json beside weights."""
    if weights is None:
        return ()
    try:
        command = json.loads((weights.parent / "base.json").read_bytes())["command"]
    except (OSError, ValueError, TypeError, KeyError):
        return ()
    return (command,) if isinstance(command, str) else ()


def parser() -> cli.Parser:
    """Return the command line's parser."""
    p = cli.parser("Evaluate a saved bundle.", EXAMPLE)
    cli.add_bundle(p)
    splits = ("select", "certify", "test")
    p.add_argument("--split", choices=splits, default="test", help="of the bundle's config (default: test)")
    cli.add_looks(p)
    cli.add_data(p)
    p.add_argument(
        "--timed", type=cli.positive, default=TIMED, metavar="N", help="requests to time, from the first (default: 150)"
    )
    p.add_argument(
        "--batches",
        type=cli.positive,
        nargs="+",
        default=BATCHES,
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
        raise InputError(
            f"bundle: {path} does not say what it was fitted on; expected one that gati-jax fit wrote, for others there"
            " is gati_jax.evaluate(bundle, images)"
        )
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


def check_fingerprint(bundle: Bundle, name: str, split: data.Dataset) -> None:
    """Check that a split has the rows that the bundle was made with."""
    then = bundle.provenance.data_fingerprints.get(name)
    now = data.fingerprint(data.row_digests(split.images))
    if then not in {None, now}:
        raise InputError(
            f"data: expected the rows of {name} that the bundle was made with ({then}), got others ({now})"
        )


if __name__ == "__main__":
    cli.run(main)
