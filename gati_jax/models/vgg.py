"""VGG with batch norm (Simonyan and Zisserman, arXiv:1409.1556) for small images: a block is one convolution.

What follows the last pooling is the classifier of the CIFAR versions, one linear layer; ImageNet's three are not built.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import flax.linen as nn
from jaxtyping import Array, Float
from pydantic import Field

from gati_jax.errors import InputError

from .convolution import Algorithm, Layer
from .modules import Classifier, ConvNorm, Norm, Size


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class VGG:
    """The configuration of a VGG with batch norm.

    The bounds matter where a manifest, which is untrusted, becomes a network.
    """

    convolutions: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=8)]
    """How many each stage has; height and width halve behind each stage."""
    channels: Annotated[tuple[Size, ...], Field(min_length=1, max_length=8)]
    """How many each stage's convolutions have."""
    classes: Annotated[int, Field(ge=2, le=100_000)] = 10
    input_shape: tuple[Size, Size, Size] = (32, 32, 3)
    """Height, width, channels."""

    def __post_init__(self) -> None:
        """Refuse stages without channels, and images that would be pooled to nothing."""
        if len(self.convolutions) != len(self.channels):
            raise InputError(
                f"channels: expected one for each of {len(self.convolutions)} stages, got {len(self.channels)}"
            )
        least = 2 ** len(self.convolutions)
        if min(self.input_shape[:2]) < least:
            raise InputError(
                f"input_shape: expected at least {least} rows and columns to halve, got {self.input_shape}"
            )

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return sum(self.convolutions)

    @property
    def shapes(self) -> tuple[tuple[int, bool], ...]:
        """Channels of every block, and whether it pools."""
        return tuple(
            (channels, k == count - 1)
            for count, channels in zip(self.convolutions, self.channels, strict=True)
            for k in range(count)
        )

    def modules(self, norm: Norm, algorithms: Sequence[tuple[Algorithm, ...]] = ()) -> tuple[nn.Module, ...]:
        """Return the modules of blocks 1 .. N and the classifier.

        Args:
            norm: See ``Norm``.
            algorithms: For each block the algorithm of its convolution; the compiler's own if empty.
        """
        direct: tuple[Algorithm, ...] = ("direct",)
        chosen = algorithms or [direct] * self.depth
        blocks = [
            ConvolutionBlock(channels, pool, norm, algorithm)
            for (channels, pool), (algorithm,) in zip(self.shapes, chosen, strict=True)
        ]
        return (*blocks, Classifier(self.classes))

    def layers(self) -> tuple[tuple[Layer, ...], ...]:
        """Return the convolution of every block."""
        height, width, inputs = self.input_shape
        blocks = []
        for outputs, pool in self.shapes:
            blocks.append((Layer(3, 1, inputs, outputs, height, width, ("conv",)),))
            inputs, height, width = outputs, height // (1 + pool), width // (1 + pool)
        return tuple(blocks)


_CONVOLUTIONS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
VGGS = tuple(_CONVOLUTIONS)


def vgg(name: str, *, classes: int = 10, input_shape: tuple[int, int, int] = (32, 32, 3)) -> VGG:
    """Return a published configuration.

    Args:
        name: "vgg11", 13, 16 or 19, with batch norm.
        classes: Number of classes.
        input_shape: Height, width and channels; 32 pixels or more.

    Raises:
        InputError: The name is not known, or the images are too small.

    Example:
        >>> vgg("vgg16").shapes[1]
        (64, True)
    """
    if name not in _CONVOLUTIONS:
        raise InputError(f"name: expected one of {', '.join(VGGS)}, got {name!r}")
    return VGG(
        convolutions=_CONVOLUTIONS[name],
        channels=(64, 128, 256, 512, 512),
        classes=classes,
        input_shape=input_shape,
    )
