"""What residual networks and VGGs have in common: variables, training and inference, batch norm folded, chains.

A network is a configuration; its variables are a tuple with one ``{"params", "batch_stats"}`` dictionary for each block
and one for the classifier. Training and inference run the same modules: see ``Norm`` in ``_modules``.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from gati_jax.errors import InputError
from gati_jax.pytrees import call

from .chain import Chain, Normalization
from .convolution import Algorithm, applicable, store
from .modules import EPSILON
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
        raise InputError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    if shortcut is not None:
        raise InputError(f"shortcut: expected none, for {name} has no shortcuts, got {shortcut!r}")
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


ENOUGH = 32  # channels, for Winograd's transforms to pay


class Layer(NamedTuple):
    """One convolution."""

    kernel: int
    stride: int
    inputs: int
    outputs: int
    height: int  # of what comes in
    width: int
    path: tuple[str, ...]  # to its parameters in the block's

    @property
    def kind(self) -> str:
        """What its speed depends on; layers of one kind take one algorithm."""
        return f"{self.kernel}x{self.kernel}/{self.stride} {self.inputs}-{self.outputs} {self.height}x{self.width}"

    @property
    def applicable(self) -> tuple[Algorithm, ...]:
        """The algorithms that can do it."""
        return applicable(self.kernel, self.stride)


@functools.cache
def layers(network: Architecture) -> tuple[tuple[Layer, ...], ...]:
    """Return for every block its convolutions, in the order in which ``network.modules`` takes their algorithms."""
    return _vgg(network) if isinstance(network, VGG) else _resnet(network)


def _vgg(network: VGG) -> tuple[tuple[Layer, ...], ...]:
    height, width, inputs = network.input_shape
    blocks = []
    for outputs, pool in network.shapes:
        blocks.append((Layer(3, 1, inputs, outputs, height, width, ("conv",)),))
        inputs, height, width = outputs, height // (1 + pool), width // (1 + pool)
    return tuple(blocks)


def _resnet(network: ResNet) -> tuple[tuple[Layer, ...], ...]:
    """Stem, 1, 2, (3), projection."""
    height, width, channels = network.input_shape
    small = network.stem == 3  # noqa: PLR2004
    stem = Layer(network.stem, 1 if small else 2, channels, network.widths[0], height, width, ("stem", "conv"))
    inputs = network.widths[0]
    if not small:  # the convolution halves, and so does the max-pool
        height, width = (_halved(_halved(size)) for size in (height, width))
    blocks: list[tuple[Layer, ...]] = []
    for features, stride in network.shapes:
        outputs = 4 * features if network.bottleneck else features
        after = (height, width) if stride == 1 else (_halved(height), _halved(width))
        if network.bottleneck:
            block = (
                Layer(1, 1, inputs, features, height, width, ("conv1",)),
                Layer(3, stride, features, features, height, width, ("conv2",)),
                Layer(1, 1, features, outputs, *after, ("conv3",)),
            )
        else:
            block = (
                Layer(3, stride, inputs, features, height, width, ("conv1",)),
                Layer(3, 1, features, features, *after, ("conv2",)),
            )
        if network.shortcut == "B" and (stride > 1 or inputs != outputs):
            block += (Layer(1, stride, inputs, outputs, height, width, ("shortcut", "projection")),)
        blocks.append(block)
        inputs, (height, width) = outputs, after
    first = (stem, *(layer._replace(path=("block", *layer.path)) for layer in blocks[0]))
    return (first, *blocks[1:])


def _halved(size: int) -> int:
    return (size + 1) // 2


def choose_algorithms(network: Architecture, choice: Mapping[str, Algorithm]) -> tuple[tuple[Algorithm, ...], ...]:
    """Return for every block the algorithms of its convolutions, as ``to_chain`` takes them.

    Args:
        network: Whose.
        choice: By kind of layer; layers of other kinds stay with the compiler's own convolution.

    Raises:
        InputError: An algorithm cannot do its layer.
    """
    algorithms = []
    for block in layers(network):
        picked = tuple(choice.get(layer.kind, "direct") for layer in block)
        for layer, algorithm in zip(block, picked, strict=True):
            if algorithm not in layer.applicable:
                raise InputError(
                    f"choice: expected one of {', '.join(layer.applicable)} for {layer.kind}, got {algorithm!r}"
                )
        algorithms.append(picked)
    return tuple(algorithms)


def store_params(
    network: Architecture, params: Sequence[Any], algorithms: Sequence[tuple[Algorithm, ...]]
) -> tuple[Any, ...]:
    """Return folded parameters with every kernel as its algorithm takes it."""
    blocks = [
        _stored(tree, {layer.path: a for layer, a in zip(block, picked, strict=True)})
        for tree, block, picked in zip(params, layers(network), algorithms, strict=False)
    ]
    return (*blocks, params[-1])


def with_algorithms(chain: Chain, choice: Mapping[str, Algorithm]) -> Chain:
    """Return the same network with its convolutions done by other algorithms, their kernels stored accordingly.

    Args:
        chain: A network's of this library, as ``to_chain`` makes it, without algorithms.
        choice: See ``choose_algorithms``.

    Raises:
        InputError: The chain is no network of this library's, or an algorithm cannot do its layer.
    """
    network = chain.network
    if not isinstance(network, Architecture):
        raise InputError("chain: expected a network of this library, got a chain of other functions")
    algorithms = choose_algorithms(network, choice)
    params = store_params(network, chain.params, algorithms)
    return to_chain(network, params, chain.normalization, algorithms=algorithms)


def winograd_where_wide(network: Architecture) -> dict[str, Algorithm]:
    """Return the choice of Winograd's F(2x2) wherever there are channels enough for its transforms to pay."""
    found = [layer for block in layers(network) for layer in block]
    wide = [layer for layer in found if "winograd2" in layer.applicable and min(layer.inputs, layer.outputs) >= ENOUGH]
    return {layer.kind: "winograd2" for layer in wide}


def fast_forward(chain: Chain) -> Chain:
    """Return the chain for running many images through: on a CPU, with Winograd's convolutions where they pay.

    A quarter to a half faster than the compiler's own; logits differ in their last bits.
    """
    if jax.default_backend() != "cpu" or not isinstance(chain.network, Architecture):
        return chain
    return with_algorithms(chain, winograd_where_wide(chain.network))


def _stored(tree: dict[str, Any], algorithms: Mapping[tuple[str, ...], Algorithm]) -> dict[str, Any]:
    """Return a block's parameters with every kernel as its algorithm takes it."""

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:  # noqa: ANN401 (an array of JAX's or NumPy's)
        *names, last = (key.key for key in path)
        algorithm = algorithms[tuple(names[:-1])]
        return leaf if last != "kernel" or algorithm == "direct" else jnp.asarray(store(leaf, algorithm))

    return jax.tree_util.tree_map_with_path(convert, tree)
