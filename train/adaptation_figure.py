"""A simulation over time: where requests leave, what is saved, disagreement with its bound, alarms and swaps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

MARKS = {"alarm": "#b91c1c", "swap": "#15803d", "opened": "#15803d"}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the figure as SVG; the same result gives the same file."""
    mpl.rcParams |= {"svg.hashsalt": "gati-jax", "svg.fonttype": "none"}
    figure = Figure(figsize=(9, 7), layout="constrained")
    left, saved, wrong = figure.subplots(3, 1, sharex=True)
    rows = result["windows"]
    edges = np.array([*(row["start"] for row in rows), result["trace"]["n"]])
    names = sorted({name for row in rows for name in row["exits"]}, key=_order)
    shares = np.array([[row["exits"].get(name, 0) for row in rows] for name in names], float)
    left.stackplot(edges, _held(shares / shares.sum(0)), labels=names, step="post")
    left.set_ylabel("share that leaves")
    left.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    saved.step(edges, _held([100 * row["saved_share"] for row in rows]), where="post", color="#c2410c")
    saved.axhline(0, color="#9ca3af", linewidth=0.8)
    saved.set_ylabel("computation saved, %")
    disagrees = _held([100 * row["disagreement"] for row in rows])
    wrong.step(edges, disagrees, where="post", color="#1f2937", label="disagreement")
    bounds = [np.nan if row["bound"] is None else 100 * row["bound"] for row in rows]
    wrong.step(edges, _held(bounds), where="post", color="#9ca3af", label="bound, any time")
    wrong.axhline(100 * result["epsilon"], color="#b91c1c", linestyle=":", label="promised")
    wrong.set(ylabel="of requests, %", xlabel="requests", ylim=(0, 500 * result["epsilon"]))
    wrong.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for event in result["events"]:
        if event["kind"] in MARKS:
            for axes in (left, saved, wrong):
                axes.axvline(event["number"], color=MARKS[event["kind"]], linewidth=0.8, alpha=0.7)
    _name_phases(left, rows)
    figure.savefig(path, metadata={"Date": None})


def _held(values: Any) -> np.ndarray:  # noqa: ANN401 (a list, or rows of them)
    """Return values, the last one once more: each holds up to the next edge."""
    array = np.asarray(values, float)
    return np.concatenate([array, array[..., -1:]], axis=-1)


def _order(name: str) -> tuple[int, int]:
    """The input cache's layers first, then sites by number, the base last."""
    if name.startswith("site "):
        return 1, int(name[5:])
    return (2, 0) if name == "base" else (0, len(name))


def _name_phases(axes: Any, rows: list[dict[str, Any]]) -> None:  # noqa: ANN401 (matplotlib's own are untyped)
    before = None
    for row in rows:
        if row["phase"] != before:
            axes.annotate(row["phase"], (row["start"], 1.02), fontsize=7, rotation=30, annotation_clip=False)
            before = row["phase"]
