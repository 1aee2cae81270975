"""Write docs/reproduction.md from what ``train.reproduce`` and ``train.freeze`` measured, and from remarks on it."""

import os
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from gati_jax import InputError

from . import cli
from .figures import FIGURES
from .markdown import NOT_RUN, link, percent, table
from .page_rows import gains, neighbours, oracles, others, predictors
from .results import Difference, Freeze, Group, Reproduction, Run, read

EXAMPLE = (
    "python -m train.page --reproduction runs/repro18/reproduction.json --freeze runs/freeze/freeze.json"
    " --remarks docs/remarks/reproduction.md --figures figures --out docs/reproduction.md"
)
PAPERS = ("resnet18", "cifar10")
CONFIGS = {"reproduce": "repro_resnet18.toml", "freeze": "repro_freeze_resnet18.toml"}
INTRODUCTION = """\
Written by `python -m train.page` from what the commands below measured. Remarks are kept in a file of their own
(`--remarks`): what is changed on this page is lost.\
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
        msg = f"remarks: expected Markdown in UTF-8, got {path}: {error}"
        raise InputError(msg) from error


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
        msg = f"figures: expected a drawing at {os.path.normpath(here / missing[0])}, got no such file"
        raise InputError(msg)
    shown = "\n\n".join(f"{caption}:\n\n![{caption}]({path.as_posix()})" for path, caption in paths.items())
    return f"## Figures\n\n{shown}\n"


if __name__ == "__main__":
    cli.run(main)
