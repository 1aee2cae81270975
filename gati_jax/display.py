"""Tables as HTML, which notebooks show in place of a repr."""

from collections.abc import Sequence
from html import escape

from gati_jax.errors import printable

MOST_ROWS = 60


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
        >>> html_table("Two & two", (), [("a", 0.25)])
        '<table><caption>Two &amp; two</caption><tr><td>a</td><td>0.25</td></tr></table>'
    """
    head = f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in columns)}</tr>" if any(columns) else ""
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows[:MOST_ROWS])
    more = [f"and {len(rows) - MOST_ROWS} more rows"] if len(rows) > MOST_ROWS else []
    below = "".join(f"<p>{_text(note)}</p>" for note in (*more, *notes))
    return f"<table><caption>{_text(title)}</caption>{head}{body}</table>{below}"


def _text(value: object) -> str:
    return escape(printable(f"{value:.4g}" if isinstance(value, float) else str(value), most=400))
