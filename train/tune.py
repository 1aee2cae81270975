"""Tune a saved bundle for this device: algorithms, compiler options, tiles. Run it again to do it anew.

The tuned answers are then compared with the certified arithmetic's on the bundle's certify rows, so that what is served
has a bound. These rows are closed, for a plan was certified on them; see ``gati_jax.certification.arithmetic``.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import gati_jax
from gati_jax import Bundle, InputError
from gati_jax.profiling import TunedCascade, Tuning
from train import cli
from train.evaluate import certify_images

EXAMPLE = "python -m train.tune --bundle runs/r56/bundle"
_log = logging.getLogger("train.tune")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    p = cli.parser("Tune a saved bundle for this device.", EXAMPLE, out=False)
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="folder written by train.caches")
    sizes, rounds = "rows in a tile, to try (default: 1 8 16)", "interleaved repeats of a timing (default: 7)"
    p.add_argument("--tiles", type=cli.positive, nargs="+", default=[1, 8, 16], metavar="N", help=sizes)
    p.add_argument("--rounds", type=cli.positive, default=7, metavar="N", help=rounds)
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="TFDS's folder, if not where the bundle was fitted")
    arguments = p.parse_args(argv)
    bundle = gati_jax.load_bundle(arguments.bundle)
    tuning = gati_jax.tune(bundle.chain, bundle.caches, sizes=arguments.tiles, rounds=arguments.rounds)
    tuning = TunedCascade(bundle.cascade, tuning).measured(rounds=3 * arguments.rounds)
    tuning = checked(bundle, tuning, arguments.bundle, arguments.data_dir)
    gati_jax.save_tuning(arguments.bundle, tuning)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(tuning)))
    else:
        show(tuning)
        print(f"Answers by default: {dataclasses.replace(bundle, tunings=(tuning,)).bound_of()}")


def checked(bundle: Bundle, tuning: Tuning, path: Path, folder: Path | None) -> Tuning:
    """Compare a tuning with the certified arithmetic, where the certify rows can be had; else say what follows."""
    try:
        return gati_jax.check_tuning(bundle, tuning, certify_images(bundle, path, folder))
    except InputError as error:
        text = "the tuning is saved, but not compared with the certified arithmetic, which stays the default: %s"
        _log.warning(text, error)
        return tuning


def show(tuning: Tuning) -> None:
    """Print what was found."""
    rows = [
        (tile.size, f"{tile.milliseconds:.3f}", f"{tile.milliseconds / tile.size:.3f}", describe(tile.algorithms))
        for tile in tuning.tiles
    ]
    cli.show(f"Tiles on {tuning.device}", ("rows", "ms", "ms a row", "algorithms"), rows)


def describe(algorithms: Mapping[str, str]) -> str:
    """List the algorithms that are not the compiler's own convolution."""
    return ", ".join(f"{kind}: {algorithm}" for kind, algorithm in algorithms.items()) or "direct"


if __name__ == "__main__":
    cli.run(main)
