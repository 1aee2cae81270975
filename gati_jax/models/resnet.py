"""Residual networks as chains: CIFAR ResNet-20 .. 110 and ResNet-18 .. 152 with the 32x32 or the 224x224 stem.

A network is a configuration; its variables are a tuple with one ``{"params", "batch_stats"}`` dictionary for each block
and one for the classifier. Training and inference run the same modules: see ``Norm`` in ``_modules``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray
from pydantic import Field

from gati_jax._errors import InputError
from gati_jax._linen import call

from ._modules import Classifier, FirstBlock, Norm, ResidualBlock, Stem
from .chain import Chain, Normalization
from .convolution import Algorithm

Variables = tuple[dict[str, Any], ...]
Size = Annotated[int, Field(ge=1, le=4096)]
EPSILON = 1e-5  # batch norm's, in PyTorch and here


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
            msg = f"widths: expected one for each of {len(self.stages)} stages, got {len(self.widths)}"
            raise InputError(msg)
        if self.shortcut == "A" and sorted(self.widths) != list(self.widths):
            msg = f"widths: expected rising ones, for shortcut A can only add channels, got {self.widths}"
            raise InputError(msg)

    def modules(self, norm: Norm, algorithms: Sequence[tuple[Algorithm, ...]] = ()) -> tuple[nn.Module, ...]:
        """Return the modules of blocks 1 .. N and the classifier.

        Args:
            norm: See ``Norm``.
            algorithms: For each block those of its convolutions, see ``layers``; the compiler's own if empty.
        """
        chosen = list(algorithms) or [()] * sum(self.stages)
        stem_algorithm = chosen[0][0] if chosen[0] else "direct"
        chosen[0] = chosen[0][1:]
        blocks = [
            ResidualBlock(width, stride, self.bottleneck, self.shortcut, norm, choice)
            for (width, stride), choice in zip(self.shapes, chosen, strict=True)
        ]
        stem = Stem(self.widths[0], self.stem, norm, stem_algorithm)
        return (FirstBlock(stem, blocks[0]), *blocks[1:], Classifier(self.classes))

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Width and stride of every residual block."""
        return tuple(
            (width, 2 if stage > 0 and k == 0 else 1)
            for stage, (count, width) in enumerate(zip(self.stages, self.widths, strict=True))
            for k in range(count)
        )


_CIFAR = {f"resnet{6 * n + 2}": (n, n, n) for n in (3, 5, 7, 9, 18)}
_IMAGENET = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
NAMES = (*_CIFAR, *_IMAGENET)


def resnet(
    name: str,
    *,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    shortcut: Literal["A", "B"] | None = None,
) -> ResNet:
    """Return a published configuration.

    Args:
        name: "resnet20", 32, 44, 56, 110 (He et al., section 4.2: three stages, shortcut A unless told) or "resnet18",
            34, 50, 101, 152 (four stages, shortcut B unless told).
        classes: Number of classes.
        input_shape: Height, width and channels. From 64 pixels on, the four-stage networks take the 7x7 stem.
        shortcut: Option A or B where a block changes the shape.

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
    msg = f"name: expected one of {', '.join(NAMES)}, got {name!r}"
    raise InputError(msg)


def init(network: ResNet, key: PRNGKeyArray) -> Variables:
    """Draw fresh variables."""
    x = jax.ShapeDtypeStruct((1, *network.input_shape), jnp.float32)
    variables = []
    for module, block_key in zip(network.modules("batch"), jax.random.split(key, sum(network.stages) + 1), strict=True):
        variables.append(module.init(block_key, jnp.zeros(x.shape, x.dtype)))
        x, _ = jax.eval_shape(lambda v, a, m=module: m.apply(v, a, mutable=["batch_stats"]), variables[-1], x)
    return tuple(variables)


def apply(
    network: ResNet, variables: Variables, x: Float[Array, "batch height width channels"]
) -> Float[Array, "batch classes"]:
    """Return logits, normalising by running statistics."""
    for module, v in zip(network.modules("running"), variables, strict=True):
        x = call(module, v, x)
    return x


def apply_train(
    network: ResNet, variables: Variables, x: Float[Array, "batch height width channels"]
) -> tuple[Float[Array, "batch classes"], Variables]:
    """Return logits, normalised by the batch's statistics, and variables with their running statistics advanced."""
    advanced = []
    for module, v in zip(network.modules("batch"), variables, strict=True):
        x, statistics = module.apply(v, x, mutable=["batch_stats"])
        advanced.append({**v, **statistics})
    return x, tuple(advanced)


def fold(variables: Variables) -> tuple[dict[str, Any], ...]:
    """Fold every batch norm into its convolution: the parameters of the "folded" modules.

    ``norm(conv(x, w)) = conv(x, w * s) + (bias - mean * s)`` with ``s = scale / sqrt(var + epsilon)``.
    """
    return tuple(_fold(v["params"], v.get("batch_stats", {})) for v in variables)


def _fold(params: dict[str, Any], statistics: dict[str, Any]) -> dict[str, Any]:
    if "norm" in params:
        norm, running = params["norm"], statistics["norm"]
        scale = norm["scale"] / jnp.sqrt(running["var"] + EPSILON)
        kernel = params["conv"]["kernel"]
        return {"conv": {"kernel": kernel * scale.reshape(1, 1, 1, -1), "bias": norm["bias"] - running["mean"] * scale}}
    children = {name: _fold(v, statistics.get(name, {})) if isinstance(v, dict) else v for name, v in params.items()}
    return {name: child for name, child in children.items() if not isinstance(child, dict) or child}


@dataclasses.dataclass(frozen=True)
class LinenBlock:
    """A Linen module as a block of a chain; equal modules make equal blocks."""

    module: nn.Module

    def __call__(self, params: dict[str, Any], x: Array) -> Array:
        """Apply the module."""
        return call(self.module, {"params": params}, x)


def to_chain(
    network: ResNet,
    params: tuple[Any, ...],
    normalization: Normalization | None = None,
    *,
    algorithms: Sequence[tuple[Algorithm, ...]] = (),
) -> Chain:
    """Return the inference chain of ``network`` with folded parameters (see ``fold``).

    ``algorithms`` are those that the kernels in ``params`` are stored for: see ``with_algorithms``.
    """
    *blocks, classifier = (LinenBlock(module) for module in network.modules("folded", algorithms))
    spec = jax.ShapeDtypeStruct(network.input_shape, jnp.float32)
    return Chain(tuple(blocks), classifier, params, spec, normalization, network)
