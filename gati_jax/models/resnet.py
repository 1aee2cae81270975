"""Residual networks: CIFAR ResNet-20 .. 110 and ResNet-18 .. 152 with the 32x32 or the 224x224 stem."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from flax import linen as nn
from pydantic import Field

from gati_jax.errors import InputError

from .convolution import Algorithm, Layer
from .modules import Classifier, FirstBlock, Norm, ResidualBlock, Size, Stem


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet:
    """The configuration of a residual network (He et al., arXiv:1512.03385).

    The bounds matter where a manifest, which is untrusted, becomes a network.
    """

    stages: Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=8)]
    """Residual blocks in each stage; each stage but the first halves height and width."""
    widths: Annotated[tuple[Size, ...], Field(min_length=1, max_length=8)]
    """Channels in each stage (a bottleneck's output has four times as many)."""
    bottleneck: bool = False
    stem: Literal[3, 7] = 3
    shortcut: Literal["A", "B"] = "B"
    classes: Annotated[int, Field(ge=2, le=100_000)] = 10
    input_shape: tuple[Size, Size, Size] = (32, 32, 3)
    """Height, width, channels."""

    def __post_init__(self) -> None:
        """Refuse stages without widths, and a shortcut that cannot reach the bottleneck's width."""
        if len(self.stages) != len(self.widths):
            raise InputError(f"widths: expected one for each of {len(self.stages)} stages, got {len(self.widths)}")
        if self.shortcut == "A" and sorted(self.widths) != list(self.widths):
            raise InputError(f"widths: expected rising ones, for shortcut A can only add channels, got {self.widths}")

    def modules(self, norm: Norm, algorithms: Sequence[tuple[Algorithm, ...]] = ()) -> tuple[nn.Module, ...]:
        """Return the modules of blocks 1 .. N and the classifier.

        Args:
            norm: See ``Norm``.
            algorithms: For each block those of its convolutions, in the order of ``layers``; the compiler's own if
                empty.
        """
        chosen = list(algorithms) or [()] * self.depth
        stem_algorithm = chosen[0][0] if chosen[0] else "direct"
        chosen[0] = chosen[0][1:]
        blocks = [
            ResidualBlock(width, stride, self.bottleneck, self.shortcut, norm, choice)
            for (width, stride), choice in zip(self.shapes, chosen, strict=True)
        ]
        stem = Stem(self.widths[0], self.stem, norm, stem_algorithm)
        return (FirstBlock(stem, blocks[0]), *blocks[1:], Classifier(self.classes))

    def layers(self) -> tuple[tuple[Layer, ...], ...]:
        """Return the convolutions of every block: the first one's stem, conv1, conv2, (conv3), the projection."""
        height, width, channels = self.input_shape
        small, inputs = self.stem == 3, self.widths[0]  # noqa: PLR2004
        stem = Layer(self.stem, 1 if small else 2, channels, inputs, height, width, ("stem", "conv"))
        if not small:  # the convolution halves, and so does the max-pool
            height, width = (_halved(_halved(size)) for size in (height, width))
        blocks: list[tuple[Layer, ...]] = []
        for features, stride in self.shapes:
            outputs = 4 * features if self.bottleneck else features
            before, after = (height, width), (height, width) if stride == 1 else (_halved(height), _halved(width))
            if self.bottleneck:
                block = (
                    Layer(1, 1, inputs, features, *before, ("conv1",)),
                    Layer(3, stride, features, features, *before, ("conv2",)),
                    Layer(1, 1, features, outputs, *after, ("conv3",)),
                )
            else:
                block = (
                    Layer(3, stride, inputs, features, *before, ("conv1",)),
                    Layer(3, 1, features, features, *after, ("conv2",)),
                )
            if self.shortcut == "B" and (stride > 1 or inputs != outputs):
                block += (Layer(1, stride, inputs, outputs, *before, ("shortcut", "projection")),)
            blocks.append(block)
            inputs, (height, width) = outputs, after
        first = (stem, *(layer._replace(path=("block", *layer.path)) for layer in blocks[0]))
        return (first, *blocks[1:])

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return sum(self.stages)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Width and stride of every residual block."""
        return tuple(
            (width, 2 if stage > 0 and k == 0 else 1)
            for stage, (count, width) in enumerate(zip(self.stages, self.widths, strict=True))
            for k in range(count)
        )


def _halved(size: int) -> int:
    return (size + 1) // 2


_CIFAR = {f"resnet{6 * n + 2}": (n, n, n) for n in (3, 5, 7, 9, 18)}
_IMAGENET = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
RESNETS = (*_CIFAR, *_IMAGENET)


def resnet(
    name: str,
    *,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    shortcut: Literal["A", "B"] | None = None,
) -> ResNet:
    """Return a published configuration.

    Args:
        name: "resnet20", 32, 44, 56, 110 (He et al., section 4.2: three stages, by default shortcut A) or "resnet18",
            34, 50, 101, 152 (four stages, by default shortcut B).
        classes: Number of classes.
        input_shape: Height, width and channels. From 64 pixels on, the four-stage networks take the 7x7 stem.
        shortcut: Option A or B where a block changes the shape, see ``Shortcut``.

    Raises:
        InputError: The name is not known.

    Example:
        >>> sum(resnet("resnet56").stages)
        27
    """
    if name in _CIFAR:
        return ResNet(
            stages=_CIFAR[name], widths=(16, 32, 64), shortcut=shortcut or "A", classes=classes, input_shape=input_shape
        )
    if name in _IMAGENET:
        return ResNet(
            stages=_IMAGENET[name],
            widths=(64, 128, 256, 512),
            bottleneck=int(name.removeprefix("resnet")) >= 50,  # noqa: PLR2004
            stem=7 if input_shape[0] >= 64 else 3,  # noqa: PLR2004
            shortcut=shortcut or "B",
            classes=classes,
            input_shape=input_shape,
        )
    raise InputError(f"name: expected one of {', '.join(RESNETS)}, got {name!r}")
