"""A made-up evaluation, consistent with itself, of a network of eight blocks with caches at three sites."""

import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any

import numpy as np

from train.report.figures import FIGURES
from train.report.page import WIDE
from train.report.pictures import Wall, draw_wall
from train.results import Evaluation

DEPTH, N = 8, 2_000
BLOCKS_MS = (0.6, 0.5, 0.7, 0.7, 0.9, 0.8, 1.0, 0.8)
EXITS = [(2, 700, 693), (4, 640, 634), (6, 360, 357), (DEPTH, 300, 300)]  # site, requests, those that agree
NAMES = ("plane", "car", "bird", "cat")
VERSIONS = {"jax": "0.0.1", "numpy": "0.0.2"}
INLINE = {"a", "code", "span", "strong"}
VOID = {"meta", "br", "hr", "img", "input", "link"}


def cut(hits: int, classes: int) -> list[int]:
    """Divide a count among classes."""
    return [hits // classes + (i < hits % classes) for i in range(classes)]


def evaluation(**changes: Any) -> dict[str, Any]:
    """evaluation.json as a dictionary; ``certificate__holds=False`` changes an entry of a section."""
    random, agreeing = np.random.default_rng(0), sum(one[2] for one in EXITS)
    each = random.gamma(20, 0.3, 150)
    left = random.choice([0.28, 0.5, 0.75, 1.05], 150, p=[0.35, 0.32, 0.18, 0.15])
    full, fast = float(each.mean()), float((each * left).mean())
    by_class = np.array([cut(hits, len(NAMES)) for _, hits, _ in EXITS]).T
    wrong = cut(N - agreeing, len(NAMES))
    found: dict[str, Any] = {
        "dataset": "pictures", "split": "test[:2000]", "network": "resnet18", "n": N,
        "base": {"accuracy": 0.93}, "cascade": {"accuracy": 0.928, "agreement": agreeing / N},
        "certificate": {
            "name": "1%", "epsilon": 0.02, "delta": 0.05, "n": 2500, "disagreements": 30, "certified": True,
            "method": "fixed-sequence testing, exact binomial", "numerics": "reference", "looks": 1, "plans": 1,
            "promise": "at most 2% of requests disagree with the base", "basis": "look 1 at these rows",
            "p_value": 0.0013, "level": 0.03, "base_saw_data": False, "accuracy_gap": None, "holds": True,
        },
        "served": {"numerics": "reference", "epsilon": 0.02, "delta": 0.05, "text": "at most 2%, as certified"},
        "exits": [
            {"exit": site, "hits": hits, "hit_rate": hits / N, "agreement": right / hits,
             "interval": [right / hits - 0.008, min(1.0, right / hits + 0.005)]}
            for site, hits, right in EXITS
        ],
        "cost": {
            "blocks_mean": 4.1, "saved_share": 0.48, "ideal_speedup": 1 / 0.52,
            "measured": [{
                "device": "cpu-made-up", "driver": "while_loop", "backend": "xla", "numerics": "reference",
                "dtype": "float32", "batch": 1, "requests": 150, "full": "tuned", "full_ms": full,
                "cascade_ms": fast, "speedup": full / fast, "ideal": 1 / 0.52, "conversion": full / fast * 0.52,
                "spread": 0.04, "interval": [full / fast * 0.97, full / fast * 1.03], "typical": full / fast,
                "full_each_ms": each.tolist(), "cascade_each_ms": (each * left).tolist(),
            }],
        },
        "memory": {"base_bytes": 44_700_000, "cache_bytes": 1_230_000}, "oracle": {"saved_share": 0.61, "ms": 2.3},
        "layout": {
            "blocks": DEPTH, "blocks_ms": BLOCKS_MS, "device": "cpu-made-up", "batch": 1,
            "caches": [
                {"name": f"grid@{site}", "site": site, "threshold": 3.5, "bytes": 410_000, "lookup_ms": 0.05}
                for site, *_ in EXITS[:-1]
            ],
        },
        "path": [
            {"step": step, "ms": 6.0 - 0.16 * step, "agreement": 1 - 0.0000065 * step**2.7,
             "accuracy": 0.93 - 0.000003 * step**2.7, "certified": step == 16}
            for step in range(25)
        ],
        "classes": [
            {"index": i, "name": name, "n": int(by_class[i].sum()), "exits": by_class[i].tolist(),
             "disagreements": wrong[i]}
            for i, name in enumerate(NAMES)
        ],
        "confusions": [{"base": "cat", "cascade": "bird", "n": 9}, {"base": "bird", "cascade": "cat", "n": 7}],
        "samples": [
            {"row": 10 * i + j, "exit": site, "score": 4.0, "base": NAMES[j % 4], "cascade": NAMES[j % 4],
             "label": NAMES[j % 4], "agrees": True}
            for i, (site, *_) in enumerate(EXITS) for j in range(6)
        ] + [
            {"row": 90, "exit": 2, "score": 3.6, "base": "cat", "cascade": "bird", "label": "cat", "agrees": False}
        ],
        "versions": VERSIONS, "seed": 0, "date": "2000-01-01",
        "commands": ["python -m train.evaluate --bundle runs/r18/bundle --out runs/r18/eval"],
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            found[section][name] = value
        else:
            found[section] = value
    return found


def made_up(**changes: Any) -> Evaluation:
    """The same as a record."""
    return Evaluation.model_validate(evaluation(**changes))


def pictures(e: Evaluation) -> Wall:
    """Small pictures for all of its samples."""
    images = np.random.default_rng(1).integers(0, 255, (100, 12, 12, 3), np.uint8)
    return draw_wall(images, [sample.row for sample in e.samples])


def shapes(name: str, kind: str, width: int = WIDE, **changes) -> list[ET.Element]:
    """The shapes of one class in a figure."""
    root = ET.fromstring(FIGURES[name].draw(made_up(**changes), width).svg(name, "title"))
    return [shape for shape in root.iter() if kind in shape.get("class", "").split()]


class Page(HTMLParser):
    """Checks that tags nest; keeps tags, attributes, ids, and the text of every table cell."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += "" if tag in INLINE else "\n"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data.strip()

    def values(self, name: str) -> list[str]:
        return [value for found, value in self.attributes if found == name]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())
