"""Write docs/reproduction.md from what ``train.reproduce`` and ``train.freeze`` measured."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gati_jax import InputError

from . import cli

EXAMPLE = (
    "python -m train.page --reproduction runs/repro18/reproduction.json --freeze runs/freeze/freeze.json"
    " --out docs/reproduction.md"
)
NOT_RUN = "not run"
COMMANDS = """\
    python -m train.reproduce --config configs/repro_resnet18.toml --out runs/repro18 ...
    python -m train.freeze --config configs/repro_freeze_resnet18.toml --out runs/freeze ...\
"""
PUBLISHED_PREDICTORS = {  # GATI's released tables: ResNet-18, CIFAR-10, behind blocks 1 to 8
    "fc": (55.1, 60.7, 78.6, 85.3, 94.5, 99.2, 99.95, 100.0),
    "pool": (55.2, 68.3, 78.3, 84.6, 92.5, 99.0, 99.95, 100.0),
    "conv": (57.6, 66.0, 75.9, 82.6, 93.3, 98.3, 99.9, 100.0),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    p = argparse.ArgumentParser(prog="python -m train.page", description=__doc__, epilog=f"example: {EXAMPLE}")
    p.add_argument("--reproduction", type=Path, metavar="FILE", help="reproduction.json; unset: its rows are not run")
    p.add_argument("--freeze", type=Path, metavar="FILE", help="freeze.json; unset: its rows are not run")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="Markdown to write")
    arguments = p.parse_args(argv)
    found = [read(path) if path else None for path in (arguments.reproduction, arguments.freeze)]
    arguments.out.write_text(page(*found), encoding="utf-8")
    print(f"written: {arguments.out}")


def read(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        InputError: It is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"result: expected JSON in {path}, got something else: {error}"
        raise InputError(msg) from error


def page(reproduction: dict[str, Any] | None, freeze: dict[str, Any] | None) -> str:
    """Return the whole page."""
    parts = [
        "# Reproduction",
        "Written by `python -m train.page` from what the two commands below measured.",
        COMMANDS,
        "ResNet-50, ResNet-152, CIFAR-100 and speech commands are not run: there is no trained network for them here.",
        *predictors(freeze),
        *published(reproduction, freeze),
        *policies(reproduction),
    ]
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def predictors(freeze: dict[str, Any] | None) -> list[str]:
    """Say how often the paper's predictors agree with the base behind every block."""
    rows = []
    ours = (freeze or {}).get("predictors", {})
    for kind, shares in PUBLISHED_PREDICTORS.items():
        rows.append([f"{kind}, published", *(f"{share:g}" for share in shares)])
        own = ours.get(kind, {})
        rows.append([f"{kind}, ours", *(f"{own[b]:.1%}" if b in own else NOT_RUN for b in map(str, range(1, 9)))])
    blocks = [f"block {i}" for i in range(1, 9)]
    why = (
        "Agreement with the base on the test split, in percent. "
        "Ours are trained for the epochs that the config says, the published ones for many more, and with the teacher's"
        " softmax applied twice."
    )
    return ["## Predictors behind every block", table(["predictor", *blocks], rows), why]


def published(reproduction: dict[str, Any] | None, freeze: dict[str, Any] | None) -> list[str]:
    """Compare the papers' headline figures."""
    heads = ("figure", "published", "ours", "why they differ")
    return ["## Published figures", table(heads, [*_gains(reproduction), *_freeze(freeze)])]


def _gains(result: dict[str, Any] | None) -> list[list[str]]:
    names = [
        "oracle: requests that could save half of the blocks",
        "latency gain at 97 % of the base's accuracy, CPU, batch 1",
        "latency gain certified at 1 % disagreement",
        "caches' share of the base's bytes, at 97 % / certified",
    ]
    if result is None:
        return [[name, "", NOT_RUN, ""] for name in names]
    accurate, off, certified = (result["measured"][key] for key in ("accurate", "read off test", "certified"))
    row, base = result["accurate"]["rows"][0], result["base"]["accuracy"]
    shares = " / ".join(f"{m['cache_bytes'] / m['base_bytes']:.1%}" for m in (accurate, certified))
    kept = f"{row['accuracy'] / base:.2%} on test, chosen on certify; read off the test curve: {_gain(off)}"
    found = " of ".join(map(str, result["certified"]["disagreements"]["default plan"]))
    return [
        [names[0], "91.58 %", f"{result['oracle']['half_share']:.2%}", "theirs knows when a k-NN cache is right"],
        [names[1], "1.72", _gain(accurate), kept],
        [names[2], "none", _gain(certified), f"{found} disagreed; look {result['looks']} at these rows"],
        [names[3], "22 times them, for FC(1024) behind every block", shares, "pooled and convolutional heads"],
    ]


def _gain(measured: dict[str, Any]) -> str:
    return f"{measured['speedup']:.2f} (spread {measured['spread']:.0%}, ideal {measured['ideal']:.2f})"


def _freeze(result: dict[str, Any] | None) -> list[list[str]]:
    kinds = {"knn": ("k-NN", "20 %", "97.48 %"), "kmeans": ("k-means", "33 %", "92.85 %")}
    rows = []
    for kind, (name, half, agreement) in kinds.items():
        for split, said in (("seen", "thresholds from images that the base has seen"), ("clean", "from clean images")):
            own = None if result is None else result["protocols"][split][kind]
            shares = [NOT_RUN, NOT_RUN] if own is None else [f"{own[k]:.1%}" for k in ("half_share", "agreement")]
            rows.append([f"{name}: half of the blocks saved for", half, shares[0], said])
            rows.append([f"{name}: agreement with the base", agreement, shares[1], said])
    for kind, (name, *_) in kinds.items():
        memory = {"knn": "2,500 (reduced)", "kmeans": "12.5"}[kind]
        total = NOT_RUN if result is None else f"{sum(r['total'] for r in result['memory'][kind]) / 2**20:.0f}"
        rows.append([f"{name}: memory, MB", memory, total, "key networks included; see docs/freeze.md"])
    return rows


def policies(result: dict[str, Any] | None) -> list[str]:
    """Compare the policies at both operating points."""
    if result is None:
        return ["## Policies", NOT_RUN]
    parts = ["## Policies"]
    for group, title in (
        ("certified", f"Each certified at {result['epsilon']:.0%} disagreement, delta {result['delta']}"),
        ("accurate", "Each at 97 % of the base's accuracy, the step chosen on certify by one standard error"),
    ):
        rows = []
        for row in result[group]["rows"]:
            by = row["slower_by"]
            slower = f"{by['mean_ms']:.2f} [{by['low_ms']:.2f}, {by['high_ms']:.2f}]{' ties' if by['ties'] else ''}"
            share = row["saved_share"] / result["oracle"]["saved_share"]
            cells = (
                row["policy"],
                row["heads"],
                f"{row['mean_ms']:.2f}",
                "-" if row is result[group]["rows"][0] else slower,
                f"{row['saved_share']:.1%} ({share:.2f})",
                f"{row['disagreement']:.2%}",
                f"{row['accuracy'] / result['base']['accuracy']:.2%}",
            )
            rows.append(cells)
        heads = ("policy", "heads", "mean ms", "slower by ms", "saved (of oracle's)", "disagree", "of base's accuracy")
        parts += [f"### {title}", table(heads, rows)]
    where = f"Measured on {result['date']} on {result['device']}, batch 1, jax {result['versions']['jax']}."
    full = result["certified"]["rows"][0]["full_ms"]
    return [
        *parts,
        f"{where} The base takes {full:.2f} ms. A bracket is a 95 % bootstrap interval over requests, paired.",
    ]


if __name__ == "__main__":
    cli.run(main)
