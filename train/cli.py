"""What the scripts' command lines share: ``--config FILE --out DIR --json``, overrides, one clear line on bad input."""

import argparse
import json
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from gati_jax import Bundle, Chain, InputError, Ledger, load_bundle
from gati_jax.bundle import installed_versions
from gati_jax.certification import AnyLedger
from gati_jax.display import terminal
from gati_jax.errors import text_table
from gati_jax.files import write_atomically
from gati_jax.imports import load_chain
from gati_jax.options import Strict, describe_options
from gati_jax.profiling import missing_device

from .config import M, did_you_mean, keys_of, load
from .watch import watching

Result = dict[str, Any]
versions = installed_versions
"""What results say of how they came about."""
COMMAND = "gati-jax "


class Parser(argparse.ArgumentParser):
    """A parser that reports every error as an ``InputError`` of one line, and suggests a flag for an unknown one."""

    keys: Sequence[str] = ()  # of a config, all of which are flags, too

    def error(self, message: str) -> NoReturn:
        """Report an error."""
        raise InputError(f"arguments: {message} (see --help)")

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride] (its overloads)
        self,
        args: Sequence[str] | None = None,
        namespace: Any = None,  # noqa: ANN401 (argparse's own)
    ) -> tuple[Any, list[str]]:
        """Parse what is known; check first that every flag is, or belongs to a section of ``self.keys``."""
        tokens = sys.argv[1:] if args is None else list(args)
        flags = [*self._option_string_actions, *(f"--{key}" for key in self.keys)]
        sections = {key.partition(".")[0] for key in self.keys}
        for token in tokens:
            flag = token.partition("=")[0]
            # Keys below a section are checked with the whole config.
            in_config = flag[2:].replace("-", "_").partition(".")[0] in sections
            if len(flag) > len("--") and flag.startswith("--") and flag not in flags and not in_config:
                raise InputError(f"arguments: unknown flag {flag}{did_you_mean(flag, flags)} (see --help)")
        return super().parse_known_args(tokens, namespace)


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
    return _outside_bundles(Path(text))


def file(text: str) -> Path:
    """Read the name of a file that may not exist yet."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, got the folder {text}")
    return _outside_bundles(Path(text))


def _outside_bundles(path: Path) -> Path:
    for one in (path.resolve(), *path.resolve().parents):
        if (one / "manifest.json").is_file() and (one / "plans.json").is_file():
            raise argparse.ArgumentTypeError(
                f"expected a folder outside the bundle {one}, which would not load any more"
            )
    return path


def parser(description: str, example: str, *, out: bool = True, as_json: bool = True) -> Parser:
    """Return a parser with the flags that most scripts have, ``--out DIR`` and ``--json``, and a whole command."""
    module = f"python -m {example.split()[2]}"
    prog = sys.argv[0] if sys.argv[0].startswith("gati-jax ") else module  # see ``gati_jax.commands``
    example = example.replace(module, prog)
    p = Parser(
        prog=prog,
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


def add_bundle(p: Parser) -> None:
    """Add the flags of scripts that take a bundle, see ``read_bundle``."""
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="folder of the bundle")
    add_chain(p)


def add_data(p: Parser) -> None:
    """Add the flags of scripts that read the data that a bundle was fitted on."""
    where = "folder or file of the data, if not where the bundle was fitted"
    p.add_argument("--data-dir", type=Path, metavar="DIR", help=where)
    code = "package.module:function that the images come from, if the bundle was fitted on such: a bundle runs no code"
    p.add_argument("--data-name", metavar="NAME", help=code)


def add_chain(p: Parser) -> None:
    """Add the flag that names a user's own network."""
    own = "package.module:function that returns the network, if it is one of your own"
    p.add_argument("--chain", metavar="FUNCTION", help=own)


def read_chain(arguments: argparse.Namespace) -> Chain | None:
    """Return the user's own network, if ``--chain`` names one: a bundle names none."""
    return load_chain(arguments.chain, "--chain") if arguments.chain else None


def read_bundle(arguments: argparse.Namespace) -> Bundle:
    """Load the bundle that ``--bundle`` names."""
    return load_bundle(arguments.bundle, chain=read_chain(arguments))


def add_ledger(p: Parser) -> None:
    """Add the flag of scripts that show how often a plan disagrees on rows."""
    counted = (
        "where looks at certify rows are counted (default: the user's own; none: this is the only one, on your word)"
    )
    p.add_argument("--ledger", type=ledger, default="user", metavar="FILE", help=counted)


def add_process(p: Parser) -> None:
    """Add the flag of a script that several processes may run together, see ``join``."""
    where = "this is process I (from 0) of N that meet at HOST:PORT; auto: as Slurm, MPI or Kubernetes say"
    p.add_argument("--process", type=process, metavar="I/N@HOST:PORT", help=where)


def process(text: str) -> tuple[str | None, int | None, int | None]:
    """Read a process's place among others: the address where they meet, their number, and its own."""
    if text == "auto":
        return None, None, None
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})@(.+:\d{1,5})", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"expected auto or I/N@HOST:PORT with I below N, got {text}")
    return found[3], int(found[2]), int(found[1])


def join(arguments: argparse.Namespace) -> bool:
    """Meet the other processes, if ``--process`` says that there are any; return whether this one writes results."""
    if arguments.process is None:
        return True
    import jax  # noqa: PLC0415 (--help needs none)

    jax.distributed.initialize(*arguments.process)
    return jax.process_index() == 0


def add_looks(p: Parser) -> None:
    """Add the flags of scripts that open the certify split."""
    add_ledger(p)
    p.add_argument("--reveal", action="store_true", help="say why a look failed; this closes its rows for other plans")


def ledger(text: str) -> AnyLedger:
    """Read where looks are counted."""
    return None if text == "none" else "user" if text == "user" else Ledger(file(text))


def config_parser(model: type[Strict], description: str, example: str, *, looks: bool = False) -> Parser:
    """Return a parser of ``--config FILE --out DIR [--section.key value ...]``; ``model`` is what the file may say."""
    p = parser(description, example)
    if looks:
        add_looks(p)
    p.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML file, see configs/")
    add_keys(p, model, "keys of the config, all of which are flags, too (N: a position in a list, from 0)")
    return p


def add_keys(p: Parser, model: type[Strict], title: str) -> None:
    """Let a parser take every key of a model as a flag, ``--section.key value``, and describe them in its help."""
    p.epilog = f"{p.epilog}\n\n{title}\n\n{help_of(model)}"
    p.keys = keys_of(model)


def parse(p: Parser, model: type[M], argv: Sequence[str] | None) -> tuple[argparse.Namespace, M]:
    """Parse a command line by a ``config_parser`` of the same model."""
    arguments, overrides = p.parse_known_args(argv)
    if chain := getattr(arguments, "chain", None):
        overrides = [*overrides, "--base.chain", chain]
    return arguments, load(model, arguments.config, overrides)


def help_of(model: type[Strict]) -> str:
    """Describe all keys of a model, grouped by section: type, meaning and default, a line each."""
    lines: list[str] = []
    before = None
    for option in describe_options(model):
        section = option.key.rpartition(".")[0]
        if section != before:
            lines.append(f"\n[{section}] {option.section}" if section else f"\n{option.section}")
        before = section
        default = "" if option.default == "unset" and "unset:" in option.help else f" ({option.default})"
        lines.append(f"  {f'--{option.key} {option.type}':<42} {option.help}{default}")
    return "\n".join(lines).lstrip("\n")


def run(main: Callable[[], None]) -> None:
    """Run a script: log to standard error, turn bad input into one line and exit code 2."""
    for name in ("gati_jax", "train", "benchmarks"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)
    try:
        with watching() as watch:
            logging.basicConfig(level=logging.WARNING, handlers=[_log_handler(), watch], force=True)
            main()
    except (InputError, OSError) as error:
        why = missing_device() if isinstance(error.__cause__, (RuntimeError, AssertionError)) else ""
        print(f"error: {why or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, AssertionError):
        if not (why := missing_device()):
            raise
        print(f"error: {why}", file=sys.stderr)
        sys.exit(2)


def _log_handler() -> logging.Handler:
    """Return what writes log lines to standard error: laid out on a terminal, one line each in a pipe or a file."""
    console = terminal()
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    return handler


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON; a reader sees the old file or the new one."""
    write_atomically(path, f"{json.dumps(result, indent=2)}\n".encode())


def report(result: Result, show: Callable[[Result], None], *, out: Path | None, as_json: bool) -> None:
    """Write a result where it was asked for; print it as JSON, or as tables."""
    if out is not None:
        write_result(out, result)
    if as_json:
        print(json.dumps(result))
    else:
        show(result)


def command_line(argv: Sequence[str]) -> str:
    """Return the command line that a process with these arguments came from."""
    script = argv[0]
    if script.startswith(COMMAND):  # "gati-jax fit", as the command calls itself
        return shlex.join([*script.split(), *argv[1:]])
    parts = Path(script.removesuffix(".py")).parts
    if "train" in parts:  # ``python -m`` puts the module's file here
        last = len(parts) - 1 - parts[::-1].index("train")
        script = ".".join(parts[last:]).removesuffix(".__main__")
    start = ["-m", script] if script.startswith("train.") else [script]
    return shlex.join(["python", *start, *argv[1:]])


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table: with a frame on a terminal, as plain text elsewhere."""
    rows = list(rows)
    if not sys.stdout.isatty():
        print(text_table(title, columns, rows))
        return
    table = Table(title=escape(title), title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        # Names come from bundles and data sets: brackets in them are no markup.
        table.add_row(*(escape(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row))
    Console().print(table)
