"""What residual networks and VGGs have in common: variables, training and inference, batch norm folded, chains.

A network is a configuration; its variables are a tuple with one ``{"params", "batch_stats"}`` dictionary for each block
and one for the classifier. Training and inference run the same modules: see ``Norm`` in ``_modules``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from gati_jax._errors import InputError
from gati_jax._linen import call

from ._modules import EPSILON
from .chain import Chain, Normalization
from .convolution import Algorithm
from .resnet import RESNETS, ResNet, resnet
from .vgg import VGG, VGGS, vgg

Architecture = ResNet | VGG
Variables = tuple[dict[str, Any], ...]
NAMES = (*RESNETS, *VGGS)


def architecture(
    name: str,
    *,
    classes: int = 10,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    shortcut: Literal["A", "B"] | None = None,
) -> Architecture:
    """Return a published configuration; see ``resnet`` and ``vgg``.

    Raises:
        InputError: The name is not known, or a shortcut is given for a network without.

    Example:
        >>> architecture("vgg16").depth
        13
    """
    if name in RESNETS:
        return resnet(name, classes=classes, input_shape=input_shape, shortcut=shortcut)
    if name not in VGGS:
        msg = f"name: expected one of {', '.join(NAMES)}, got {name!r}"
        raise InputError(msg)
    if shortcut is not None:
        msg = f"shortcut: expected none, for {name} has no shortcuts, got {shortcut!r}"
        raise InputError(msg)
    return vgg(name, classes=classes, input_shape=input_shape)


def init(network: Architecture, key: PRNGKeyArray) -> Variables:
    """Draw fresh variables."""
    x = jax.ShapeDtypeStruct((1, *network.input_shape), jnp.float32)
    variables = []
    for module, block_key in zip(network.modules("batch"), jax.random.split(key, network.depth + 1), strict=True):
        variables.append(module.init(block_key, jnp.zeros(x.shape, x.dtype)))
        x, _ = jax.eval_shape(lambda v, a, m=module: m.apply(v, a, mutable=["batch_stats"]), variables[-1], x)
    return tuple(variables)


def apply(
    network: Architecture, variables: Variables, x: Float[Array, "batch height width channels"]
) -> Float[Array, "batch classes"]:
    """Return logits, normalising by running statistics."""
    for module, v in zip(network.modules("running"), variables, strict=True):
        x = call(module, v, x)
    return x


def apply_train(
    network: Architecture, variables: Variables, x: Float[Array, "batch height width channels"]
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
    network: Architecture,
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
