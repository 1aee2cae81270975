"""The command ``gati-jax``: the scripts of ``train`` and ``serve`` under short names, in any folder.

In a wheel both packages lie in this folder; in a checkout they lie beside ``gati_jax``. Either way they are imported as
parts of this package, so that no train.py or serve.py in the current folder, or among the user's own modules, can take
their place: ``gati-jax fit --chain train:network`` calls the user's.
"""

import difflib
import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

from gati_jax import __version__

_HERE = Path(__file__).parent
_ROOT = _HERE if (_HERE / "train").is_dir() else _HERE.parents[1]
if _ROOT != _HERE:
    __path__.append(str(_ROOT))
CONFIGS = _ROOT / "configs"


class Script(NamedTuple):
    """A script behind a name."""

    module: str
    help: str
    parser: str = ""
    """The module that has ``parser()``, if it is another."""

    @property
    def package(self) -> str:
        """``train`` or ``serve``; also the extra that it needs."""
        return self.module.partition(".")[0]


SCRIPTS = {
    "init": Script("train.init", "write a commented config for the data and the weights at hand"),
    "train-base": Script("train.base", "train a base network"),
    "fit": Script("train.caches", "fit, plan and certify caches for a frozen network"),
    "tune": Script("train.tune", "tune a bundle for this device"),
    "evaluate": Script("train.evaluate", "evaluate a bundle: agreement, exits, time"),
    "score": Script("train.score", "score images in bulk with a bundle, as Parquet files"),
    "export": Script("train.export.__main__", "export a bundle's cascades as ONNX models"),
    "adapt": Script("train.adapt", "simulate adaptation on a recorded trace"),
    "serve": Script("serve.__main__", "serve a bundle over HTTP and gRPC", "serve.settings"),
}
COMPLETION = "completion"
_HELP = ("help", "-h", "--help")
_USAGE = "usage: gati-jax COMMAND [--help | options]"


def main() -> None:
    """Run the command that the process was started with."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in _HELP:
        _print(_help())
    elif name == "--version":
        _print(f"gati-jax {__version__}")
    elif name == COMPLETION:
        _guarded(name, lambda: _print(completion()))
    elif name in SCRIPTS:
        sys.argv = [f"gati-jax {name}", *rest]  # by which the script calls itself in its help
        _guarded(name, lambda: _run(SCRIPTS[name]))
    else:
        near = difflib.get_close_matches(name, [*SCRIPTS, COMPLETION], n=1)
        _fail(f"arguments: unknown command {name[:100]!r}{f'; did you mean {near[0]}?' if near else ''} (see --help)")


def completion() -> str:
    """Return a script that completes commands and their flags in bash and in zsh."""
    cases = []
    for name, script in SCRIPTS.items():
        parser = _load(script.parser or script.module).parser()
        flags = [flag for action in parser._actions for flag in action.option_strings]  # noqa: SLF001 (argparse lists them nowhere else)
        flags += [f"--{key}" for key in getattr(parser, "keys", ()) if ".N." not in key]
        cases.append(f'    {name}) words="{" ".join(flags)}" ;;')
    names = " ".join([*SCRIPTS, COMPLETION])
    return "\n".join(
        [
            "# gati-jax in bash and zsh: source <(gati-jax completion), or append that line to ~/.bashrc or ~/.zshrc",
            'if [ -n "${ZSH_VERSION:-}" ]; then',
            "  whence -w compdef > /dev/null || { autoload -U +X compinit && compinit; }",
            "  autoload -U +X bashcompinit && bashcompinit",
            "fi",
            "_gati_jax() {",
            "  local words",
            '  case "${COMP_WORDS[1]}" in',
            *cases,
            f'    *) [ "$COMP_CWORD" -gt 1 ] || words="{names}" ;;',
            "  esac",
            '  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))',
            "}",
            "complete -o default -F _gati_jax gati-jax",
        ]
    )


def _help() -> str:
    width = max(map(len, (*SCRIPTS, COMPLETION)))
    rows = [*((name, script.help) for name, script in SCRIPTS.items()), (COMPLETION, "print a script for bash and zsh")]
    lines = [f"  {name.ljust(width)}  {text}" for name, text in rows]
    return "\n".join([_USAGE, "", "Learned early exits for a trained classifier, with a certificate.", "", *lines])


def _load(module: str) -> Any:  # noqa: ANN401 (a module that this package does not know in advance)
    return importlib.import_module(f"{__name__}.{module}")


def _run(script: Script) -> None:
    module = _load(script.module)
    run = module.run if script.package == "serve" else _load("train.cli").run
    run(module.main)


def _guarded(name: str, run: Any) -> None:  # noqa: ANN401 (a function)
    """Say in one line which extra is missing, if a package is."""
    try:
        run()
    except ModuleNotFoundError as error:
        if (error.name or __name__).partition(".")[0] == "gati_jax":
            raise
        extra = "serve" if name == "serve" else "train,serve" if name == COMPLETION else "train"
        _fail(f"{name} needs the package {error.name}: pip install 'gati-jax[{extra}]'")


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _fail(text: str) -> None:
    sys.stderr.write(f"error: {text}\n")
    sys.exit(2)
