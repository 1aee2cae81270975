"""Functions of a network: its variables, training, inference as a chain, and its convolution algorithms.

A network is a configuration (``ResNet``, ``VGG``, ``ViT``, ``Bert``); its variables are a tuple with one ``{"params",
"batch_stats"}`` dictionary for each block and one for the classifier, the latter only where there are batch norms.
Training and inference run the same modules, see ``modules.Norm``.
An inference chain has its batch norms folded into its convolutions, and each of these may run by another algorithm.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Num, PRNGKeyArray

from gati_jax.errors import InputError
from gati_jax.pytrees import call

from .architectures import AnyNetwork, Architecture
from .chain import Chain, Normalization
from .convolution import Algorithm, Layer, store
from .modules import EPSILON

Inputs = Num[Array, "batch *input"]
Logits = Float[Array, "batch classes"]
Variables = tuple[dict[str, Any], ...]
_WINOGRAD_CHANNELS = 32  # with fewer, its transforms cost more than they save


def init(network: AnyNetwork, key: PRNGKeyArray) -> Variables:
    """Draw fresh variables."""
    x = jax.ShapeDtypeStruct((1, *network.input_shape), network.input_dtype)
    variables = []
    for module, block_key in zip(network.modules("batch"), jax.random.split(key, network.depth + 1), strict=True):
        variables.append(module.init(block_key, jnp.zeros(x.shape, x.dtype)))
        x, _ = jax.eval_shape(lambda v, a, m=module: m.apply(v, a, mutable=["batch_stats"]), variables[-1], x)
    return tuple(variables)


def apply(network: AnyNetwork, variables: Variables, x: Inputs) -> Logits:
    """Return logits, normalising by running statistics."""
    for module, v in zip(network.modules("running"), variables, strict=True):
        x = call(module, v, x)
    return x


def apply_train(network: AnyNetwork, variables: Variables, x: Inputs) -> tuple[Logits, Variables]:
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


def unfold(network: AnyNetwork, params: Sequence[Any]) -> Variables:
    """Return variables that ``fold`` makes exactly these parameters of: their batch norms only add the biases."""

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> Any:  # noqa: ANN401
        block, _, *names = (key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key for key in path)
        match names:
            case [*_, "norm", "mean"]:
                return np.zeros(shape.shape, shape.dtype)
            case [*_, "norm", "var"]:
                return np.ones(shape.shape, shape.dtype)
            case [*_, "norm", "scale"]:
                return np.asarray(jnp.sqrt(np.ones(shape.shape, shape.dtype) + EPSILON))  # what ``fold`` divides by
            case [*above, "norm", "bias"]:
                names = [*above, "conv", "bias"]
        return functools.reduce(operator.getitem, names, params[block])

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(lambda: init(network, jax.random.key(0))))


@dataclasses.dataclass(frozen=True)
class LinenBlock:
    """A Linen module as a block of a chain; equal modules make equal blocks."""

    module: nn.Module

    def __call__(self, params: dict[str, Any], x: Array) -> Array:
        """Apply the module."""
        return call(self.module, {"params": params}, x)


def to_chain(
    network: AnyNetwork,
    params: tuple[Any, ...],
    normalization: Normalization | None = None,
    *,
    algorithms: Sequence[tuple[Algorithm, ...]] = (),
) -> Chain:
    """Return the inference chain of ``network`` with folded parameters (see ``fold``).

    ``algorithms`` are those that the kernels in ``params`` are stored for: see ``with_algorithms``.
    """
    *blocks, classifier = (LinenBlock(module) for module in network.modules("folded", algorithms))
    spec = jax.ShapeDtypeStruct(network.input_shape, network.input_dtype)
    return Chain(tuple(blocks), classifier, params, spec, normalization, network)


@functools.cache
def layers(network: Architecture) -> tuple[tuple[Layer, ...], ...]:
    """Return the convolutions of every block, in the order in which ``network.modules`` takes their algorithms."""
    return network.layers()


def choose_algorithms(network: Architecture, choice: Mapping[str, Algorithm]) -> tuple[tuple[Algorithm, ...], ...]:
    """Return the algorithms of every block's convolutions, as ``to_chain`` takes them.

    Args:
        network: The network.
        choice: An algorithm by kind of layer; layers of other kinds keep the compiler's own convolution.

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
    """Return folded parameters with every kernel in the form that its algorithm takes."""
    blocks = []
    for tree, block, picked in zip(params, layers(network), algorithms, strict=False):
        by_path = dict(zip((layer.path for layer in block), picked, strict=True))
        blocks.append(jax.tree_util.tree_map_with_path(functools.partial(_stored, by_path), tree))
    return (*blocks, params[-1])


def _stored(algorithms: Mapping[tuple[str, ...], Algorithm], path: tuple[Any, ...], leaf: Any) -> Any:  # noqa: ANN401
    names = [key.key for key in path]
    *layer, last = names[:-2] + names[-1:]  # between them, the name of the convolution itself
    algorithm = algorithms.get(tuple(layer), "direct")  # other leaves are no convolution's
    return leaf if last != "kernel" or algorithm == "direct" else jnp.asarray(store(leaf, algorithm))


def with_algorithms(chain: Chain, choice: Mapping[str, Algorithm]) -> Chain:
    """Return the same network with its convolutions done by other algorithms, their kernels stored accordingly.

    Args:
        chain: The chain of an ``Architecture`` as ``to_chain`` makes it, without algorithms.
        choice: See ``choose_algorithms``.

    Raises:
        InputError: The chain is none of these, or an algorithm cannot do its layer.
    """
    network = chain.network
    if not isinstance(network, Architecture):
        raise InputError("chain: expected a network of this library, got a chain of other functions")
    algorithms = choose_algorithms(network, choice)
    params = store_params(network, chain.params, algorithms)
    return to_chain(network, params, chain.normalization, algorithms=algorithms)


def winograd_where_wide(network: Architecture) -> dict[str, Algorithm]:
    """Return a choice for ``with_algorithms``: Winograd's F(2x2) wherever it can be used and has enough channels."""
    return {
        layer.kind: "winograd2"
        for block in layers(network)
        for layer in block
        if "winograd2" in layer.applicable and min(layer.inputs, layer.outputs) >= _WINOGRAD_CHANNELS
    }


def fast_forward(chain: Chain) -> Chain:
    """Return the chain as it runs many images fastest: on a CPU, with Winograd's convolutions where they are wide.

    That is a quarter to a half faster than the compiler's own convolutions; logits differ in their last bits.
    """
    if jax.default_backend() != "cpu" or not isinstance(chain.network, Architecture):
        return chain
    return with_algorithms(chain, winograd_where_wide(chain.network))
