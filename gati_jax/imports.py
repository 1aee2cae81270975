"""Functions named as ``package.module:function``, on a command line or in a config: code of the user's own.

Only names that the user gives are imported. A bundle is untrusted, and nothing that it says comes here.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import InputError, describe_failure
from .models import Chain
from .options import check_function_name


def load_chain(name: str, argument: str = "chain") -> Chain:
    """Call a function of the user's own for the network that it returns.

    Args:
        name: ``package.module:function``; the function takes no arguments and returns a ``Chain``.
        argument: What the name is called in messages.

    Raises:
        InputError: It cannot be imported, needs arguments, fails, or returns something else.
    """
    function = import_named(name, argument)
    expected = f"{argument}: expected {name} to take no arguments and to return a gati_jax.Chain"
    if isinstance(function, Chain):  # which is callable, too
        raise InputError(f"{expected}, got a Chain itself: put it into a function")
    if not callable(function):
        raise InputError(f"{expected}, got {type(function).__name__}")
    if needed := _arguments(function):
        raise InputError(f"{expected}, got {name.partition(':')[2]}{needed}")
    try:
        chain = function()
    except (Exception, SystemExit) as error:
        raise InputError(f"{argument}: {name} failed: {describe_failure(error)}") from error
    if not isinstance(chain, Chain):
        raise InputError(f"{expected}, got {type(chain).__name__} from it")
    return chain


def import_named(name: str, argument: str) -> object:
    """Return what a module has under a name; the current directory is importable, as with ``python -m``.

    Args:
        name: ``package.module:name``.
        argument: What it is called in messages.

    Raises:
        InputError: The name has another form, or cannot be imported.
    """
    try:
        module_name, _, attribute = check_function_name(name).partition(":")
    except ValueError as error:
        raise InputError(f"{argument}: {error}, got {name!r:.200}") from error
    if not {"", here := str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise InputError(f"{argument}: cannot import {module_name}: {describe_failure(error)}") from error
    if not hasattr(module, attribute):
        raise InputError(f"{argument}: expected a function {attribute} in {module.__name__}, got none")
    return getattr(module, attribute)


def _arguments(function: Callable[..., object]) -> str:
    """Return the arguments of a function that cannot be called without any; empty if it can, as far as is known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # one that is not written in Python may not tell
        return ""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p for p in signature.parameters.values() if p.default is p.empty and p.kind not in optional]
    return str(signature) if needed else ""
