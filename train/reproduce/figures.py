"""Figures of a reproduction: where requests leave, what heads know, what policies reach, what memory buys."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

OURS = "#c2410c"


def draw(result: dict[str, Any], folder: Path) -> None:
    """Write four figures as SVG; the same result gives the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams |= {"svg.hashsalt": "gati-jax", "svg.fonttype": "none"}
    for name, (make, _) in FIGURES.items():
        make(result).savefig(folder / f"{name}.svg", metadata={"Date": None})


def exits(result: dict[str, Any]) -> Figure:
    """Where requests leave: the default plan at both operating points, and the oracle."""
    figure, axes = _axes("exit (site; the last is the base)", "share of requests")
    groups = {
        f"certified at {100 * result['epsilon']:g} %": result["certified"]["rows"][0]["exits"],
        "at 97 % of accuracy": result["accurate"]["rows"][0]["exits"],
        "oracle": result["oracle"]["exits"],
    }
    for i, (label, counts) in enumerate(groups.items()):
        share = np.array(counts) / sum(counts)
        axes.bar(np.arange(len(share)) + (i - 1) * 0.27, share, 0.27, label=label)
    axes.legend(frameon=False)
    return figure


def agreement(result: dict[str, Any]) -> Figure:
    """How often each head says what the base says, by site."""
    figure, axes = _axes("site", "agreement with the base on select")
    heads: dict[str, list[tuple[int, float]]] = {}
    for row in result["explored"]["ranking"]:
        heads.setdefault(row["name"].partition("@")[0], []).append((row["site"], row["agreement"]))
    for name, points in sorted(heads.items()):
        if "+" not in name:  # the same predictor under another selector
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.legend(frameon=False)
    return figure


def front(result: dict[str, Any]) -> Figure:
    """Accuracy against latency, for every policy at both operating points."""
    figure, axes = _axes("mean ms of a request", "accuracy on test")
    for i, pair in enumerate(zip(result["certified"]["rows"], result["accurate"]["rows"], strict=True)):
        x, y = ([row[key] for row in pair] for key in ("mean_ms", "accuracy"))
        one, ours = pair[0], i == 0  # the first is what the others are compared with
        axes.plot(x, y, marker="o", label=one["policy"], color=OURS if ours else None, zorder=3 if ours else 2)
    full = result["certified"]["rows"][0]["full_ms"]
    axes.plot([full], [result["base"]["accuracy"]], "k*", label="the base")
    axes.legend(frameon=False, fontsize=8)
    return figure


def memory(result: dict[str, Any]) -> Figure:
    """What candidates take, and what share of requests each would answer alone."""
    figure, axes = _axes("MB", f"share leaving at {100 * result['epsilon']:g} % disagreement, alone")
    rows = result["explored"]["ranking"]
    for site in sorted({row["site"] for row in rows}):
        own = [row for row in rows if row["site"] == site]
        axes.scatter([row["bytes"] / 1e6 for row in own], [row["hits"] for row in own], label=f"site {site}", s=18)
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


FIGURES = {  # by name of the file: who draws it, and what it shows
    "exits": (exits, "Where requests leave: the default plan at both operating points, and the oracle"),
    "agreement": (agreement, "How often each head says what the base says, by site"),
    "front": (front, "Accuracy against latency, every policy at both operating points"),
    "memory": (memory, "What candidates take, and what share of requests each would answer alone"),
}
