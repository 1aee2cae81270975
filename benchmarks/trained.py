"""Print the results of ``benchmarks/gpu_all.sh`` as the Markdown tables of docs/results/performance.md.

The first has every base's accuracy, images/s and training time, and its bundle's certificate. The second compares gains
in mean latency on a GPU at 97 % of the base's accuracy with the published ones, where there are any.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gati_jax import InputError
from train import cli

from .table import markdown

EXAMPLE = "python -m benchmarks.trained runs/gpu"
GAINS = {"cifar10_resnet18": 1.28, "cifar10_resnet50": 1.63, "cifar100_resnet152": 1.21}  # arXiv:2101.07344
HEADS = ("base", "accuracy", "with flips", "images/s", "trained in s", "certified", "agreement on test", "ideal")
GAIN_HEADS = ("base", "published gain", "ours", "spread", "ideal", "conversion", "of base's accuracy")


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.trained", description=__doc__, epilog=f"example: {EXAMPLE}")
    p.add_argument("folder", type=Path, metavar="DIR", help="written by benchmarks/gpu_all.sh")
    folder = p.parse_args(argv).folder
    bases = sorted(path.parent.parent for path in folder.glob("*/base/base.json"))
    if not bases:
        raise InputError(f"folder: expected trained bases such as {folder}/cifar10_resnet18/base/base.json, got none")
    print("\n".join([*markdown(HEADS, map(base_row, bases)), "", *markdown(GAIN_HEADS, gain_rows(bases))]))


def base_row(folder: Path) -> tuple[str, ...]:
    """Return the row of a base and its bundle; steps that have not been run have dashes."""
    base = _read(folder / "base" / "base.json")
    evaluation = _read(folder / "eval" / "evaluation.json")
    certificate = evaluation.get("certificate", {})
    # A resumed run has no training time; a run that only had to finish has no images/s either.
    numbers = [base.get(key) for key in ("images_per_second", "train_seconds")]
    return (
        folder.name,
        _percent(base.get("accuracy")),
        _percent(base.get("accuracy_with_flips")),
        *("-" if number is None else f"{number:.0f}" for number in numbers),
        _percent(certificate.get("epsilon")) if certificate.get("certified", certificate.get("holds")) else "-",
        _percent(evaluation.get("cascade", {}).get("agreement")),
        _times(evaluation.get("cost", {}).get("ideal_speedup")),
    )


def gain_rows(bases: list[Path]) -> Iterator[tuple[str, ...]]:
    """Yield the published gains beside ours, measured at the operating point chosen on the certify split."""
    for folder in bases:
        result = _read(folder / "reproduce" / "reproduction.json")
        if folder.name in GAINS and result:
            ours, row = result["measured"]["accurate"], result["accurate"]["rows"][0]
            yield (
                folder.name,
                _times(GAINS[folder.name]),
                _times(ours["speedup"]),
                f"{ours['spread']:.0%}",
                _times(ours["ideal"]),
                _times(ours["speedup"] / ours["ideal"]),
                _percent(row["accuracy"] / result["base"]["accuracy"]),
            )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _times(factor: float | None) -> str:
    return "-" if factor is None else f"{factor:.2f}"


if __name__ == "__main__":
    cli.run(main)
