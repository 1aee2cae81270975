"""``python -m serve``: see ``serve.settings`` for the command line and ``serve.lifecycle`` for the process."""

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from gati_jax import InputError

from . import lifecycle, logs
from .settings import parse


def main() -> None:
    """Serve a bundle."""
    settings = parse(None, os.environ)
    logs.configure(settings.log_level, access=settings.access_log)

    def build() -> lifecycle.Parts:
        from .assemble import assemble  # noqa: PLC0415 (neither --help, bad options nor taken ports need JAX)

        return assemble(settings)

    sys.exit(lifecycle.run(settings, build))


def run(main: Callable[[], None]) -> None:
    """Turn bad input into one line, of JSON unless a person reads it at a terminal, and exit code 2."""
    terminal = sys.stderr.isatty()  # before ``configure`` replaces it
    try:
        main()
    except (InputError, OSError) as error:
        _fail(_why_no_device(error.__cause__) or str(error), terminal=terminal)
    except (RuntimeError, AssertionError) as error:
        if not (why := _why_no_device(error)):
            raise
        _fail(why, terminal=terminal)


def _why_no_device(error: BaseException | None) -> str:
    """Return why JAX finds no device, if that may be behind an error."""
    if not isinstance(error, (RuntimeError, AssertionError)):
        return ""
    from gati_jax.profiling import missing_device  # noqa: PLC0415 (as above)

    return missing_device()


def _fail(line: str, *, terminal: bool) -> NoReturn:
    if terminal:
        logs.close()
        sys.stderr.write(f"error: {line}\n")
    else:
        logs.configure("info")
        logging.getLogger("serve").error(line)
    sys.exit(2)


if __name__ == "__main__":
    run(main)
