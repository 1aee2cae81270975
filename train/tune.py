"""Tune a saved bundle for this device, on both backends. Run it again to do it anew.

On XLA: algorithms, compiler options, tiles. On ONNX Runtime, where it is installed and this is a CPU, there is nothing
to choose, and costs are measured. The answers of each are then compared with the certified arithmetic's on the bundle's
certify rows, so that what is served has a bound; the faster one answers by default. These rows are closed, for a plan
was certified on them; see ``gati_jax.certification.arithmetic``.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import jax

import gati_jax
from gati_jax import Bundle, InputError
from gati_jax.profiling import Backend, Tuning, onnx_tuning, onnx_unavailable, run_by

from . import cli
from .evaluate import certify_images

EXAMPLE = "python -m train.tune --bundle runs/r56/bundle"
_log = logging.getLogger("train.tune")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments = parser().parse_args(argv)
    bundle, found = cli.read_bundle(arguments), []
    for backend in to_tune(bundle, arguments.backend):
        if backend == "xla":
            tuning = gati_jax.tune(bundle.chain, bundle.caches, sizes=arguments.tiles, rounds=arguments.rounds)
        else:
            tuning = onnx_tuning(bundle.chain, bundle.caches)
        tuning = run_by(tuning, bundle.cascade).measured(rounds=3 * arguments.rounds)
        tuning = checked(bundle, tuning, arguments.bundle, arguments.data_dir, arguments.data_name)
        gati_jax.save_tuning(arguments.bundle, tuning)
        found.append(tuning)
        others = [one for one in bundle.tunings if one.device != tuning.device]
        bundle = dataclasses.replace(bundle, tunings=(*others, tuning))
    if arguments.json:
        print(json.dumps([dataclasses.asdict(tuning) for tuning in found]))
        return
    for tuning in found:
        show(tuning)
    compare(bundle)
    print(f"Answers by default: {bundle.bound_of()}")


def parser() -> cli.Parser:
    """Return the command line's parser."""
    p = cli.parser("Tune a saved bundle for this device.", EXAMPLE, out=False)
    cli.add_bundle(p)
    backends, which = ("auto", "xla", "onnxruntime"), "what to tune for (default: auto, all that can run here)"
    p.add_argument("--backend", choices=backends, default="auto", help=which)
    sizes, rounds = "rows in a tile, to try on XLA (default: 1 8 16)", "interleaved repeats of a timing (default: 7)"
    p.add_argument("--tiles", type=cli.positive, nargs="+", default=[1, 8, 16], metavar="N", help=sizes)
    p.add_argument("--rounds", type=cli.positive, default=7, metavar="N", help=rounds)
    cli.add_data(p)
    return p


def to_tune(bundle: Bundle, wanted: str) -> list[Backend]:
    """Return the backends to tune for.

    Raises:
        InputError: ONNX Runtime is wanted, and cannot run the bundle here.
    """
    if wanted == "xla":
        return ["xla"]
    why = onnx_unavailable(bundle.chain, bundle.caches)
    if wanted == "onnxruntime":
        if why:
            raise InputError(f"--backend: {why}")
        return ["onnxruntime"]
    if jax.default_backend() != "cpu" or why:
        _log.info("not for ONNX Runtime: %s", why or "there is a faster device")
        return ["xla"]
    return ["onnxruntime", "xla"]


def compare(bundle: Bundle) -> None:
    """Say which backend is the faster one, and by how much."""
    if len(bundle.tunings_here) > 1:
        first, second = bundle.tunings_here.values()
        one, many = (second.tiles[i].milliseconds / first.tiles[i].milliseconds for i in (0, -1))
        many *= first.tiles[-1].size / second.tiles[-1].size
        print(
            f"{first.backend} is preferred to {second.backend}: the whole base takes {one:.2f} times as long on the"
            f" latter for one request, and {many:.2f} times in the largest batches"
        )


def checked(bundle: Bundle, tuning: Tuning, path: Path, folder: Path | None, own: str | None = None) -> Tuning:
    """Compare a tuning with the certified arithmetic, where the certify rows can be had; else say what follows."""
    try:
        return gati_jax.check_tuning(bundle, tuning, certify_images(bundle, path, folder, own))
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
    name = "Tiles" if tuning.backend == "xla" else "Batches"
    cli.show(f"{name} on {tuning.device}", ("rows", "ms", "ms a row", "algorithms"), rows)


def describe(algorithms: Mapping[str, str]) -> str:
    """List the algorithms that are not the compiler's own convolution."""
    return ", ".join(f"{kind}: {algorithm}" for kind, algorithm in algorithms.items()) or "direct"


if __name__ == "__main__":
    cli.run(main)
