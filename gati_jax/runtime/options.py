"""Compiler options: they belong to a whole program, not to one of its operations."""

import functools
from collections.abc import Callable
from typing import Any

import jax

Options = tuple[tuple[str, str], ...]
"""Names and values."""


@functools.cache
def compiled(function: Callable[..., Any], options: Options, *, static: str | None = None) -> jax.stages.Wrapped:
    """Return ``function`` jitted with these options; the same program for the same arguments.

    Args:
        function: At module level, or the cache would keep what it closes over.
        options: Compiler options.
        static: The name of a static argument, if there is one.
    """
    return jax.jit(function, static_argnames=static, compiler_options=dict(options) or None)
