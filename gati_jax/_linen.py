"""Linen modules as plain functions."""

from typing import Any, cast

import flax.linen as nn
from jaxtyping import Array


def call(module: nn.Module, variables: Any, *inputs: Array) -> Array:  # noqa: ANN401 (a pytree)
    """Apply a module that keeps no state: ``apply`` may also return changed state, which its type cannot rule out."""
    return cast("Array", module.apply(variables, *inputs))
