"""Print a result of ``benchmarks.compare`` as the Markdown table of docs/performance.md."""

import argparse
import json
from pathlib import Path
from typing import Any

from train import cli

EXAMPLE = "python -m benchmarks.table benchmarks/results/resnet18-cpu.json"
REFERENCE = "onnxruntime full"


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    p = argparse.ArgumentParser(description=__doc__, epilog=f"example: {EXAMPLE}")
    p.add_argument("result", type=Path, metavar="FILE", help="JSON written by benchmarks.compare")
    arguments = p.parse_args(argv)
    print("\n".join(table(json.loads(arguments.result.read_text())["rows"])))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return its lines: mean milliseconds of a batch, and the ratio to ONNX Runtime's full network."""
    by = {(row["contender"], row["batch"]): row for row in rows}
    batches = sorted({row["batch"] for row in rows})
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    heads = ("contender", *(f"batch {batch}" for batch in batches), "accuracy", "agreement", "peak MiB")
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    for name in contenders:
        mine = [by[name, batch] for batch in batches]
        ratios = [row["mean_ms"] / by[REFERENCE, row["batch"]]["mean_ms"] for row in mine]
        times = [f"{row['mean_ms']:.1f} ms ({ratio:.2f})" for row, ratio in zip(mine, ratios, strict=True)]
        shares = [f"{mine[0][key]:.1%}" for key in ("accuracy", "agreement")]
        lines.append(" | ".join((name, *times, *shares, f"{mine[0]['peak_mib'] or 0:.0f}")))
    return [f"| {line} |" for line in lines]


if __name__ == "__main__":
    cli.run(main)
