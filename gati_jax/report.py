"""An evaluation as one plain HTML page without scripts or outside files."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(evaluation: Mapping[str, Any]) -> str:
    """Return the page for an ``evaluation.json``. Every value is escaped."""
    environment = Environment(
        loader=PackageLoader("gati_jax", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["share"] = _share
    return environment.get_template("evaluation.html").render(evaluation)


def _share(value: float | None, digits: int = 2) -> str:
    """Write a share as a percentage; a dash where it is not known."""
    return "-" if value is None else f"{value:.{digits}%}"
