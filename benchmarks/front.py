"""Draw a result of ``benchmarks.compare``: accuracy, and agreement with the full network, against latency.

The line joins the Pareto front: the contenders that no other beats in both.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from train import cli

EXAMPLE = "python -m benchmarks.front benchmarks/results/resnet56-cpu.json --out docs/figures/resnet56-cpu.svg"
OURS = "#c2410c"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.front", description=__doc__, epilog=f"example: {EXAMPLE}")
    p.add_argument("result", type=Path, metavar="FILE", help="JSON written by benchmarks.compare")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="figure to write: .svg, .png or .pdf")
    arguments = p.parse_args(argv)
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    mpl.rcParams |= {"svg.hashsalt": "gati-jax", "svg.fonttype": "none"}  # the same result gives the same file
    figure = draw(result)
    metadata = {"Date": None} if arguments.out.suffix == ".svg" else {}
    figure.savefig(arguments.out, bbox_inches="tight", metadata=metadata)
    print(f"written: {arguments.out}")


def draw(result: dict[str, Any]) -> Any:  # noqa: ANN401 (a Figure)
    """Return one column for each batch size, one row for each measure."""
    batches = sorted({row["batch"] for row in result["rows"]})
    figure, axes = plt.subplots(2, len(batches), figsize=(3.6 * len(batches), 8), sharey="row", squeeze=False)
    for column, batch in enumerate(batches):
        rows = [row for row in result["rows"] if row["batch"] == batch]
        for at, measure in zip(axes[:, column], ("accuracy", "agreement"), strict=True):
            scatter(at, rows, measure, batch)
        axes[0, column].set_title(f"batch {batch}")
    axes[0, 0].set_ylabel(f"accuracy, first {result['images']} test images")
    axes[1, 0].set_ylabel(f"agreement with {result['network']}")
    figure.suptitle(f"{result['network']}, {result['machine']}, {result['date']}: mean latency")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=5, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    return figure


def scatter(at: Any, rows: list[dict[str, Any]], measure: str, batch: int) -> None:  # noqa: ANN401 (Axes)
    """Draw one panel: every contender, and the Pareto front."""
    ms, value = (np.array([row[key] for row in rows]) for key in ("mean_ms", measure))
    others = itertools.cycle(itertools.product("osD^v", ("#1d4ed8", "#0f766e", "#be185d", "#475569")))
    for x, y, row in zip(ms / batch, value, rows, strict=True):
        ours = row["contender"].startswith("gati-jax")
        marker, color = ("*" if "cascade" in row["contender"] else "P", OURS) if ours else next(others)
        at.plot(x, y, marker, color=color, markersize=13 if ours else 6, label=row["contender"], alpha=0.85)
    best = front(ms, value)
    at.step(ms[best] / batch, value[best], where="post", color="#94a3b8", linewidth=1, zorder=0)
    at.set_xlabel("ms an image")
    at.set_xlim(left=0)
    at.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    at.grid(alpha=0.2)


def front(ms: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return the indices of those that no other beats in time and in value, the fastest first.

    Example:
        >>> front(np.array([3.0, 1.0, 2.0, 4.0]), np.array([0.9, 0.5, 0.4, 0.8])).tolist()
        [1, 0]
    """
    order = np.lexsort((-value, ms))
    best = np.maximum.accumulate(value[order])
    return order[np.append(True, best[1:] > best[:-1])]


if __name__ == "__main__":
    cli.run(main)
