"""What the scripts' command lines share: ``--config FILE --out DIR --json``, overrides, one clear line on bad input."""

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import track as rich_track
from rich.table import Table

from gati_jax import InputError, __version__

from .config import Config, M, describe_keys, load

Result = dict[str, Any]
T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        """Complain.

        Raises:
            InputError: Always.
        """
        raise InputError(f"arguments: {message} (see --help)")


def positive(text: str) -> int:
    """Read a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return int(text)


def share(text: str) -> float:
    """Read a share of something, or a probability."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text}")
    return value


def folder(text: str) -> Path:
    """Read the name of a folder that may not exist yet."""
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text}")
    return Path(text)


def file(text: str) -> Path:
    """Read the name of a file that may not exist yet."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text}")
    return Path(text)


def parser(description: str, example: str, *, out: bool = True, as_json: bool = True) -> Parser:
    """Return a parser with what every script has, ``--out DIR`` and ``--json``, unless the script is told otherwise."""
    p = Parser(
        prog=f"python -m {example.split()[2]}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if out:
        p.add_argument("--out", type=folder, required=True, metavar="DIR", help="folder for results, made if need be")
    if as_json:
        p.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    return p


def parse_experiment(argv: Sequence[str] | None, description: str, example: str) -> tuple[argparse.Namespace, Config]:
    """Parse ``--config FILE --out DIR [--section.key value ...]`` of an experiment with caches, see ``parse``."""
    return parse(Config, argv, description, example)


def parse(model: type[M], argv: Sequence[str] | None, description: str, example: str) -> tuple[argparse.Namespace, M]:
    """Parse ``--config FILE --out DIR [--section.key value ...]``.

    Args:
        model: What the file may say.
        argv: The command line; None for the process's.
        description: What the script does.
        example: A whole command.

    Raises:
        InputError: See ``load``.
    """
    p = parser(description, example)
    p.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML file, see configs/")
    keys = "\n".join(f"  --{key}  (default: {default})  {text}".rstrip() for key, default, text in describe_keys(model))
    p.epilog = f"{p.epilog}\n\nevery key of the config can be overridden; defaults where the file says nothing:\n{keys}"
    arguments, overrides = p.parse_known_args(argv)
    return arguments, load(model, arguments.config, overrides)


def run(main: Callable[[], None]) -> None:
    """Run a script: log to standard error, turn bad input into one line and exit code 2."""
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False)],
        force=True,
    )
    for name in ("gati_jax", "train"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def write_result(path: Path, result: Result) -> None:
    """Write a result as JSON; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def report(result: Result, show: Callable[[Result], None], *, out: Path | None, as_json: bool) -> None:
    """Write a result where it was asked for; print it as JSON, or as tables."""
    if out is not None:
        write_result(out, result)
    if as_json:
        print(json.dumps(result))
    else:
        show(result)


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Yield ``items`` behind a progress bar, if standard error is a terminal."""
    console = Console(stderr=True)
    yield from rich_track(items, description, console=console, disable=not console.is_terminal, transient=True)


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table."""
    table = Table(title=escape(title), title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        # Names come from bundles and data sets: brackets in them are no markup.
        table.add_row(*(escape(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row))
    # Off a terminal, rich would cut tables at 80 columns.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
        "gati-jax": __version__,
    } | {package: importlib.metadata.version(package) for package in packages}
