"""One optimiser step."""

from typing import Any, TypeVar

import jax
import optax

P = TypeVar("P")


def apply_gradients(
    optimizer: optax.GradientTransformation, gradients: P, opt_state: optax.OptState, params: P
) -> tuple[P, Any]:
    """Return updated parameters and optimiser state.

    optax counts steps in int32 and raises floats to that power, which strict dtype promotion refuses: it is relaxed
    here, and only here.
    """
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradients, opt_state, params)  # pyright: ignore[reportArgumentType] (pytrees)
        return optax.apply_updates(params, updates), opt_state  # pyright: ignore[reportReturnType, reportArgumentType]
