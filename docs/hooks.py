"""MkDocs hooks: fill in what the code itself can say while the site is built, so that it cannot differ from the code.

<!-- help: python -m NAME -->   what ``python -m NAME --help`` prints
<!-- api: PACKAGE -->           the reference of every class and function that a package exports
<!-- names: PACKAGE -->         a table of these, with links to their reference
<!-- cells of NOTEBOOK -->      the cells of a notebook in docs/, with what they returned if it was stored with that
"""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

_MARKER = re.compile(r"^<!-- (help: python -m|api:|names:) ([\w.]+) -->$", flags=re.MULTILINE)
_NOTEBOOK = re.compile(r"^<!-- cells of ([\w.]+) -->$", flags=re.MULTILINE)
_SPECS = "gati_jax.caches.specs"


def on_page_markdown(markdown: str, **_: Any) -> str:  # noqa: ANN401 (what MkDocs passes to its hooks)
    """Fill in a page.

    Args:
        markdown: The page as it is written.

    Returns:
        The page with every marker replaced.

    Raises:
        CalledProcessError: A command has no ``--help``.
        ImportError: There is no such package.
    """
    fill = {"help: python -m": _help, "api:": _api, "names:": _names}
    markdown = _NOTEBOOK.sub(lambda match: _cells(Path(__file__).parent / match[1]), markdown)
    return _MARKER.sub(lambda match: fill[match[1]](match[2]), markdown)


def _cells(path: Path) -> str:
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_output(output) for output in cell.get("outputs", [])]
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", [])})
    if "text/html" in data:
        return "".join(data["text/html"])
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"


def _help(module: str) -> str:
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603 (a module that a page of ours names)
    return f"```text\n{done.stdout.strip()}\n```"


def _api(package: str) -> str:
    # What a package passes on from another room is described there; specs, which are made from the modules, with these.
    here = [path for path, _ in _exported(package) if path.startswith(f"{package}.")]
    own = [path for path in here if _SPECS not in path or path.rpartition(".")[2].islower()]
    return "\n\n".join(f"::: {path}\n    options:\n      heading_level: 3" for path in own)


def _names(package: str) -> str:
    rows = [f"| [`{path.rpartition('.')[2]}`][{path}] | {summary} |" for path, summary in _exported(package)]
    return "\n".join(["| name | |", "| --- | --- |", *rows])


def _exported(package: str) -> list[tuple[str, str]]:
    """List the classes and functions of a package: where each is defined, and the first line of its docstring."""
    module = importlib.import_module(package)
    found = []
    for name in sorted(dir(module), key=str.lower):
        value: Any = getattr(module, name)
        described = not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
        if described and (value.__module__ or "").startswith("gati_jax") and value.__name__ == name:
            found.append((f"{value.__module__}.{name}", (value.__doc__ or "").strip().partition("\n")[0]))
    return found
