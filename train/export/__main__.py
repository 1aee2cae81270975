"""Export a saved bundle's cascades: as ONNX models, which run without JAX, or as StableHLO, which runs on JAX alone.

Exported programs compute in another arithmetic than the certified one. So their answers are compared with it on the
bundle's certify rows, as ``train.tune`` does for a tuning, and the manifest says what then holds of them.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import gati_jax
from gati_jax import Chain, InputError
from gati_jax.files import present

from .. import cli
from ..evaluate import certify_images
from .folder import export_bundle

if TYPE_CHECKING:
    from .folder import Form

EXAMPLE = "python -m train.export --bundle runs/r56/bundle --format onnx --out runs/r56/onnx"
_log = logging.getLogger("train.export")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments = parser().parse_args(argv)
    folder = present(arguments.bundle)
    if arguments.out.resolve().is_relative_to(folder):
        raise InputError(
            f"out: expected a folder outside the bundle, which would not load any more, got {arguments.out}"
        )
    form = form_of(arguments.format, folder, cli.read_chain(arguments))
    bundle = form.bundle
    images, why = None, ""
    try:
        images = np.asarray(certify_images(bundle, folder, arguments.data_dir, arguments.data_name))
    except InputError as error:
        why = str(error)
        _log.warning("nothing is certified of the export, which cannot be compared with the certified answers: %s", why)
    counts = folder / "tuning" / "exports" / f"{arguments.format}.json"
    manifest = export_bundle(form, arguments.out, images=images, why=why, counts=counts)
    if arguments.json:
        print(json.dumps(manifest))
    else:
        show(manifest, arguments.out)


def parser() -> cli.Parser:
    """Return the command line's parser."""
    p = cli.parser("Export a saved bundle's cascades.", EXAMPLE)
    cli.add_bundle(p)
    p.add_argument("--format", choices=("onnx", "stablehlo"), default="onnx", help="of the programs (default: onnx)")
    cli.add_data(p)
    return p


def form_of(name: str, folder: Path, chain: Chain | None) -> "Form":
    """Load a bundle, of a chain of one's own where one is given, and bring it into a format.

    Raises:
        InputError: A package is missing, or the bundle cannot be exported.
    """
    if name == "stablehlo":
        from .stablehlo import StableHloForm  # noqa: PLC0415 (beside the other format's packages)

        return StableHloForm(gati_jax.load_bundle(folder, chain=chain))
    try:
        from .models import OnnxForm  # noqa: PLC0415 (of the extra onnx)
    except ModuleNotFoundError as error:
        raise InputError(f"format: onnx needs the package {error.name}: pip install 'gati-jax[onnx]'") from error
    return OnnxForm(gati_jax.load_bundle(folder, chain=chain))


def show(manifest: Mapping[str, Any], out: Path) -> None:
    """Print the programs, and what holds of each plan's answers."""
    if "spans" in manifest:
        rows = [(span["file"], f"{span['start']}-{span['site']}", span["cache"] or "") for span in manifest["spans"]]
        cli.show(f"Spans in {out}", ("file", "sites", "cache"), rows)
    else:
        rows = [(program["file"], program["plan"], str(program["rows"])) for program in manifest["programs"]]
        cli.show(f"Programs in {out}", ("file", "plan", "rows"), rows)
    for name, plan in manifest["plans"].items():
        print(f"{name}: {plan['promise']}")


if __name__ == "__main__":
    cli.run(main)
