"""The page at /docs: the OpenAPI description for people, without a script and without another host."""

import html
from collections.abc import Mapping
from typing import Any

HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
_STYLE = (
    "body{font:1rem/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{border-bottom:1px solid #8884;padding:.3rem .8rem;text-align:left}"
    "code{font-size:.9em}"
)


def render(description: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        description: The server's OpenAPI document.
    """
    info, schemas = description["info"], description["components"]["schemas"]
    operations = [
        (f"<code>{method.upper()} {_text(path)}</code>", _text(operation.get("description", "")), _codes(operation))
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    ]
    fields = [
        (f"<code>{_text(kind)}</code>", f"<code>{_text(name)}</code>", _text(field.get("description", "")))
        for kind in ("InferenceRequest", "RequestInput", "RequestedOutput")
        for name, field in schemas[kind]["properties"].items()
    ]
    title = f"{_text(info['title'])} {_text(info['version'])}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{_text(info['description'])}</p>"
        "<p>The description for machines, with all schemas: <a href=openapi.json>openapi.json</a>.</p>"
        f"<h2>Paths</h2>{_table(('request', 'answer', 'status'), operations)}"
        f"<h2>The body of infer</h2>{_table(('object', 'field', ''), fields)}</html>"
    )


def _text(given: object) -> str:
    return html.escape(str(given))


def _codes(operation: Mapping[str, Any]) -> str:
    return " ".join(sorted(map(_text, operation["responses"])))


def _table(names: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table of cells that are HTML."""
    head = "".join(f"<th>{name}" for name in names)
    return f"<table><tr>{head}{''.join('<tr>' + ''.join(f'<td>{cell}' for cell in row) for row in rows)}</table>"
