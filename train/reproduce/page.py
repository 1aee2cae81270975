"""Write docs/reproduction.md from what ``train.reproduce`` and its ``freeze`` measured, and from remarks on it."""

import os
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gati_jax import InputError
from gati_jax.caches import MIB

from .. import cli
from . import published
from .figures import FIGURES
from .results import KINDS, Freeze, Reproduction

EXAMPLE = (
    "python -m train.reproduce.page --reproduction runs/repro18/reproduction.json --freeze runs/freeze/freeze.json"
    " --remarks docs/remarks/reproduction.md --figures figures --out docs/reproduction.md"
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False, as_json=False)
    p.add_argument("--reproduction", type=Path, metavar="FILE", help="reproduction.json; unset: its rows are not run")
    p.add_argument("--freeze", type=Path, metavar="FILE", help="freeze.json; unset: its rows are not run")
    p.add_argument("--remarks", type=Path, metavar="FILE", help="Markdown for the end of the page")
    p.add_argument("--figures", type=Path, metavar="DIR", help="folder of repro-*.svg, relative to the page's folder")
    p.add_argument("--out", type=cli.file, required=True, metavar="FILE", help="Markdown to write")
    arguments = p.parse_args(argv)
    text = render(
        Reproduction.read(arguments.reproduction, "reproduction") if arguments.reproduction else None,
        Freeze.read(arguments.freeze, "freeze") if arguments.freeze else None,
        drawings=find_drawings(arguments.figures, arguments.out.parent) if arguments.figures else {},
        remarks=read_remarks(arguments.remarks) if arguments.remarks else None,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    print(f"written: {arguments.out}")


def render(
    reproduction: Reproduction | None, freeze: Freeze | None, *, drawings: dict[str, str], remarks: str | None
) -> str:
    """Return the page as Markdown; None stands for what was not run. Drawings are captions by path from the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # noqa: S701 (Markdown, from results of one's own)
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "command_line": cli.command_line,
        "percent": lambda share, digits=2: f"{100 * share:.{digits}f} %",
        # With as many digits as it was published with.
        "published_share": lambda share: "none" if share is None else f"{100 * share:g} %",
    }
    on_cpu = reproduction is None or reproduction.device is None or reproduction.device.startswith("cpu")
    return environment.get_template("reproduction.md.jinja").render(
        reproduction=reproduction,
        freeze=freeze,
        drawings=drawings,
        remarks=remarks,
        published=published,
        here="CPU" if on_cpu else "GPU",
        kinds=KINDS,
        blocks=range(1, 9),  # of ResNet-18
        mib=MIB,
    )


def find_drawings(folder: Path, here: Path) -> dict[str, str]:
    """Return captions by path of what ``train.reproduce`` has drawn in a folder, as seen from ``here``.

    Raises:
        InputError: A drawing is missing.
    """
    paths = {folder / f"repro-{name}.svg": caption for name, (_, caption) in FIGURES.items()}
    if missing := [path for path in paths if not (here / path).is_file()]:
        raise InputError(f"figures: expected a drawing at {os.path.normpath(here / missing[0])}, got no such file")
    return {path.as_posix(): caption for path, caption in paths.items()}


def read_remarks(path: Path) -> str:
    """Read Markdown.

    Raises:
        InputError: The file is not text in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"remarks: expected Markdown in UTF-8, got {path}: {error}") from error


if __name__ == "__main__":
    cli.run(main)
