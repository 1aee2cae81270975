"""Results as ``train.reproduce`` and ``train.reproduce.freeze`` write them, each number a different one."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

POLICIES = ("default plan", "entropy (BranchyNet)", "patience (PABEE)", "the paper's selector")
RUN = {
    "dataset": "cifar10",
    "network": "resnet18",
    "device": "cpu-made-up",
    "date": "2026-01-02",
    "versions": {"jax": "0.10.2"},
}


def row(policy: str, mean_ms: float, exits: list[int], low_ms: float, high_ms: float) -> dict[str, Any]:
    """Return a policy's result on test."""
    return {
        "policy": policy, "heads": f"heads of {policy}", "mean_ms": mean_ms, "full_ms": 12.0, "saved_share": 0.4,
        "disagreement": 0.0123, "accuracy": 0.9, "exits": exits,
        "slower_by": {"mean_ms": (low_ms + high_ms) / 2, "low_ms": low_ms, "high_ms": high_ms, "ties": False},
    }  # fmt: skip


def group(first_ms: float) -> dict[str, Any]:
    """Return four policies: the second is slower than the first, the third ties, the fourth is faster."""
    ends = ((0, 0), (0.5, 0.7), (-0.25, 0.5), (-0.75, -0.5))
    rows = [row(name, first_ms + i, [7, 2, 1], *ends[i]) for i, name in enumerate(POLICIES)]
    return {"rows": rows}


def latency(speedup: float) -> dict[str, Any]:
    """Return a measured gain."""
    return {"speedup": speedup, "ideal": 3.5, "spread": 0.04, "cache_bytes": int(100 * speedup), "base_bytes": 10_000}


def reproduction() -> dict[str, Any]:
    """Return reproduction.json."""
    ranking = [
        {"name": f"{head}@{site}", "site": site, "agreement": 0.5 + 0.1 * site, "bytes": 1000 * site, "hits": 0.2}
        for head in ("grid", "grid+linear", "conv")
        for site in (1, 2)
    ]
    return {
        **RUN,
        "splits": {"fit": "train[:45000]", "test": "test"},
        "command": ["/somewhere/train/reproduce.py", "--config", "c.toml", "--data.name", "a b"],
        "base": {"accuracy": 0.925},
        "explored": {"ranking": ranking},
        "epsilon": 0.02,
        "delta": 0.05,
        "looks": 3,
        "candidates": 88,
        "oracle": {"exits": [9, 1, 0], "saved_share": 0.8, "half_share": 0.9861},
        "certified": group(7.0) | {"disagreements": {name: [18 + i, 3000] for i, name in enumerate(POLICIES)}},
        "accurate": group(5.0),
        "measured": {"certified": latency(1.81), "accurate": latency(2.62), "read_off_test": latency(2.93)},
    }


def served(first: float) -> dict[str, float]:
    """Return the result of one kind of caches."""
    return {"half_share": first, "before_output_share": first + 0.11, "agreement": first + 0.22}


def freeze() -> dict[str, Any]:
    """Return freeze.json."""
    return {
        **RUN,
        "splits": {"build": "train[:35000]", "seen": "train[35000:40000]", "clean": "train[45000:]", "serve": "test"},
        "command": ["/somewhere/train/freeze.py", "--config", "f.toml"],
        "n": 10_000,
        "epochs": 2,
        "protocols": {
            "seen": {"knn": served(0.31), "kmeans": served(0.32), "base_saw_thresholds": True},
            "clean": {"knn": served(0.33), "kmeans": served(0.34), "base_saw_thresholds": False},
        },
        "oracle": {kind: {"half_share": share} for kind, share in (("knn", 0.9012), ("kmeans", 0.8034))},
        "memory": {"knn": [{"total": 2**20}, {"total": 2**21}], "kmeans": [{"total": 7 * 2**20}]},
        "predictors": {kind: {str(b): b / 100 for b in range(1, 9)} for kind in ("fc", "pool", "conv")},
    }


def texts(svg: Path) -> set[str]:
    """Return the texts of a drawing."""
    return {"".join(e.itertext()).strip() for e in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")}
