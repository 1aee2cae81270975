"""Write docs/reproduction.md from what ``train.reproduce`` and its ``freeze`` measured, and from remarks on it."""

import os
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from gati_jax import InputError
from gati_jax.caches import MIB
from train import cli
from train.reproduce import published

from .figures import FIGURES
from .results import Difference, Freeze, Group, Kind, Protocol, Reproduction, Run, Speed, read

EXAMPLE = (
    "python -m train.reproduce.page --reproduction runs/repro18/reproduction.json --freeze runs/freeze/freeze.json"
    " --remarks docs/remarks/reproduction.md --figures figures --out docs/reproduction.md"
)
PAPERS = ("resnet18", "cifar10")
CONFIGS = {"reproduce": "repro_resnet18.toml", "freeze": "repro_freeze_resnet18.toml"}
INTRODUCTION = """\
Written by `python -m train.reproduce.page` from what the commands below measured. Remarks are kept in a file of
their own (`--remarks`): what is changed on this page is lost.\
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False, as_json=False)
    p.add_argument("--reproduction", type=Path, metavar="FILE", help="reproduction.json; unset: its rows are not run")
    p.add_argument("--freeze", type=Path, metavar="FILE", help="freeze.json; unset: its rows are not run")
    p.add_argument("--remarks", type=Path, metavar="FILE", help="Markdown for the end of the page")
    p.add_argument("--figures", type=Path, metavar="DIR", help="folder of repro-*.svg, as seen from the page's")
    p.add_argument("--out", type=cli.file, required=True, metavar="FILE", help="Markdown to write")
    arguments = p.parse_args(argv)

    reproduction = read(Reproduction, arguments.reproduction, "reproduction") if arguments.reproduction else None
    freeze = read(Freeze, arguments.freeze, "freeze") if arguments.freeze else None
    parts = [page(reproduction, freeze)]
    if arguments.figures:
        parts.append(figures(arguments.figures, arguments.out.parent))
    if arguments.remarks:
        parts.append(f"## Remarks\n\n{read_remarks(arguments.remarks)}\n")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n".join(parts), encoding="utf-8")
    print(f"written: {arguments.out}")


def read_remarks(path: Path) -> str:
    """Read Markdown.

    Raises:
        InputError: It is no text.
    """
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"remarks: expected Markdown in UTF-8, got {path}: {error}") from error


def page(reproduction: Reproduction | None, freeze: Freeze | None) -> str:
    """Return the page, up to figures and remarks."""
    parts = [
        "# Reproduction",
        INTRODUCTION,
        "## Commands",
        *command("reproduce", reproduction),
        *command("freeze", freeze),
        *predictors(freeze),
        "## Published figures",
        "Of ResNet-18 on CIFAR-10, unless a row says otherwise.",
        table(
            ("figure", "published", "ours", "command", "why they differ"),
            [*gains(reproduction), *oracles(reproduction, freeze), *neighbours(freeze), *others()],
        ),
        *policies(reproduction),
    ]
    return "\n\n".join(parts) + "\n"


# --- Commands -------------------------------------------------------------------------------------------------------


def command(name: str, result: Run | None) -> list[str]:
    """Say what was run, when and on what."""
    if result is None:
        line = f"python -m train.{name} --config configs/{CONFIGS[name]} --out DIR"
        return [f"### {name}", f"Not run. It would be:\n\n    {line}"]
    splits = ", ".join(f"{part} `{rows}`" for part, rows in result.splits.items())
    where = f"on {result.device}" if result.device else "on a device that it did not write down"
    said = (
        f"Measured on {result.date} {where}, jax {result.versions.get('jax', 'unknown')};"
        f" {result.network} on {result.dataset}: {splits}."
    )
    if (result.network, result.dataset) != PAPERS:
        said += " The published figures are of another network or other data."
    return [f"### {name}", textwrap.indent(invocation(result.command), "    "), said]


def invocation(argv: Sequence[str]) -> str:
    """Return the command line that a process with these arguments came from."""
    script = Path(argv[0])
    if script.parent.name == "train":  # of ``python -m``, which Python replaces by the file
        start = ["-m", f"train.{script.stem}"]
    elif argv[0].startswith("train."):
        start = ["-m", argv[0]]
    else:
        start = [argv[0]]
    return shlex.join(["python", *start, *argv[1:]])


# --- Policies -------------------------------------------------------------------------------------------------------


def policies(result: Reproduction | None) -> list[str]:
    """Compare the policies at both operating points."""
    if result is None:
        return ["## Policies", f"{NOT_RUN.capitalize()}."]
    how = (
        f"By {link('reproduce', result)}, batch 1. The base takes {result.full_ms:.2f} ms. A bracket is a 95 %"
        " bootstrap interval over requests, paired; a policy whose bracket holds 0 ties."
    )
    return [
        "## Policies",
        how,
        f"### Each certified at {100 * result.epsilon:g} % disagreement, delta {result.delta:g}",
        _policies(result, result.certified),
        "### Each at 97 % of the base's accuracy, the step chosen on certify by one standard error",
        _policies(result, result.accurate),
    ]


def _policies(result: Reproduction, group: Group) -> str:
    heads = ["policy", "heads", "mean ms", "slower by ms", "saved (of oracle's)", "disagree", "of base's accuracy"]
    rows, most = [], result.oracle.saved_share
    for row in group.rows:
        of_oracle = f"{row.saved_share / most:.2f}" if most > 0 else "-"
        cells = [
            row.policy,
            row.heads,
            f"{row.mean_ms:.2f}",
            "-" if row is group.rows[0] else _slower(row.slower_by),
            f"{percent(row.saved_share, 1)} ({of_oracle})",
            percent(row.disagreement),
            percent(row.accuracy / result.base.accuracy),
        ]
        if group.disagreements:
            cells.append(" of ".join(map(str, group.disagreements.get(row.policy, ("-",)))))
        if group.certificates:
            one = group.certificates.get(row.policy)
            gap = one.accuracy_gap if one else None
            cells.append(f"{percent(gap.upper)} (delta {gap.delta:g})" if gap else "-")
        rows.append(cells)
    heads += ["disagreed on certify"] * bool(group.disagreements) + ["accuracy lost at most"] * bool(group.certificates)
    return table(heads, rows)


def _slower(by: Difference) -> str:
    said = " ties" if by.low_ms <= 0 <= by.high_ms else " faster" if by.high_ms < 0 else ""
    return f"{by.mean_ms:.2f} [{by.low_ms:.2f}, {by.high_ms:.2f}]{said}"


# --- Figures --------------------------------------------------------------------------------------------------------


def figures(folder: Path, here: Path) -> str:
    """Show what ``train.reproduce`` has drawn.

    Args:
        folder: Of the drawings, as seen from the page.
        here: Where the page is.

    Raises:
        InputError: A drawing is missing.
    """
    paths = {folder / f"repro-{name}.svg": caption for name, (_, caption) in FIGURES.items()}
    if missing := [path for path in paths if not (here / path).is_file()]:
        raise InputError(f"figures: expected a drawing at {os.path.normpath(here / missing[0])}, got no such file")
    shown = "\n\n".join(f"{caption}:\n\n![{caption}]({path.as_posix()})" for path, caption in paths.items())
    return f"## Figures\n\n{shown}\n"


if __name__ == "__main__":
    cli.run(main)


BLOCKS = range(1, 9)  # of ResNet-18
NAMES: dict[Kind, str] = {"knn": "k-NN", "kmeans": "k-means"}
SERVED = {
    "half_share": "half of the blocks saved for",
    "before_output_share": "frozen before the output",
    "agreement": "agreement with the base",
}


def predictors(freeze: Freeze | None) -> list[str]:
    """Say how often the paper's predictors agree with the base behind every block."""
    rows = []
    ours = {} if freeze is None else freeze.predictors
    for kind, shares in published.PREDICTORS.items():
        own = ours.get(kind, {})
        rows.append([f"{kind}, published", *(f"{share:g}" for share in shares)])
        rows.append([f"{kind}, ours", *(f"{100 * own[b]:.2f}" if b in own else NOT_RUN for b in BLOCKS)])
    how = ""
    if freeze and ours:
        many = f" for {freeze.epochs:g} epochs" if freeze.epochs is not None else ""
        how = f" By {link('freeze', freeze)}, on {freeze.n:,} requests; ours were trained{many}."
    why = (
        f"Agreement with the base on test images, in percent.{how} The published ones were trained for many more"
        " epochs, and with the teacher's softmax applied twice."
    )
    return ["## Predictors behind every block", table(["predictor", *(f"block {i}" for i in BLOCKS)], rows), why]


def gains(result: Reproduction | None) -> list[list[str]]:
    """Compare latency; a gain stands where the device belongs."""
    here = "GPU" if result and result.device and not result.device.startswith("cpu") else "CPU"
    rows = []
    for device, gain in published.GAIN.items():
        name = f"latency gain at 97 % of the base's accuracy, {device}, batch 1"
        off = f"{name}, read off the test curve, as published"
        if result is None or device != here:
            why = f"measured on {result.device} only" if result else ""
            rows += [[said, f"{gain}", NOT_RUN, "-", why] for said in (name, off)]
        else:
            rows += [[name, f"{gain}", *_accurate(result)], [off, f"{gain}", *_read_off_test(result)]]
    epsilon = result.epsilon if result else 0.01
    certified = f"latency gain certified at {100 * epsilon:g} % disagreement, {here}, batch 1"
    memory = [
        "caches' share of the base's bytes, at 97 % / certified",
        "22 times them, for FC(1024) behind every block",
    ]
    if result is None:
        return [*rows, [certified, "none", NOT_RUN, "-", ""], [*memory, NOT_RUN, "-", ""]]
    by, both = link("reproduce", result), (result.measured.accurate, result.measured.certified)
    shares = " / ".join(percent(speed.cache_bytes / speed.base_bytes, 1) for speed in both)
    return [
        *rows,
        [certified, "none", _gain(result.measured.certified), by, _certified(result)],
        [*memory, shares, by, "pooled and convolutional heads"],
    ]


def _accurate(result: Reproduction) -> tuple[str, str, str]:
    kept = percent(result.accurate.rows[0].accuracy / result.base.accuracy)
    return _gain(result.measured.accurate), link("reproduce", result), f"step chosen on certify; keeps {kept} on test"


def _read_off_test(result: Reproduction) -> tuple[str, str, str]:
    if (speed := result.measured.read_off_test) is None:
        return NOT_RUN, "-", ""
    return _gain(speed), link("reproduce", result), "this step was chosen on test, which flatters it"


def _gain(speed: Speed) -> str:
    return f"{speed.speedup:.2f} (spread {percent(speed.spread, 0)}, ideal {speed.ideal:.2f})"


def _certified(result: Reproduction) -> str:
    """Say how the default plan was certified."""
    group = result.certified
    parts = [f"delta {result.delta:g}"]
    if found := group.disagreements.get(group.rows[0].policy):
        parts.append(f"{found[0]} of {found[1]} disagreed on certify")
    if result.looks is not None:
        parts.append(f"look {result.looks} at these rows")
    return "; ".join(parts)


def oracles(reproduction: Reproduction | None, freeze: Freeze | None) -> list[list[str]]:
    """Compare what could be saved by somebody who knows when a cache is right."""
    theirs = _share(published.FREEZE["oracle"]["half_share"])
    rows = []
    for kind, name in NAMES.items():
        own = freeze.oracle.get(kind) if freeze else None
        ours, by = (percent(own.half_share), link("freeze", freeze)) if own else (NOT_RUN, "-")
        said = (theirs, "the same question") if kind == "knn" else ("none", "")
        rows.append([f"oracle over {name} caches: half of the blocks saved for", said[0], ours, by, said[1]])
    name, why = "oracle over any explored candidate: half of the blocks saved for", "theirs is over k-NN caches alone"
    if reproduction is None:
        return [*rows, [name, theirs, NOT_RUN, "-", why]]
    ours = percent(reproduction.oracle.half_share)
    why = f"{why}, ours may ask any of {reproduction.candidates}"
    return [*rows, [name, theirs, ours, link("reproduce", reproduction), why]]


def neighbours(result: Freeze | None) -> list[list[str]]:
    """Compare Freeze Inference's caches, under both thresholds."""
    rows = []
    for kind, name in NAMES.items():
        for split in ("seen", "clean"):
            protocol = getattr(result.protocols, split) if result else None
            served = getattr(protocol, kind) if protocol else None
            said = _thresholds(split, result, protocol)
            for key, figure in SERVED.items():
                ours = percent(getattr(served, key)) if served else NOT_RUN
                by = link("freeze", result if served else None)
                rows.append([f"{name}: {figure}", _share(published.FREEZE[kind][key]), ours, by, said])
    for kind, name in NAMES.items():
        own = result.memory.get(kind) if result else None
        total = f"{sum(cache.total for cache in own) / MIB:,.0f}" if own else NOT_RUN
        by, why = link("freeze", result if own else None), "ours with key networks; see [freeze.md](freeze.md)"
        rows.append([f"{name}: memory, MB", published.FREEZE_MEMORY[kind], total, by, why])
    return rows


def _thresholds(split: str, result: Freeze | None, protocol: Protocol | None) -> str:
    """Say where thresholds are from."""
    if result is None or protocol is None:
        return "thresholds from images that the base has " + ("seen" if split == "seen" else "not seen")
    knows = "the base was" if protocol.base_saw_thresholds else "the base was not"
    return f"thresholds from `{result.splits.get(split, split)}`, on which {knows} trained"


def others() -> list[list[str]]:
    """List what nothing here has measured."""
    return [[figure, theirs, NOT_RUN, "-", why] for figure, theirs, why in published.OTHERS]


def _share(published_share: float | None) -> str:
    return "none" if published_share is None else f"{100 * published_share:g} %"


NOT_RUN = "not run"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; a bar in a cell does not end it."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def percent(share: float, digits: int = 2) -> str:
    """Return a share as the page writes it."""
    return f"{100 * share:.{digits}f} %"


def link(name: str, result: Run | None) -> str:
    """Return a link to the command behind a figure, if it was run."""
    return "-" if result is None else f"[{name}](#{name})"
