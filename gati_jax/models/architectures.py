"""Configurations by published names: residual networks, VGG with batch norm for small images, and transformers.

They become modules (``modules``) and the list of their convolutions (``layers``), both one block at a time. Their
bounds matter where a manifest, which is untrusted, becomes a network.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from flax import linen as nn
from pydantic import Field

from gati_jax.errors import InputError

from .convolution import Algorithm, Layer
from .modules import Classifier, ConvolutionBlock, FirstBlock, Norm, ResidualBlock, Size, Stem, residual_layers
from .transformers import Bert, ViT

_Counts = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=8)]
_Channels = Annotated[tuple[Size, ...], Field(min_length=1, max_length=8)]
_Classes = Annotated[int, Field(ge=2, le=100_000)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet:
    """The configuration of a residual network (He et al., arXiv:1512.03385)."""

    stages: _Counts
    """Residual blocks in each stage; each stage but the first halves height and width."""
    widths: _Channels
    """Channels in each stage (a bottleneck's output has four times as many)."""
    bottleneck: bool = False
    stem: Literal[3, 7] = 3
    shortcut: Literal["A", "B"] = "B"
    classes: _Classes = 10
    input_shape: tuple[Size, Size, Size] = (32, 32, 3)
    """Height, width, channels."""
    input_dtype: ClassVar[str] = "float32"

    def __post_init__(self) -> None:
        """Refuse stages without widths, and a shortcut that cannot reach the bottleneck's width."""
        if len(self.stages) != len(self.widths):
            raise InputError(f"widths: expected one for each of {len(self.stages)} stages, got {len(self.widths)}")
        if self.shortcut == "A" and sorted(self.widths) != list(self.widths):
            raise InputError(f"widths: expected rising ones, for shortcut A can only add channels, got {self.widths}")

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
        size, channels = self.input_shape[:2], self.input_shape[2]
        small, inputs = self.stem == 3, self.widths[0]  # noqa: PLR2004
        stem = Layer(self.stem, 1 if small else 2, channels, inputs, *size, ("stem", "conv"))
        if not small:  # the convolution halves, and so does the max-pool
            size = _halved(_halved(size))
        blocks: list[tuple[Layer, ...]] = []
        for width, stride in self.shapes:
            before, channels, block = size, inputs, []
            for i, (features, kernel, step) in enumerate(residual_layers(width, stride, self.bottleneck), 1):
                block.append(Layer(kernel, step, channels, features, *size, (f"conv{i}",)))
                channels, size = features, _halved(size) if step == 2 else size  # noqa: PLR2004
            if self.shortcut == "B" and (stride > 1 or inputs != channels):
                block.append(Layer(1, stride, inputs, channels, *before, ("shortcut", "projection")))
            blocks.append(tuple(block))
            inputs = channels
        first = (stem, *(layer._replace(path=("block", *layer.path)) for layer in blocks[0]))
        return (first, *blocks[1:])


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    return (size[0] + 1) // 2, (size[1] + 1) // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class VGG:
    """The configuration of a VGG with batch norm (Simonyan and Zisserman, arXiv:1409.1556): a block is one convolution.

    What follows the last pooling is the classifier of the CIFAR versions, one linear layer; ImageNet's three are not
    built.
    """

    convolutions: _Counts
    """How many each stage has; height and width halve behind each stage."""
    channels: _Channels
    """How many each stage's convolutions have."""
    classes: _Classes = 10
    input_shape: tuple[Size, Size, Size] = (32, 32, 3)
    """Height, width, channels."""
    input_dtype: ClassVar[str] = "float32"

    def __post_init__(self) -> None:
        """Refuse stages without channels, and images that would be pooled to nothing."""
        stages, least = len(self.convolutions), 2 ** len(self.convolutions)
        if stages != len(self.channels):
            raise InputError(f"channels: expected one for each of {stages} stages, got {len(self.channels)}")
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
        """Return the modules of blocks 1 .. N and the classifier; arguments as in ``ResNet.modules``."""
        direct: tuple[Algorithm, ...] = ("direct",)
        blocks = [
            ConvolutionBlock(channels, pool, norm, algorithm)
            for (channels, pool), (algorithm,) in zip(self.shapes, algorithms or [direct] * self.depth, strict=True)
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


Architecture = ResNet | VGG | ViT
"""A network of images."""
AnyNetwork = Architecture | Bert
"""A network that a bundle can rebuild."""

_CIFAR = {f"resnet{6 * n + 2}": (n, n, n) for n in (3, 5, 7, 9, 18)}
_IMAGENET = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
_VGGS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_VITS = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}
_BERTS = {
    "bert_tiny": (128, 2, 2),
    "bert_mini": (256, 4, 4),
    "bert_small": (512, 8, 4),
    "bert_medium": (512, 8, 8),
    "bert_base": (768, 12, 12),
}
RESNETS = (*_CIFAR, *_IMAGENET)
VITS = (*_VITS,)
BERTS = (*_BERTS,)
NAMES = (*RESNETS, *_VGGS, *VITS)
"""Of networks of images."""


def architecture(
    name: str,
    *,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    shortcut: Literal["A", "B"] | None = None,
    patch: int | None = None,
    depth: int | None = None,
) -> Architecture:
    """Return a published configuration; see ``resnet``, ``vgg`` and ``vit``.

    Raises:
        InputError: The name is not known, or a shortcut, a patch or a depth is given for a network without.

    Example:
        >>> architecture("vgg16").depth
        13
    """
    if name not in NAMES:
        raise InputError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    if shortcut is not None and name not in RESNETS:
        raise InputError(f"shortcut: expected none, for {name} has no shortcuts, got {shortcut!r}")
    for option, value in (("patch", patch), ("depth", depth)):
        if value is not None and name not in VITS:
            raise InputError(f"{option}: expected none, for {name} is no ViT, got {value}")
    if name in RESNETS:
        return resnet(name, classes=classes, input_shape=input_shape, shortcut=shortcut)
    if name in VITS:
        return vit(name, classes=classes, input_shape=input_shape, patch=patch, depth=depth)
    return vgg(name, classes=classes, input_shape=input_shape)


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
    if name not in RESNETS:
        raise InputError(f"name: expected one of {', '.join(RESNETS)}, got {name!r}")
    small = name in _CIFAR
    return ResNet(
        stages=_CIFAR[name] if small else _IMAGENET[name],
        widths=(16, 32, 64) if small else (64, 128, 256, 512),
        bottleneck=name in {"resnet50", "resnet101", "resnet152"},
        stem=3 if small or input_shape[0] < 64 else 7,  # noqa: PLR2004
        shortcut=shortcut or ("A" if small else "B"),
        classes=classes,
        input_shape=input_shape,
    )


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
    if name not in _VGGS:
        raise InputError(f"name: expected one of {', '.join(_VGGS)}, got {name!r}")
    channels = (64, 128, 256, 512, 512)
    return VGG(convolutions=_VGGS[name], channels=channels, classes=classes, input_shape=input_shape)


def vit(
    name: str,
    *,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    patch: int | None = None,
    depth: int | None = None,
) -> ViT:
    """Return a published configuration (Dosovitskiy et al., arXiv:2010.11929; Touvron et al., arXiv:2012.12877).

    Args:
        name: "vit_tiny", "vit_small" or "vit_base".
        classes: Number of classes.
        input_shape: Height, width and channels, in whole patches.
        patch: Pixels per side of a patch; by default 16, and 4 for images of less than 64 pixels.
        depth: Blocks; by default the published 12.

    Raises:
        InputError: The name is not known, or the images are not whole patches.

    Example:
        >>> vit("vit_tiny").patch
        4
    """
    if name not in _VITS:
        raise InputError(f"name: expected one of {', '.join(VITS)}, got {name!r}")
    width, heads = _VITS[name]
    patch = patch or (16 if input_shape[0] >= 64 else 4)  # noqa: PLR2004
    sizes = {"width": width, "depth": depth or 12, "heads": heads, "hidden": 4 * width}
    return ViT(patch=patch, **sizes, classes=classes, input_shape=input_shape)


def bert(name: str, *, classes: int = 2, length: int = 128, vocabulary: int = 30_522) -> Bert:
    """Return a published configuration (Devlin et al., arXiv:1810.04805; Turc et al., arXiv:1908.08962).

    Args:
        name: "bert_tiny", "bert_mini", "bert_small", "bert_medium" or "bert_base".
        classes: Number of classes.
        length: Tokens of an input, at most 512; shorter texts are padded with id 0.
        vocabulary: Number of token ids.

    Raises:
        InputError: The name is not known, or the inputs are too long.

    Example:
        >>> bert("bert_mini", length=64).input_shape
        (64,)
    """
    if name not in _BERTS:
        raise InputError(f"name: expected one of {', '.join(BERTS)}, got {name!r}")
    width, depth, heads = _BERTS[name]
    sizes = {"width": width, "depth": depth, "heads": heads, "hidden": 4 * width}
    return Bert(vocabulary=vocabulary, length=length, **sizes, classes=classes)
