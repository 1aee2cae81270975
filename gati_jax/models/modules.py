"""The parts of convolutional networks as Flax Linen modules, whose ``init`` and ``apply`` are pure functions.

Every convolution pads explicitly, kernel // 2 on each side as PyTorch does: at stride 2 JAX's "SAME" pads differently.
A convolution and its batch norm compute in the dtype of their input (statistics in float32), the classifier in float32:
parameters may stay float32 while the rest is bfloat16.
"""

from typing import Annotated, Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from .convolution import Algorithm, convolution_of, convolve, stored_shape

Norm = Literal["batch", "running", "folded"]
"""Batch norm by the batch's statistics (training), by running ones, or folded into the convolution (inference)."""

Size = Annotated[int, Field(ge=1, le=4096)]
EPSILON = 1e-5  # batch norm's, in PyTorch and here

_POOL_PADDING: Any = ((1, 1), (1, 1))  # Linen takes it, its annotation does not
_HE = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class Convolution(nn.Module):
    """A biased convolution by any algorithm; its kernel is stored in the form that the algorithm takes."""

    features: int
    kernel: int
    stride: int
    algorithm: Algorithm

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w features"]:
        """Convolve and add the bias."""
        shape = stored_shape((self.kernel, self.kernel, x.shape[-1], self.features), self.algorithm)
        kernel = self.param("kernel", nn.initializers.zeros, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = convolve(x, jnp.asarray(kernel, x.dtype), self.algorithm, self.kernel, self.stride)
        return y + jnp.asarray(bias, x.dtype).reshape(1, 1, 1, -1)


class ConvNorm(nn.Module):
    """Convolution and batch norm (He et al., arXiv:1512.03385); one biased convolution once folded."""

    features: int
    kernel: int = 3
    stride: int = 1
    norm: Norm = "folded"
    algorithm: Algorithm = "direct"  # of the folded convolution

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w features"]:
        """Convolve and normalise; no activation function."""
        if self.norm == "folded":
            return Convolution(self.features, self.kernel, self.stride, self.algorithm, name="conv")(x)
        pad = (self.kernel // 2, self.kernel // 2)
        size, strides = (self.kernel, self.kernel), (self.stride, self.stride)
        options: dict[str, Any] = {"padding": (pad, pad), "use_bias": False, "kernel_init": _HE, "dtype": x.dtype}
        if self.norm == "batch":
            options["conv_general_dilated"] = convolution_of(self.stride)
        x = nn.Conv(self.features, size, strides, **options, name="conv")(x)
        running = self.norm == "running"
        return nn.BatchNorm(running, momentum=0.9, epsilon=EPSILON, dtype=x.dtype, name="norm")(x)


class Shortcut(nn.Module):
    """The shortcut of a residual block: its input, brought to the output's shape where the two differ.

    Option A subsamples and pads with zero channels (no parameters), B projects with a 1x1 convolution.
    """

    features: int
    stride: int
    option: Literal["A", "B"]
    norm: Norm
    algorithm: Algorithm = "direct"

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w features"]:
        """Return the shortcut's term of the sum."""
        missing = self.features - x.shape[-1]
        if self.stride == 1 and missing == 0:
            return x
        if self.option == "B":
            return ConvNorm(self.features, 1, self.stride, self.norm, self.algorithm, name="projection")(x)
        before = missing // 2
        return jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (before, missing - before)))


def residual_layers(width: int, stride: int, bottleneck: bool) -> tuple[tuple[int, int, int], ...]:  # noqa: FBT001
    """Return channels, kernel and stride of a residual block's convolutions, without the shortcut's."""
    # The stride sits on the 3x3 convolution, as in torchvision ("ResNet v1.5").
    return ((width, 1, 1), (width, 3, stride), (4 * width, 1, 1)) if bottleneck else ((width, 3, stride), (width, 3, 1))


class ResidualBlock(nn.Module):
    """A basic block (two 3x3 convolutions) or a bottleneck (1x1, 3x3, 1x1 with four times the channels)."""

    features: int
    stride: int
    bottleneck: bool
    shortcut: Literal["A", "B"]
    norm: Norm
    algorithms: tuple[Algorithm, ...] = ()
    """Of its convolutions in order, the projection's last; "direct" where none is given."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w out"]:
        """Run the block."""
        algorithms: tuple[Algorithm, ...] = (*self.algorithms, "direct", "direct", "direct", "direct")
        layers = residual_layers(self.features, self.stride, self.bottleneck)
        y = x
        for i, (features, kernel, step) in enumerate(layers, 1):
            y = y if i == 1 else nn.relu(y)
            y = ConvNorm(features, kernel, step, self.norm, algorithms[i - 1], name=f"conv{i}")(y)
        outputs, algorithm = layers[-1][0], algorithms[len(layers)]
        shortcut = Shortcut(outputs, self.stride, self.shortcut, self.norm, algorithm, name="shortcut")
        return nn.relu(y + shortcut(x))


class Stem(nn.Module):
    """From pixels to the first stage: a 3x3 convolution, or ImageNet's 7x7 with stride 2 and a max-pool."""

    features: int
    kernel: Literal[3, 7]
    norm: Norm
    algorithm: Algorithm = "direct"

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w features"]:
        """Run the stem."""
        small = self.kernel == 3  # noqa: PLR2004
        x = nn.relu(ConvNorm(self.features, self.kernel, 1 if small else 2, self.norm, self.algorithm, name="conv")(x))
        return x if small else nn.max_pool(x, (3, 3), (2, 2), _POOL_PADDING)


class FirstBlock(nn.Module):
    """The stem with the first residual block: nothing worth a cache lies between them."""

    stem: Stem
    block: ResidualBlock

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w features"]:
        """Run stem and block."""
        return self.block(self.stem(x))


class ConvolutionBlock(nn.Module):
    """A 3x3 convolution with batch norm and ReLU; the last of its stage halves height and width by max-pooling."""

    features: int
    pool: bool
    norm: Norm
    algorithm: Algorithm = "direct"

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w features"]:
        """Run the block."""
        x = nn.relu(ConvNorm(self.features, norm=self.norm, algorithm=self.algorithm, name="conv")(x))
        return nn.max_pool(x, (2, 2), (2, 2)) if self.pool else x


class Classifier(nn.Module):
    """Global average pooling and a linear layer."""

    classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        """Return logits."""
        return nn.Dense(self.classes, name="fc")(x.mean((1, 2), jnp.float32))
