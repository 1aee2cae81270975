"""The convolutions of a network, and the same network by other algorithms."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gati_jax._errors import InputError

from .chain import Chain
from .convolution import Algorithm, applicable, store
from .networks import Architecture, to_chain
from .resnet import ResNet
from .vgg import VGG

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
                msg = f"choice: expected one of {', '.join(layer.applicable)} for {layer.kind}, got {algorithm!r}"
                raise InputError(msg)
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
        msg = "chain: expected a network of this library, got a chain of other functions"
        raise InputError(msg)
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
