"""A predictor that looks at the picture with small convolutions of its own."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from gati_jax._errors import InputError

from .predictors import grid_average
from .standardize import Standardize


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
            msg = f"conv2d: expected a site of [height, width, channels], got {list(activation.shape[1:])}"
            raise InputError(msg)
        x = Standardize(name="standardize")(activation) if self.standardize else activation
        for i, features in enumerate(self.channels):
            x = nn.relu(_Convolution(features, self.kernel, self.stride, name=f"conv_{i}")(x))
        x = grid_average(x, self.cells)
        x = nn.relu(nn.Dense(self.hidden, name="hidden")(x))
        return nn.Dense(self.classes, name="out")(x)
