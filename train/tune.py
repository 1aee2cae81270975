"""Tune a saved bundle for this device: algorithms, compiler options, tiles. Run it again to do it anew."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import gati_jax
from gati_jax.profiling import TunedCascade, Tuning
from train import cli

EXAMPLE = "python -m train.tune --bundle runs/r56/bundle"


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    p = cli.parser("Tune a saved bundle for this device.", EXAMPLE, out=False)
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="folder written by train.caches")
    sizes, rounds = "rows in a tile, to try (default: 1 8 16)", "interleaved repeats of a timing (default: 7)"
    p.add_argument("--tiles", type=cli.positive, nargs="+", default=[1, 8, 16], metavar="N", help=sizes)
    p.add_argument("--rounds", type=cli.positive, default=7, metavar="N", help=rounds)
    arguments = p.parse_args(argv)
    bundle = gati_jax.load_bundle(arguments.bundle)
    tuning = gati_jax.tune(bundle.chain, bundle.caches, sizes=arguments.tiles, rounds=arguments.rounds)
    tuning = TunedCascade(bundle.cascade, tuning).measured(rounds=3 * arguments.rounds)
    gati_jax.save_tuning(arguments.bundle, tuning)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(tuning)))
    else:
        show(tuning)


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
