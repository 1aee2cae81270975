"""Standardised features while fitting, folded away afterwards."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Standardize(nn.Module):
    """Subtract the mean and divide by the standard deviation of every feature, as the batch given to ``init`` has them.

    They are constants ("statistics", not "params"). A linear layer behind them can express what it could without; but
    activations behind a ReLU have means far from zero and scales far apart, which costs a fit of a few epochs dearly.
    Features are the last axis; of a picture, every position of a channel counts alike.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "batch *positions features"]) -> Float[Array, "batch *positions features"]:
        """Return standardised features."""
        axes = tuple(range(x.ndim - 1))
        mean = self.variable("statistics", "mean", lambda: x.mean(axes))
        std = self.variable("statistics", "std", lambda: _standard_deviation(x))
        shape = (*(1,) * (x.ndim - 1), -1)
        return (x - mean.value.reshape(shape)) / std.value.reshape(shape)


def _standard_deviation(x: Float[Array, "batch *positions features"]) -> Float[Array, " features"]:
    """Return every feature's; those that hardly vary in this batch are not to be blown up: hence the floor."""
    variance = x.var(tuple(range(x.ndim - 1)))
    floor = 0.01 * variance.mean()
    return jnp.where(floor > 0, jnp.sqrt(variance + floor), 1.0)


def fold_into(layer: dict[str, Any], statistics: dict[str, Any]) -> dict[str, Any]:
    """Fold standardisation into the linear layer or unpadded convolution behind it, as batch norm is folded.

    ``((x - mean) / std) @ w + b = x @ (w / std) + (b - (mean / std) @ w)``. A lookup then does one operation less.

    Args:
        layer: "kernel" [..., inputs, outputs] and "bias" [outputs].
        statistics: "mean" and "std" [inputs].
    """
    mean, std = (np.asarray(statistics[name], np.float64) for name in ("mean", "std"))
    kernel, bias = (np.asarray(layer[name], np.float64) for name in ("kernel", "bias"))
    folded = {
        "kernel": kernel / std[:, None],
        "bias": bias - ((mean / std) @ kernel).reshape(-1, len(bias)).sum(0),  # an unpadded kernel sees every mean
    }
    return {name: jnp.asarray(value, layer["kernel"].dtype) for name, value in folded.items()}


def unfold_from(layer: dict[str, Any], statistics: dict[str, Any]) -> dict[str, Any]:
    """Return the layer that ``fold_into`` with these statistics would turn into ``layer``."""
    mean, std = (np.asarray(statistics[name], np.float64) for name in ("mean", "std"))
    kernel, bias = (np.asarray(layer[name], np.float64) for name in ("kernel", "bias"))
    unfolded = {"kernel": kernel * std[:, None], "bias": bias + (mean @ kernel).reshape(-1, len(bias)).sum(0)}
    return {name: jnp.asarray(value, layer["kernel"].dtype) for name, value in unfolded.items()}
