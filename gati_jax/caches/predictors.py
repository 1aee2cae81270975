"""Predictors: one site's activation to class logits (GATI's exploration phase; facts in the paper's released code).

Each is a Linen module whose variables never change in ``apply``, so ``init`` and ``apply`` are pure functions, and a
frozen dataclass, so equal configurations share compiled programs. ``init`` wants real activations: ``Standardize``.
The paper's three look at the *flattened* activation; the two pooling heads look at the picture and reach as far with
three to four orders of magnitude fewer parameters.
"""

from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gati_jax.errors import InputError

from .candidate import Cascaded
from .standardize import Standardize, fold_into, unfold_from


@runtime_checkable
class Predictor(Protocol):
    """What the rest of the library asks of a predictor: a Linen module that knows its number of classes."""

    classes: int

    def __call__(self, activation: Float[Array, "batch *site"]) -> Float[Array, "batch classes"]:
        """Return class logits."""
        ...


def flatten_channels_first(x: Float[Array, "batch *site"]) -> Float[Array, "batch features"]:
    """Flatten as PyTorch would: neighbours in the vector are neighbours in a row of one channel's map."""
    return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)


def adaptive_average(x: Float[Array, "..."], size: int, axis: int) -> Float[Array, "..."]:
    """Average-pool one axis to ``size`` bins, as PyTorch does: bin i is floor(i n / size) .. ceil((i + 1) n / size).

    Example:
        >>> adaptive_average(jnp.arange(5.0), 2, axis=0).tolist()
        [1.0, 3.0]
    """
    n, axis = x.shape[axis], axis % x.ndim
    if n % size == 0:
        return x.reshape(*x.shape[:axis], size, n // size, *x.shape[axis + 1 :]).mean(axis + 1)
    i = np.arange(size)
    start, stop = i * n // size, -((i + 1) * -n // size)
    index = start[:, None] + np.arange((stop - start).max())
    weight = (index < stop[:, None]) / (stop - start)[:, None]
    bins = jnp.take(x, np.minimum(index, n - 1), axis)
    return (
        bins * jnp.asarray(weight, x.dtype).reshape(*weight.shape, *(1,) * (x.ndim - axis - 1))[(None,) * axis]
    ).sum(axis + 1)


def grid_average(x: Float[Array, "batch *site"], cells: int) -> Float[Array, "batch features"]:
    """Average over a grid of ``cells`` x ``cells`` fields, and flatten; smaller dimensions stay as they are."""
    for axis in range(1, x.ndim - 1):
        x = adaptive_average(x, min(cells, x.shape[axis]), axis)
    return x.reshape(x.shape[0], -1)


def _mlp(
    x: Float[Array, "batch features"], hidden: int, classes: int, *, standardize: bool
) -> Float[Array, "batch classes"]:
    """Run Linear, ReLU, Linear on (standardised) features, inside the calling module."""
    x = Standardize(name="standardize")(x) if standardize else x
    x = nn.Dense(hidden, name="hidden")(x)
    return nn.Dense(classes, name="out")(nn.relu(x))


class FullyConnected(nn.Module):
    """The paper's FC(h): flatten, Linear(d, h), ReLU, Linear(h, classes)."""

    classes: int
    hidden: int = 1024
    standardize: bool = True

    @nn.compact
    def __call__(self, activation: Float[Array, "batch *site"]) -> Float[Array, "batch classes"]:
        """Return class logits."""
        return _mlp(flatten_channels_first(activation), self.hidden, self.classes, standardize=self.standardize)


class Pool(nn.Module):
    """The paper's Pool(p): average-pool the flattened vector to ``size``, Linear(p, 1024), ReLU, Linear(1024, classes).

    An activation of fewer than ``size`` values is taken as it is.
    """

    classes: int
    size: int = 4096
    hidden: int = 1024
    standardize: bool = True

    @nn.compact
    def __call__(self, activation: Float[Array, "batch *site"]) -> Float[Array, "batch classes"]:
        """Return class logits."""
        x = flatten_channels_first(activation)
        return _mlp(
            adaptive_average(x, min(self.size, x.shape[1]), axis=1),
            self.hidden,
            self.classes,
            standardize=self.standardize,
        )


class Conv(nn.Module):
    """The paper's Conv(k, s): a one-channel 1-D convolution over the flattened vector, ReLU, Linear(., classes)."""

    classes: int
    kernel: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, activation: Float[Array, "batch *site"]) -> Float[Array, "batch classes"]:
        """Return class logits."""
        x = flatten_channels_first(activation)[..., None]
        if x.shape[1] < self.kernel:
            raise InputError(f"kernel: expected at most the {x.shape[1]} values of the activation, got {self.kernel}")
        x = nn.Conv(1, (self.kernel,), (self.stride,), padding="VALID", name="conv")(x)
        return nn.Dense(self.classes, name="out")(nn.relu(x[..., 0]))


class GlobalAverage(nn.Module):
    """Mean over all positions, then an MLP."""

    classes: int
    hidden: int = 128
    standardize: bool = True

    @nn.compact
    def __call__(self, activation: Float[Array, "batch *site"]) -> Float[Array, "batch classes"]:
        """Return class logits."""
        return _mlp(
            activation.mean(tuple(range(1, activation.ndim - 1))),
            self.hidden,
            self.classes,
            standardize=self.standardize,
        )


class Grid(nn.Module):
    """Means over a grid of ``cells`` x ``cells`` fields, then an MLP; smaller dimensions stay as they are."""

    classes: int
    cells: int = 4
    hidden: int = 128
    standardize: bool = True

    @nn.compact
    def __call__(self, activation: Float[Array, "batch *site"]) -> Float[Array, "batch classes"]:
        """Return class logits."""
        x = grid_average(activation, self.cells)
        return _mlp(x, self.hidden, self.classes, standardize=self.standardize)


class _Convolution(nn.Module):
    """An unpadded convolution as one matrix product over patches: XLA's CPU compiler is slow at kernels' gradients.

    Unpadded, so that standardisation can be folded into it.
    """

    features: int
    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width inputs"]) -> Float[Array, "batch rows columns features"]:
        size = [min(self.kernel, n) for n in x.shape[1:3]]
        rows, columns = (range(0, n - k + 1, self.stride) for n, k in zip(x.shape[1:3], size, strict=True))
        kernel = self.param("kernel", nn.initializers.he_normal(), (*size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        patches = [
            x[:, i : i + rows[-1] + 1 : self.stride, j : j + columns[-1] + 1 : self.stride]
            for i in range(size[0])
            for j in range(size[1])
        ]
        return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, self.features) + bias.reshape(1, 1, 1, -1)


class Convolutional(nn.Module):
    """Convolutions with ReLUs, means over a grid of ``cells`` x ``cells`` fields, then an MLP.

    With ``kernel=1, stride=1`` it is a bottleneck: channels are mixed and rectified at every position before the mean
    is taken over positions, which a pooling head cannot do. With ``kernel=3, stride=2`` it sees shapes as well, at a
    tenth of a residual block's multiplications. Where a picture is smaller than the kernel, the kernel shrinks to it.
    """

    classes: int
    channels: tuple[int, ...] = (32,)
    kernel: int = 3
    stride: int = 2
    cells: int = 2
    hidden: int = 128
    standardize: bool = True

    @nn.compact
    def __call__(self, activation: Float[Array, "batch *site"]) -> Float[Array, "batch classes"]:
        """Return class logits."""
        if activation.ndim != 4:  # noqa: PLR2004
            raise InputError(f"conv2d: expected a site of [height, width, channels], got {list(activation.shape[1:])}")
        x = Standardize(name="standardize")(activation) if self.standardize else activation
        for i, features in enumerate(self.channels):
            x = nn.relu(_Convolution(features, self.kernel, self.stride, name=f"conv_{i}")(x))
        x = grid_average(x, self.cells)
        x = nn.relu(nn.Dense(self.hidden, name="hidden")(x))
        return nn.Dense(self.classes, name="out")(x)


_KINDS = FullyConnected | Pool | GlobalAverage | Grid | Convolutional


def fold_standardize(predictor: nn.Module, variables: Any) -> tuple[nn.Module, Any]:  # noqa: ANN401 (pytrees)
    """Fold ``Standardize`` into the layer behind it.

    Returns:
        The predictor without it and its variables; both as they are where there is nothing to fold.
    """
    if isinstance(predictor, Cascaded):
        inside = {name: tree["inner"] for name, tree in variables.items() if "inner" in tree}
        inner, folded = fold_standardize(predictor.inner, inside)
        return predictor.clone(inner=inner), {"params": {**variables["params"], "inner": folded["params"]}}
    behind = _layer_behind(predictor)
    if behind is None:
        return predictor, variables
    params = variables["params"]
    layer = fold_into(params[behind], variables["statistics"]["standardize"])
    return predictor.clone(standardize=False), {"params": {**params, behind: layer}}


def unfold_standardize(
    predictor: nn.Module,
    variables: Any,  # noqa: ANN401 (a pytree)
    activation: Float[Array, "batch *site"],
) -> tuple[nn.Module, Any]:
    """Give a folded predictor standardised features again: the same function, of which a fit may go on.

    Args:
        predictor: As ``fold_standardize`` returns it.
        variables: Its own.
        activation: What the means and scales are read off.

    Returns:
        The predictor and its variables; both as they are where it never had standardised features.
    """
    if not isinstance(predictor, _KINDS) or predictor.standardize:
        return predictor, variables
    standardized = predictor.clone(standardize=True)
    statistics: dict[str, Any] = dict(standardized.init(jax.random.key(0), activation)["statistics"])
    behind, params = _first_layer(standardized), variables["params"]
    layer = unfold_from(params[behind], dict(statistics["standardize"]))
    return standardized, {"params": {**params, behind: layer}, "statistics": statistics}


def _layer_behind(predictor: nn.Module) -> str | None:
    """Return the name of the layer behind ``Standardize``, if there is one."""
    return _first_layer(predictor) if isinstance(predictor, _KINDS) and predictor.standardize else None


def _first_layer(predictor: nn.Module) -> str:
    return "conv_0" if isinstance(predictor, Convolutional) else "hidden"
