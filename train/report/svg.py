"""Drawings as SVG: shapes by class, so that one style sheet colours them for light, dark and print."""

import dataclasses
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from gati_jax.errors import printable

from .words import letter_width

LETTER = 7.3  # mean width of a small letter of a label
NARROW = 500  # figures up to here are for phones


def text_width(text: str) -> float:
    """Return about how wide a label is."""
    return LETTER * sum(map(letter_width, text))


@dataclasses.dataclass
class Drawing:
    """Shapes in the order in which they are drawn. Classes are those of ``figures.css``."""

    width: float
    height: float
    shapes: list[str] = dataclasses.field(default_factory=list)

    @property
    def narrow(self) -> bool:
        """Whether it is for a phone."""
        return self.width <= NARROW

    def rect(self, x: float, y: float, width: float, height: float, kind: str, *, title: str = "", **more: str) -> None:
        """Add a rectangle; ``title`` is shown where a pointer rests on it."""
        tip = f"<title>{_text(title)}</title>" if title else ""
        box = f'x="{_n(x)}" y="{_n(y)}" width="{_n(max(width, 0))}" height="{_n(max(height, 0))}"'
        self.shapes.append(f'<rect class="{kind}" {box}{_attributes(more)}>{tip}</rect>')

    def line(self, start: tuple[float, float], end: tuple[float, float], kind: str) -> None:
        """Add a straight line."""
        (x1, y1), (x2, y2) = start, end
        self.shapes.append(f'<line class="{kind}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>')

    def path(self, points: Sequence[tuple[float, float]], kind: str, *, closed: bool = False) -> None:
        """Add straight lines from point to point."""
        steps = "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        self.shapes.append(f'<path class="{kind}" d="M{steps}{"Z" if closed else ""}"/>')

    def dot(self, x: float, y: float, kind: str, *, radius: float = 5, title: str = "") -> None:
        """Add a disc."""
        tip = f"<title>{_text(title)}</title>" if title else ""
        self.shapes.append(f'<circle class="{kind}" cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}">{tip}</circle>')

    def text(self, x: float, y: float, text: str, kind: str = "label", *, anchor: str = "start") -> None:
        """Add a line of text; ``anchor`` is start, middle or end. In the middle it is kept inside the drawing."""
        if anchor == "middle":
            half = text_width(text) / 2
            x = min(max(x, half), self.width - half)
        self.shapes.append(f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{_text(text)}</text>')

    def beside(self, x: float, y: float, text: str, *, gap: float, most: float | None = None) -> None:
        """Add a label at one side of a point: on the right where it ends before ``most``, or the left has no room."""
        end = x + gap + text_width(text)
        right = end <= (self.width if most is None else most) or x - gap < text_width(text)
        self.text(x + (gap if right else -gap), y, text, "label", anchor="start" if right else "end")

    def svg(self, name: str, title: str, *, style: str = "") -> str:
        """Return it as an element.

        Args:
            name: Its id, one of a page.
            title: What a screen reader says.
            style: A style sheet of its own, for a file.
        """
        size = f'width="{_n(self.width)}" height="{_n(self.height)}"'
        space = ' xmlns="http://www.w3.org/2000/svg"' if style else ""
        head = f'<svg{space} viewBox="0 0 {_n(self.width)} {_n(self.height)}" {size}'
        sheet = f"<style>{style}</style>" if style else ""
        label = f'role="img" aria-labelledby="{name}"><title id="{name}">{_text(title)}</title>'
        return f"{head} {label}{sheet}{''.join(self.shapes)}</svg>"


@dataclasses.dataclass(frozen=True)
class Scale:
    """From values to positions, in proportion, or in proportion to logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values inside the range."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            return [m * 10.0**d for d in decades for m in (1, 2, 5) if self.low <= m * 10.0**d <= self.high]
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * i for i in range(first, last + 1)]


def spread_out(positions: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Move rising positions apart, so that labels at them do not touch, as little as a sweep each way can."""
    if not positions:
        return []
    found = np.array(positions, float)
    found[-1] = min(found[-1], high)
    for i in range(len(found) - 2, -1, -1):
        found[i] = min(found[i], found[i + 1] - least)
    found[0] = max(found[0], low)
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + least)
    return found.tolist()


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _text(text: str) -> str:
    """Escape text; characters that XML has no place for are written out."""
    return escape(printable(text, most=1000))


def _attributes(more: dict[str, str]) -> str:
    return "".join(f' {name.replace("_", "-")}="{escape(value)}"' for name, value in more.items())
