"""What the page of a reproduction is put together from."""

from collections.abc import Sequence

from .results import Run

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
