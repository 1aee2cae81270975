"""Results as people read them: shares in percent, and tables as HTML, which notebooks show in place of a repr."""

import functools
import math
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from gati_jax.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

MOST_ROWS = 60
_NUMBER = re.compile(r"-?[\d.,]+(e[-+]\d+)?%?|-|(inf|nan)")


@functools.cache
def terminal() -> "Console":
    """Return what draws on standard error: one for all, so that bars and log lines do not overwrite each other."""
    from rich.console import Console  # noqa: PLC0415 (answering does without it)

    return Console(stderr=True)


def html_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, notes: Sequence[str] = ()
) -> str:
    """Return rows as a table for ``_repr_html_``; names may come from untrusted files, so all text is escaped.

    Args:
        title: The table's caption.
        columns: Their titles; none where all are empty.
        rows: The first 60 are shown.
        notes: Sentences below it.

    Example:
        >>> html_table("Two & two", (), [("a", 0.25)])  # doctest: +ELLIPSIS
        '<table>...Two &amp; two</caption><tr><td ...left">a</td><td ...right">0.25</td></tr></table>'
    """
    titles = "".join(f'<th scope="col">{_text(name)}</th>' for name in columns)
    head = f"<tr>{titles}</tr>" if any(columns) else ""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:MOST_ROWS])
    more = [f"and {len(rows) - MOST_ROWS} more rows"] if len(rows) > MOST_ROWS else []
    below = "".join(f"<p>{_text(note)}</p>" for note in (*more, *notes))
    caption = f'<caption style="white-space: nowrap; text-align: left">{_text(title)}</caption>'
    return f"<table>{caption}{head}{body}</table>{below}"


def percent(value: float | None, *, digits: int = 2, up: bool = False, down: bool = False) -> str:
    """Write a share in percent, without zeros at the end.

    Args:
        value: The share; None: "-".
        digits: Of a percent, at most.
        up: Round up, as an upper bound must be.
        down: Round down, as a confidence must be.

    Example:
        >>> percent(0.0516493), percent(0.0516493, up=True), percent(0.00001), percent(0.99999), percent(1.0)
        ('5.16%', '5.17%', '<0.01%', '>99.99%', '100%')
    """
    if value is None:
        return "-"
    scaled, unit = round(value * 10 ** (digits + 2), 6), 10**digits
    rounded = math.ceil(scaled) if up else math.floor(scaled) if down else round(scaled)
    sign = ""
    if not (up or down) and 0 < value < 1:  # no share that is not 0 or 1 is written as if it were
        sign = "<" if rounded == 0 else ">" if rounded == 100 * unit else ""
        rounded = min(max(rounded, 1), 100 * unit - 1)
    text = f"{rounded / unit:.{digits}f}"
    return f"{sign}{text.rstrip('0').rstrip('.') if digits else text}%"


def _cell(value: object) -> str:
    """Return a cell: numbers at the right, text at the left."""
    text = _text(value)
    side = "right" if _NUMBER.fullmatch(text) else "left"
    return f'<td style="text-align: {side}">{text}</td>'


def _text(value: object) -> str:
    return escape(printable(f"{value:.4g}" if isinstance(value, float) else str(value), most=400))
