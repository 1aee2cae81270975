"""Print a result of ``benchmarks.compare`` or ``benchmarks.overload`` as a table of docs/results/performance.md."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gati_jax import InputError
from gati_jax.profiling.costs import spread
from train import cli

from .overload import COLUMNS, Overload, cells

EXAMPLE = "python -m benchmarks.table benchmarks/results/resnet18-cpu.json"
REFERENCE = "onnxruntime full"


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__, epilog=f"example: {EXAMPLE}")
    p.add_argument("result", type=Path, metavar="FILE", help="JSON written by one of them")
    p.add_argument(
        "--reference",
        nargs="+",
        default=[REFERENCE],
        metavar="NAME",
        help=f"ratios are to the first of these that the result has (default: {REFERENCE})",
    )
    arguments = p.parse_args(argv)
    try:
        result = json.loads(arguments.result.read_text(encoding="utf-8"))
        if "runs" in result:
            print("\n".join(markdown(COLUMNS, map(cells, Overload.read(arguments.result).runs))))
            return
        rows = result["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"result: expected JSON written by benchmarks.compare, got {arguments.result}: {error!r}"
        ) from error
    found = {row["contender"] for row in rows}
    reference = next((name for name in arguments.reference if name in found), None)
    if reference is None:
        expected = f"{' or '.join(map(repr, arguments.reference))} among the contenders, for ratios to it"
        raise InputError(f"result: expected {expected}, got {arguments.result} without")
    if reference != arguments.reference[0]:
        print(f"Ratios are to {reference}: {arguments.reference[0]} is missing.\n")
    print("\n".join(table(rows, reference)))


def table(rows: list[dict[str, Any]], reference: str = REFERENCE) -> list[str]:
    """Return the lines of the table: mean milliseconds of a batch, and the ratio to the reference's."""
    by = {(row["contender"], row["batch"]): row for row in rows}
    batches = sorted({row["batch"] for row in rows})
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    heads = ["contender", *(f"batch {batch}" for batch in batches), "accuracy", "agreement", "peak MiB"]
    lines = []
    for name in contenders:
        mine = [by[name, batch] for batch in batches]
        times = [f"{row['mean_ms']:.1f} ms ({ratio(row, by[reference, row['batch']])})" for row in mine]
        shares = [f"{mine[0][key]:.1%}" for key in ("accuracy", "agreement")]
        lines.append((name, *times, *shares, f"{mine[0]['peak_mib'] or 0:.0f}"))
    return markdown(heads, lines)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def ratio(row: dict[str, Any], other: dict[str, Any]) -> str:
    """Return the ratio of two contenders' means, with its spread over the rounds if the result has them."""
    if "round_ms" not in row:
        return f"{row['mean_ms'] / other['mean_ms']:.2f}"
    ratios = np.divide(row["round_ms"], other["round_ms"])
    return f"{np.median(ratios):.2f} +- {spread(ratios):.0%}"


if __name__ == "__main__":
    cli.run(main)
