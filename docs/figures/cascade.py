"""Draw the README's figure: where requests leave a ResNet-18, and its time per image with and without caches.

    python docs/figures/cascade.py

reads benchmarks/results/resnet18-serving-cpu.json (exits) and resnet18-cpu.json (times), and writes cascade.svg beside
this file. docs/results/performance.md has the commands that measured them.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
CACHED, FULL, OTHER, INK, PALE = "#c2410c", "#1d4ed8", "#94a3b8", "#1e293b", "#e2e8f0"
CONTENDERS = (
    ("gati-jax full", "ResNet-18, this library, no caches", FULL),
    ("onnxruntime full", "ResNet-18, ONNX Runtime", OTHER),
    ("gati-jax cascade", "ResNet-18 with caches", CACHED),
)
WIDTH, HEIGHT = 860, 430


def main() -> None:
    """Write the figure."""
    (HERE / "cascade.svg").write_text(draw(*read()), encoding="utf-8")


def read() -> tuple[dict[int, float], dict[str, dict[int, float]]]:
    """Return what ``draw`` takes, from the results in the repository."""
    return _exits(), _milliseconds()


def draw(exits: dict[int, float], milliseconds: dict[str, dict[int, float]]) -> str:
    """Return the figure.

    Args:
        exits: The share of requests that leave at each exit.
        milliseconds: By contender and batch size, the mean time of an image.
    """
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        *_network(exits),
        *_times(milliseconds),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _exits() -> dict[int, float]:
    result = json.loads((RESULTS / "resnet18-serving-cpu.json").read_text())
    (row,) = (row for row in result["rows"] if row["contender"] == "cascade")
    counts: Counter[int] = Counter()
    for once in row["exits"]:
        counts.update({int(site): count for site, count in once.items()})
    return {site: counts[site] / counts.total() for site in sorted(counts)}


def _milliseconds() -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {name: {} for name, _, _ in CONTENDERS}
    for row in json.loads((RESULTS / "resnet18-cpu.json").read_text())["rows"]:
        if row["contender"] in found:
            found[row["contender"]][row["batch"]] = row["mean_ms"] / row["batch"]
    return found


def _network(exits: dict[int, float]) -> list[str]:
    """Draw the blocks in a row; below each exit, how many requests leave there."""
    depth, left, step, top = max(exits), 152, 84, 62
    parts = [
        _text(20, 28, "Where requests leave a ResNet-18 with caches", size=16, weight="bold"),
        _text(20, top + 24, "image"),
    ]
    parts.append(_arrow(62, top + 19, 76))
    parts += _box(76, top, 66, CACHED, "ResNet-20", "small network")
    for block in range(depth):
        x = left + block * step
        parts.append(_arrow(x - 10, top + 19, x - 2))
        parts += _box(x, top, step - 14, FULL, f"block {block + 1}", "")
    for site, share in exits.items():
        x = 108 if site == 0 else left + site * step - 7
        height = 96 * share
        label = "the network" if site == depth else "ResNet-20" if site == 0 else f"cache, block {site}"
        parts.append(f'<line x1="{x}" y1="{top + 38}" x2="{x}" y2="{top + 58}" stroke="{INK}" stroke-dasharray="2 2"/>')
        parts.append(_bar(x - 22, top + 58, 44, height, FULL if site == depth else CACHED))
        parts.append(_text(x, top + 74 + height, f"{share:.0%}", anchor="middle", weight="bold"))
        parts.append(_text(x, top + 90 + height, label, anchor="middle", size=11))
    return parts


def _times(milliseconds: dict[str, dict[int, float]]) -> list[str]:
    """Draw the time of an image as bars, batch size by batch size."""
    parts = [_text(20, 258, "Milliseconds per image, two CPU cores", size=16, weight="bold")]
    longest = max(max(times.values()) for times in milliseconds.values())
    for column, batch in enumerate(sorted(milliseconds["gati-jax full"])):
        left = 20 + column * 208
        parts.append(_text(left, 286, f"batch {batch}", weight="bold"))
        for row, (name, _, color) in enumerate(CONTENDERS):
            y, value = 296 + row * 26, milliseconds[name][batch]
            width = 140 * value / longest
            parts += [_bar(left, y, width, 20, color), _text(left + width + 6, y + 15, f"{value:.1f}")]
    for row, (_, label, color) in enumerate(CONTENDERS):
        x = 20 + row * 270
        parts += [_bar(x, 396, 14, 14, color), _text(x + 20, 408, label)]
    return parts


def _box(x: float, y: float, width: float, color: str, label: str, note: str) -> list[str]:
    box = f'<rect x="{x}" y="{y}" width="{width}" height="38" rx="5" fill="{PALE}" stroke="{color}" stroke-width="2"/>'
    middle = x + width / 2
    if not note:
        return [box, _text(middle, y + 24, label, anchor="middle", size=12)]
    return [
        box,
        _text(middle, y + 17, label, anchor="middle", size=11),
        _text(middle, y + 31, note, anchor="middle", size=9),
    ]


def _bar(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{height:.1f}" fill="{color}"/>'


def _arrow(start: float, y: float, stop: float) -> str:
    return f'<path d="M{start} {y}H{stop}m-4-4l4 4l-4 4" fill="none" stroke="{INK}"/>'


def _text(x: float, y: float, text: str, **style: Any) -> str:  # noqa: ANN401 (attributes of the element)
    size, anchor, weight = style.get("size", 13), style.get("anchor", "start"), style.get("weight", "normal")
    attributes = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{INK}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{text}</text>'


if __name__ == "__main__":
    main()
