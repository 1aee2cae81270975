"""Figures of a reproduction: where requests leave, heads' agreement, accuracy against latency, memory."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from .results import Reproduction

OURS = "#c2410c"


def draw(result: Reproduction, folder: Path) -> None:
    """Write four figures as SVG; the same result gives the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams |= {"svg.hashsalt": "gati-jax", "svg.fonttype": "none"}
    for name, (make, _) in FIGURES.items():
        make(result).savefig(folder / f"{name}.svg", metadata={"Date": None})


def exits(result: Reproduction) -> Figure:
    """Draw where requests leave: the default plan at both operating points, and the oracle."""
    figure, axes = _axes("exit (site; the last is the base)", "share of requests")
    groups = {
        f"certified at {100 * result.epsilon:g} %": result.certified.rows[0].exits,
        "at 97 % of accuracy": result.accurate.rows[0].exits,
        "oracle": result.oracle.exits,
    }
    for i, (label, counts) in enumerate(groups.items()):
        share = np.array(counts) / sum(counts)
        axes.bar(np.arange(len(share)) + (i - 1) * 0.27, share, 0.27, label=label)
    axes.legend(frameon=False)
    return figure


def agreement(result: Reproduction) -> Figure:
    """Draw how often each head agrees with the base, by site."""
    figure, axes = _axes("site", "agreement with the base on select")
    heads: dict[str, list[tuple[int, float]]] = {}
    for row in result.explored.ranking:
        heads.setdefault(row.name.partition("@")[0], []).append((row.site, row.agreement))
    for name, points in sorted(heads.items()):
        if "+" not in name:  # the same predictor under another selector
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.legend(frameon=False)
    return figure


def front(result: Reproduction) -> Figure:
    """Draw accuracy against latency, for every policy at both operating points."""
    figure, axes = _axes("mean ms of a request", "accuracy on test")
    for i, pair in enumerate(zip(result.certified.rows, result.accurate.rows, strict=True)):
        ours = i == 0  # the default plan
        axes.plot(
            [row.mean_ms for row in pair],
            [row.accuracy for row in pair],
            marker="o",
            label=pair[0].policy,
            color=OURS if ours else None,
            zorder=3 if ours else 2,
        )
    axes.plot([result.full_ms], [result.base.accuracy], "k*", label="the base")
    axes.legend(frameon=False, fontsize=8)
    return figure


def memory(result: Reproduction) -> Figure:
    """Draw the bytes of candidates against the share of requests that each would answer alone."""
    figure, axes = _axes("MB", f"share leaving at {100 * result.epsilon:g} % disagreement, alone")
    rows = result.explored.ranking
    for site in sorted({row.site for row in rows}):
        own = [row for row in rows if row.site == site]
        axes.scatter([row.bytes / 1e6 for row in own], [row.hits for row in own], label=f"site {site}", s=18)
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


FIGURES = {  # by name of the file: the function that draws it, and its caption
    "exits": (exits, "Where requests leave: the default plan at both operating points, and the oracle"),
    "agreement": (agreement, "How often each head agrees with the base, by site"),
    "front": (front, "Accuracy against latency, every policy at both operating points"),
    "memory": (memory, "Bytes of candidates, and the share of requests that each would answer alone"),
}
