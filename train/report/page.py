"""The page as a whole: figures, tables and words of an ``evaluation.json`` in one file that loads no other."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import resvg_py
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gati_jax.evaluation.records import Sample

from ..results import Evaluation
from . import explain, words
from .figures import FIGURES, MOST_CLASSES
from .pictures import Wall

HERE = Path(__file__).parent
NARROW, WIDE = 344, 720
ZOOM = 2
LIGHT = {
    "paper": "#ffffff", "ink": "#18202b", "muted": "#56616f", "rule": "#e3e7ec", "panel": "#f3f5f7",
    "soft": "#fbe0d0", "block": "#cfd6de", "base": "#64748b", "cascade": "#c2410c", "bad": "#b3261e",
}  # fmt: skip
DARK = {
    "paper": "#12161c", "ink": "#e8ebef", "muted": "#a4afbc", "rule": "#2b333d", "panel": "#1b2129",
    "soft": "#5a2f1a", "block": "#3a4450", "base": "#94a3b8", "cascade": "#fb923c", "bad": "#ff9b92",
}  # fmt: skip


class Drawn(NamedTuple):
    """A figure in the page: for a window and for a phone."""

    wide: Markup
    narrow: Markup
    caption: str


def write_report(folder: Path, evaluation: Evaluation, wall: Wall) -> None:
    """Write ``report.html`` and, beside it, its figures as ``figures/<name>.png``.

    Args:
        folder: Where to.
        evaluation: What was found.
        wall: Pictures of the rows of its samples.
    """
    drawings = folder / "figures"
    drawings.mkdir(parents=True, exist_ok=True)
    for name, figure in FIGURES.items():
        file = drawings / f"{name}.png"
        if figure.has(evaluation):
            file.write_bytes(_png(figure.draw(evaluation, WIDE).svg(name, "", style=_sheet(LIGHT))))
        else:
            file.unlink(missing_ok=True)  # of another evaluation
    html = render(evaluation, wall)
    (folder / "report.html").write_text(html, encoding="utf-8", errors="backslashreplace")  # names may be half a letter


def render(evaluation: Evaluation, wall: Wall) -> str:
    """Return the page. Names come from bundles and data: every value is escaped."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": words.share, "milliseconds": words.milliseconds, "brief": words.brief}
    drawn = {
        name: Drawn(_inline(name, evaluation, WIDE), _inline(name, evaluation, NARROW), figure.caption)
        for name, figure in FIGURES.items()
        if figure.has(evaluation)
    }
    return environment.get_template("report.html.jinja").render(
        e=evaluation,
        headline=words.headline(evaluation),
        explained=explain.certificate(evaluation),
        certified=words.certified_words(evaluation),
        saving=explain.saving(evaluation),
        path_words=explain.path(evaluation),
        oracle=explain.oracle(evaluation),
        how_timed=words.how_timed,
        gap=explain.gap(evaluation),
        times=words.times,
        drawn=drawn,
        wall=wall,
        groups=_by_exit(evaluation, wall),
        most_classes=MOST_CLASSES,
        light=LIGHT,
        dark=DARK,
        figures_css=Markup((HERE / "figures.css").read_text(encoding="utf-8")),  # noqa: S704 (a file of this package)
    )


def _inline(name: str, evaluation: Evaluation, width: int) -> Markup:
    """Draw a figure as an element of the page; drawings escape their own text."""
    figure = FIGURES[name]
    drawing = figure.draw(evaluation, width)
    return Markup(drawing.svg(f"{name}-{width}", figure.alternative(evaluation)))  # noqa: S704


def _by_exit(evaluation: Evaluation, wall: Wall) -> list[tuple[str, list[Sample]]]:
    """Return the samples that can be shown: of the first exit to the last, then those that disagree."""
    shown = [sample for sample in evaluation.samples if sample.row in wall.pictures or sample.row in wall.texts]
    base = evaluation.exits[-1].exit
    groups: list[tuple[str, list[Sample]]] = []
    for one in evaluation.exits:
        here = [sample for sample in shown if sample.agrees and sample.exit == one.exit]
        title = "Latest: through the whole network" if one.exit == base else f"Left at site {one.exit}"
        groups.append((title if groups or one.exit == base else f"Earliest: left at site {one.exit}", here))
    groups = [(title, here) for title, here in groups if here]
    wrong = [sample for sample in shown if not sample.agrees]
    return [*groups, *([("Answered otherwise than by your network", wrong)] if wrong else [])]


def _sheet(colours: dict[str, str]) -> str:
    """Return the figures' style sheet with fixed colours, for files."""
    sheet = (HERE / "figures.css").read_text(encoding="utf-8")
    return re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], sheet)


def _png(svg: str) -> bytes:
    """Return a drawing as a picture, with letters that are the same on every machine."""
    family = "DejaVu Sans"
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=re.sub(r"font-family: [^;]*", f"font-family: '{family}'", svg, count=1),
            zoom=ZOOM,
            background=LIGHT["paper"],
            skip_system_fonts=not has_wide_letters(svg),  # DejaVu has none of them
            font_files=_fonts(),
            font_family=family,
        )
    )


def has_wide_letters(text: str) -> bool:
    """Return whether a text has letters of Chinese, Japanese or Korean, or other wide ones."""
    return any(words.letter_width(letter) == words.WIDEST for letter in text)


@functools.cache
def _fonts() -> list[str]:
    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    return [str(folder / name) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")]
