"""The arithmetic that base answers are defined by."""

from collections.abc import Callable
from typing import TypeVar

import jax

F = TypeVar("F", bound=Callable)


def reference(function: F) -> F:
    """Return ``function`` with true float32 products; left alone, GPUs and TPUs round what goes into them."""
    return jax.default_matmul_precision("highest")(function)
