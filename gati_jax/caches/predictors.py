"""Predictors: from one site's activation to class logits (GATI's exploration phase; details as in its released code).

Each is a Linen module whose variables never change in ``apply``, so ``init`` and ``apply`` are pure functions, and a
frozen dataclass, so equal configurations share compiled programs. ``init`` needs real activations: ``Standardize``
takes its means and scales from them. The paper's three predictors read the *flattened* activation. The pooling and
convolutional ones read the picture, and reach the same accuracy with three to four orders of magnitude fewer
parameters.

Sites have any shape, their last axis the features: pictures [height, width, channels], sequences [time, channels],
tokens [tokens, features], vectors. Pooling is over all axes but the last.
"""

from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from pydantic import Field

from gati_jax.errors import InputError
from gati_jax.models.convolution import patches

from .candidate import Activation, Cascaded, Logits, Width

Channels = Float[np.ndarray, " features"]
Features = Float[Array, "batch features"]
Positions = Float[Array, "batch *positions features"]
_Side = Annotated[int, Field(ge=1, le=16)]  # of a two-dimensional kernel


def flatten_channels_first(x: Activation) -> Features:
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
    index, weight = bins_of(n, size)
    bins = jnp.take(x, index, axis)
    return (
        bins * jnp.asarray(weight, x.dtype).reshape(*weight.shape, *(1,) * (x.ndim - axis - 1))[(None,) * axis]
    ).sum(axis + 1)


def bins_of(n: int, size: int) -> tuple[Int[np.ndarray, "size width"], Float[np.ndarray, "size width"]]:
    """Return which of n values each bin of ``adaptive_average`` is the mean of, and their weights in it."""
    i = np.arange(size)
    start, stop = i * n // size, -((i + 1) * -n // size)
    index = start[:, None] + np.arange((stop - start).max())
    return np.minimum(index, n - 1), (index < stop[:, None]) / (stop - start)[:, None]


def grid_average(x: Activation, cells: int) -> Features:
    """Average over a grid of ``cells`` x ``cells`` fields and flatten; an axis shorter than ``cells`` is kept."""
    return _grid(x, cells).reshape(x.shape[0], -1)


def _grid(x: Activation, cells: int) -> Float[Array, "batch *cells"]:
    for axis in range(1, x.ndim - 1):
        x = adaptive_average(x, min(cells, x.shape[axis]), axis)
    return x


class Standardize(nn.Module):
    """Subtract every feature's mean and divide by its standard deviation, both taken from the batch given to ``init``.

    They are constants (the collection "statistics", not "params"), and ``fold_standardize`` removes them after a fit.
    The function class stays the same, but activations behind a ReLU have means far from zero and scales far apart,
    which slows down a fit of a few epochs. Features are the last axis; a picture's positions are pooled.
    """

    @nn.compact
    def __call__(self, x: Positions) -> Positions:
        """Return standardised features."""
        axes = tuple(range(x.ndim - 1))
        mean = self.variable("statistics", "mean", lambda: x.mean(axes))
        std = self.variable("statistics", "std", lambda: _standard_deviation(x))
        shape = (*(1,) * (x.ndim - 1), -1)
        return (x - mean.value.reshape(shape)) / std.value.reshape(shape)


def _standard_deviation(x: Positions) -> Float[Array, " features"]:
    """Return every feature's, with a floor that keeps features that hardly vary in this batch from being blown up."""
    variance = x.var(tuple(range(x.ndim - 1)))
    floor = 0.01 * variance.mean()
    return jnp.where(floor > 0, jnp.sqrt(variance + floor), 1.0)


def _mlp(x: Features, hidden: int, classes: int, *, standardize: bool) -> Logits:
    """Run Linear, ReLU, Linear on (standardised) features, inside the calling module."""
    x = Standardize(name="standardize")(x) if standardize else x
    x = nn.Dense(hidden, name="hidden")(x)
    return nn.Dense(classes, name="out")(nn.relu(x))


class FullyConnected(nn.Module):
    """The paper's FC(h): flatten, Linear(d, h), ReLU, Linear(h, classes)."""

    classes: int
    hidden: Width = 1024
    standardize: bool = True

    @nn.compact
    def __call__(self, activation: Activation) -> Logits:
        """Return class logits."""
        return _mlp(flatten_channels_first(activation), self.hidden, self.classes, standardize=self.standardize)


class Pool(nn.Module):
    """The paper's Pool(p): average-pool the flattened vector to ``size``, Linear(p, 1024), ReLU, Linear(1024, classes).

    An activation of fewer than ``size`` values is not pooled.
    """

    classes: int
    size: Width = 4096
    hidden: Width = 1024
    standardize: bool = True

    @nn.compact
    def __call__(self, activation: Activation) -> Logits:
        """Return class logits."""
        x = flatten_channels_first(activation)
        x = adaptive_average(x, min(self.size, x.shape[1]), axis=1)
        return _mlp(x, self.hidden, self.classes, standardize=self.standardize)


class Conv(nn.Module):
    """The paper's Conv(k, s): a one-channel 1-D convolution over the flattened vector, ReLU, Linear(., classes)."""

    classes: int
    kernel: Width = 3
    stride: Width = 1

    @nn.compact
    def __call__(self, activation: Activation) -> Logits:
        """Return class logits."""
        x = flatten_channels_first(activation)[..., None]
        if x.shape[1] < self.kernel:
            raise InputError(f"kernel: expected at most the {x.shape[1]} values of the activation, got {self.kernel}")
        x = nn.Conv(1, (self.kernel,), (self.stride,), padding="VALID", name="conv")(x)
        return nn.Dense(self.classes, name="out")(nn.relu(x[..., 0]))


class GlobalAverage(nn.Module):
    """Mean over all positions (global average pooling), then an MLP."""

    classes: int
    hidden: Width = 128
    standardize: bool = True

    @nn.compact
    def __call__(self, activation: Activation) -> Logits:
        """Return class logits."""
        x = activation.mean(tuple(range(1, activation.ndim - 1)))
        return _mlp(x, self.hidden, self.classes, standardize=self.standardize)


class ClassToken(nn.Module):
    """The first token of [tokens, features], then an MLP: for transformers that answer by a class token."""

    classes: int
    hidden: Width = 128
    standardize: bool = True

    @nn.compact
    def __call__(self, activation: Activation) -> Logits:
        """Return class logits."""
        if activation.ndim != 3:  # noqa: PLR2004
            raise InputError(f"token: expected a site of [tokens, features], got {list(activation.shape[1:])}")
        return _mlp(activation[:, 0], self.hidden, self.classes, standardize=self.standardize)


class Grid(nn.Module):
    """Means over a grid of ``cells`` x ``cells`` fields, then an MLP."""

    classes: int
    cells: Width = 4
    hidden: Width = 128
    standardize: bool = True

    @nn.compact
    def __call__(self, activation: Activation) -> Logits:
        """Return class logits."""
        x = grid_average(activation, self.cells)
        return _mlp(x, self.hidden, self.classes, standardize=self.standardize)


class _Convolution(nn.Module):
    """An unpadded convolution as one matrix product over patches: XLA's CPU compiler is slow at kernels' gradients.

    Standardisation could not be folded into a padded one.
    """

    features: int
    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width inputs"]) -> Float[Array, "batch rows columns features"]:
        size = min(self.kernel, x.shape[1]), min(self.kernel, x.shape[2])
        rows, columns = ((n - k) // self.stride + 1 for n, k in zip(x.shape[1:3], size, strict=True))
        kernel = self.param("kernel", nn.initializers.he_normal(), (*size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        flat = jnp.concatenate(patches(x, size, (rows, columns), self.stride), axis=-1)
        return flat @ kernel.reshape(-1, self.features) + bias.reshape(1, 1, 1, -1)


class Convolutional(nn.Module):
    """Convolutions with ReLUs, means over a grid of ``cells`` x ``cells`` fields, then an MLP.

    With ``kernel=1, stride=1`` it is a bottleneck: channels are mixed and rectified at every position before the mean
    is taken over positions, which a pooling head cannot do. With ``kernel=3, stride=2`` it sees shapes as well, at a
    tenth of a residual block's multiplications. A kernel larger than the picture shrinks to it. A sequence of
    [time, channels] is a picture of one column.
    """

    classes: int
    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)] = (32,)
    kernel: _Side = 3
    stride: _Side = 2
    cells: Width = 2
    hidden: Width = 128
    standardize: bool = True

    @nn.compact
    def __call__(self, activation: Activation) -> Logits:
        """Return class logits."""
        x = activation[:, :, None] if activation.ndim == 3 else activation  # noqa: PLR2004
        if x.ndim != 4:  # noqa: PLR2004
            expected = "a site of [height, width, channels] or [time, channels]"
            raise InputError(f"conv2d: expected {expected}, got {list(activation.shape[1:])}")
        x = Standardize(name="standardize")(x) if self.standardize else x
        for i, features in enumerate(self.channels):
            x = nn.relu(_Convolution(features, self.kernel, self.stride, name=f"conv_{i}")(x))
        x = grid_average(x, self.cells)
        return _mlp(x, self.hidden, self.classes, standardize=False)


class Summary(NamedTuple):
    """All that some predictors read of an activation: they give the same logits for its summary, up to rounding."""

    kind: Literal["whole", "grid", "line", "token"]
    size: int = 0
    """Cells per side of a grid of means, or bins of the flattened activation."""

    def __call__(self, activation: Activation) -> Float[Array, "batch *summary"]:
        """Return the summary of an activation[batch, ...]."""
        if self.kind == "grid":
            return _grid(activation, self.size)
        if self.kind == "line":
            x = flatten_channels_first(activation)
            return adaptive_average(x, min(self.size, x.shape[1]), axis=1)
        return activation[:, :1] if self.kind == "token" else activation


def summary_for(predictor: nn.Module) -> Summary:
    """Return the smallest summary that is enough for a predictor."""
    match predictor:
        case Cascaded():
            return summary_for(predictor.inner)
        case Grid():
            return Summary("grid", predictor.cells)
        case GlobalAverage():
            return Summary("grid", 1)
        case Pool():
            return Summary("line", predictor.size)
        case ClassToken():
            return Summary("token")
    return Summary("whole")


_STANDARDIZING = FullyConnected | Pool | GlobalAverage | ClassToken | Grid | Convolutional


def fold_standardize(predictor: nn.Module, variables: Any) -> tuple[nn.Module, Any]:  # noqa: ANN401 (pytrees)
    """Fold ``Standardize`` into the layer behind it, as batch norm is folded: a lookup then does one operation less.

    Returns:
        The predictor without ``Standardize`` and its variables; both unchanged where there is nothing to fold.
    """
    if isinstance(predictor, Cascaded):
        inside = {name: tree["inner"] for name, tree in variables.items() if "inner" in tree}
        inner, folded = fold_standardize(predictor.inner, inside)
        return predictor.clone(inner=inner), {"params": {**variables["params"], "inner": folded["params"]}}
    if not isinstance(predictor, _STANDARDIZING) or not predictor.standardize:
        return predictor, variables
    mean, std = _statistics(variables)
    return predictor.clone(standardize=False), {"params": _rescaled(predictor, variables, 1 / std, -mean / std)}


def unfold_standardize(predictor: nn.Module, variables: Any, activation: Activation) -> tuple[nn.Module, Any]:  # noqa: ANN401
    """Put ``Standardize`` back in front of a folded predictor, so that its fit can continue: the function is the same.

    Means and scales are taken from the activation.

    Returns:
        The predictor and its variables; both unchanged where it is not a folded one.
    """
    if not isinstance(predictor, _STANDARDIZING) or predictor.standardize:
        return predictor, variables
    standardized = predictor.clone(standardize=True)
    statistics = {"statistics": dict(standardized.init(jax.random.key(0), activation)["statistics"])}
    mean, std = _statistics(statistics)
    return standardized, {"params": _rescaled(predictor, variables, std, mean), **statistics}


def _statistics(variables: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return means and standard deviations, float64[features]."""
    statistics = variables["statistics"]["standardize"]
    return np.asarray(statistics["mean"], np.float64), np.asarray(statistics["std"], np.float64)


def _rescaled(predictor: nn.Module, variables: dict[str, Any], scale: Channels, shift: Channels) -> dict[str, Any]:
    """Return the params whose first layer computes of x what it now computes of ``x * scale + shift``.

    ``(x * scale + shift) @ w + b = x @ (scale * w) + (b + shift @ w)``; an unpadded kernel adds the shift at every tap.
    """
    name = "conv_0" if isinstance(predictor, Convolutional) else "hidden"
    layer = variables["params"][name]
    kernel, bias = (np.asarray(layer[leaf], np.float64) for leaf in ("kernel", "bias"))
    moved = {"kernel": kernel * scale[:, None], "bias": bias + (shift @ kernel).reshape(-1, len(bias)).sum(0)}
    dtype = layer["kernel"].dtype
    return {**variables["params"], name: {leaf: jnp.asarray(value, dtype) for leaf, value in moved.items()}}
