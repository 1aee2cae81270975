"""Imports go one way: a room imports only rooms before it, so that each can be read without those behind it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [
    *(
        "errors",
        "display",
        "files",
        "options",
        "pytrees",
        "devices",
        "data",
        "planning",
        "certification",
        "models",
        "imports",
        "caches",
    ),
    *("runtime", "export", "fitting", "profiling", "bundle", "inference", "evaluation", "adaptation"),
]
HEAVY = {"jax", "flax", "optax", "orbax"}
FILES = sorted((ROOT / "gati_jax").rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, wherever in the file."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "gati_jax" else (module,)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_room_imports_only_rooms_before_it(file):
    room = file.relative_to(ROOT / "gati_jax").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    names = {name.split(".")[1] for name in imported(file) if name.startswith("gati_jax.")}
    behind = [name for name in names if name in ROOMS and ROOMS.index(name) > ROOMS.index(room)]
    assert not behind, f"{room} imports {', '.join(behind)}"


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name in {"planning", "certification"}], ids=lambda f: f.name
)
def test_planning_and_certification_never_run_a_network(file):
    assert not HEAVY & {name.split(".")[0] for name in imported(file)}


@pytest.mark.parametrize("folder", ["gati_jax", "serve", "train"])
def test_the_library_knows_neither_scripts_nor_the_server(folder):
    others = {"gati_jax": {"serve", "train"}, "serve": {"train"}, "train": {"serve"}}[folder]
    for file in sorted((ROOT / folder).rglob("*.py")):
        assert not others & {name.split(".")[0] for name in imported(file)}, file
