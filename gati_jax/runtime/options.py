"""Compiler options: they belong to a whole program, not to one of its operations."""

import functools
from collections.abc import Callable
from typing import Any

import jax

Options = tuple[tuple[str, str], ...]
"""Names and values."""


@functools.cache
def compiled(
    function: Callable[..., Any],
    options: Options,
    *,
    static: tuple[str, ...] = (),
    keep_unused: bool = False,
    donate: tuple[str, ...] = (),
) -> jax.stages.Wrapped:
    """Return ``function`` jitted with these options; the same program for the same arguments.

    Args:
        function: At module level, or the cache would keep what it closes over.
        options: Compiler options.
        static: Names of static arguments.
        keep_unused: Hand over even those arrays that the program does not read.
        donate: Names of arguments whose memory the results may take.
    """
    return jax.jit(
        function,
        static_argnames=static,
        donate_argnames=donate,
        keep_unused=keep_unused,
        compiler_options=dict(options) or None,
    )
