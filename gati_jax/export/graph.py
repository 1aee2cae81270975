"""The library's modules as ONNX nodes: one function for each kind of module, all of them under the name ``emit``.

Values are channels first, and so are the constants that are computed from parameters; the batch stays open. A graph's
arithmetic is float32, as the reference is, in another order.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn
from numpy.typing import DTypeLike
from onnx import NodeProto, TensorProto, helper, numpy_helper

from gati_jax import InputError, Normalization, caches
from gati_jax.caches.candidate import LOG_FLOOR
from gati_jax.caches.neighbours import LEAST, REPEAT, TINY
from gati_jax.caches.predictors import bins_of
from gati_jax.models import modules

Params = Mapping[str, Any]
Shape = tuple[int, ...]


class Value(NamedTuple):
    """What a node computes."""

    name: str
    shape: Shape  # of one row


@dataclasses.dataclass(frozen=True)
class Graph:
    """Nodes and constants of a graph that is being built."""

    prefix: str
    """Begins every name, which must differ from those in the graphs around this one."""
    nodes: list[NodeProto] = dataclasses.field(default_factory=list)
    constants: list[TensorProto] = dataclasses.field(default_factory=list)

    def constant(self, array: Any, dtype: DTypeLike = np.float32) -> Value:  # noqa: ANN401 (anything that NumPy takes)
        """Add a constant; its shape is a whole one."""
        name, value = f"{self.prefix}constant_{len(self.constants)}", np.asarray(array, dtype)
        self.constants.append(numpy_helper.from_array(value, name))
        return Value(name, value.shape)

    def ints(self, *values: int) -> Value:
        """Add a constant vector of integers, such as axes."""
        return self.constant(values, np.int64)

    def add(self, kind: str, *inputs: Value, shape: Shape | None = None, **attributes: Any) -> Value:  # noqa: ANN401
        """Add a node with one output, by default of the first input's shape."""
        return self.add_node(kind, *inputs, outputs=1, shape=shape, **attributes)[0]

    def add_node(
        self,
        kind: str,
        *inputs: Value,
        outputs: int,
        shape: Shape | None = None,
        **attributes: Any,  # noqa: ANN401
    ) -> list[Value]:
        """Add a node with several outputs of one shape."""
        names = [f"{self.prefix}{kind.lower()}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, [value.name for value in inputs], names, **attributes))
        return [Value(name, inputs[0].shape if shape is None else shape) for name in names]


def prepare(g: Graph, images: Value, normalization: Normalization | None) -> Value:
    """Bring inputs [*positions, channels] to channels first; normalise them where they are pixels."""
    *positions, channels = images.shape
    order, x = (0, len(images.shape), *range(1, len(images.shape))), images
    if positions:
        x = g.add("Transpose", images, shape=(channels, *positions), perm=order)
    if normalization is None:
        return x
    ones = (1,) * len(positions)
    mean, std = (g.constant(np.reshape(v, (-1, *ones))) for v in (normalization.mean, normalization.std))
    scaled = g.add("Mul", g.add("Cast", x, to=TensorProto.FLOAT), g.constant(normalization.scale))
    return g.add("Div", g.add("Sub", scaled, mean), std)


def answer_of(g: Graph, logits: Value) -> Value:
    """Return the class of the largest logit, the first of equal ones."""
    return g.add("Cast", g.add("ArgMax", logits, shape=(), axis=1, keepdims=0), to=TensorProto.INT32)


@functools.singledispatch
def emit(module: nn.Module, g: Graph, params: Params, x: Value) -> Value:
    """Add the nodes of a module.

    Args:
        module: A block or a classifier of a network, a predictor without ``Standardize``, or a selector.
        g: Where to.
        params: The module's, as NumPy arrays.
        x: Its input.

    Raises:
        InputError: This kind of module cannot be exported.
    """
    del g, params, x
    raise InputError(f"bundle: expected modules of this library, got a {type(module).__name__}")


# --- Networks ---------------------------------------------------------------------------------------------------------


@emit.register
def _first_block(module: modules.FirstBlock, g: Graph, params: Params, x: Value) -> Value:
    return emit(module.block, g, params["block"], emit(module.stem, g, params["stem"], x))


@emit.register
def _stem(module: modules.Stem, g: Graph, params: Params, x: Value) -> Value:
    small = module.kernel == 3  # noqa: PLR2004
    x = g.add("Relu", convolution(g, params["conv"]["conv"], x, stride=1 if small else 2, pad=module.kernel // 2))
    return x if small else _max_pool(g, x, kernel=3, pad=1)


@emit.register
def _residual_block(module: modules.ResidualBlock, g: Graph, params: Params, x: Value) -> Value:
    layers, y = modules.residual_layers(module.features, module.stride, module.bottleneck), x
    for i, (_, kernel, stride) in enumerate(layers, 1):
        y = y if i == 1 else g.add("Relu", y)
        y = convolution(g, params[f"conv{i}"]["conv"], y, stride=stride, pad=kernel // 2)
    if "shortcut" in params:
        x = convolution(g, params["shortcut"]["projection"]["conv"], x, stride=module.stride)
    elif x.shape != y.shape:
        x = _subsample(g, x, module.stride, y.shape)
    return g.add("Relu", g.add("Add", y, x))


@emit.register
def _convolution_block(module: modules.ConvolutionBlock, g: Graph, params: Params, x: Value) -> Value:
    x = g.add("Relu", convolution(g, params["conv"]["conv"], x, pad=1))
    return _max_pool(g, x, kernel=2) if module.pool else x


@emit.register
def _classifier(_: modules.Classifier, g: Graph, params: Params, x: Value) -> Value:
    return dense(g, params["fc"], _global_average(g, x))


# --- Predictors -------------------------------------------------------------------------------------------------------


@emit.register
def _fully_connected(_: caches.FullyConnected, g: Graph, params: Params, x: Value) -> Value:
    return mlp(g, params, _flat(g, x))


@emit.register
def _pool(module: caches.Pool, g: Graph, params: Params, x: Value) -> Value:
    size = int(np.prod(x.shape))
    line = g.add("Reshape", x, g.ints(0, 1, 1, -1), shape=(1, 1, size))
    return mlp(g, params, _flat(g, _average(g, line, min(module.size, size), axis=3)))


@emit.register
def _conv(module: caches.Conv, g: Graph, params: Params, x: Value) -> Value:
    line = g.add("Reshape", x, g.ints(0, 1, -1), shape=(1, int(np.prod(x.shape))))
    x = g.add("Relu", convolution(g, params["conv"], line, stride=module.stride))
    return dense(g, params["out"], _flat(g, x))


@emit.register
def _global_average_head(_: caches.GlobalAverage, g: Graph, params: Params, x: Value) -> Value:
    return mlp(g, params, _global_average(g, x))


@emit.register
def _grid(module: caches.Grid, g: Graph, params: Params, x: Value) -> Value:
    return _grid_mlp(g, params, x, module.cells)


@emit.register
def _convolutional(module: caches.Convolutional, g: Graph, params: Params, x: Value) -> Value:
    if len(x.shape) == 2:  # noqa: PLR2004 (a sequence is a picture of one column)
        x = g.add("Unsqueeze", x, g.ints(3), shape=(*x.shape, 1))
    for i in range(len(module.channels)):
        x = g.add("Relu", convolution(g, params[f"conv_{i}"], x, stride=module.stride))
    return _grid_mlp(g, params, x, module.cells)


@emit.register
def _network(module: caches.Network, g: Graph, params: Params, x: Value) -> Value:
    scale, shift = (g.constant(np.reshape(params[name], (-1, 1, 1))) for name in ("scale", "shift"))
    x = g.add("Add", g.add("Mul", x, scale), shift)
    for part, tree in zip(module.network.modules("folded"), params["network"], strict=True):
        x = emit(part, g, tree, x)
    return x


@emit.register
def _neighbours(module: caches.Neighbours, g: Graph, params: Params, x: Value) -> Value:
    distances, index = _nearest(g, params, x, module.cells, module.k)
    labels, over = g.constant(_one_hot(params, module.classes)), g.ints(1)
    votes = g.add("Gather", labels, index, shape=(module.k, module.classes))
    near = g.add("Div", votes, g.add("Unsqueeze", distances, g.ints(2)))
    weight = g.add("ReduceSum", near, over, shape=(module.classes,), keepdims=0)
    share = g.add("ReduceMean", votes, over, shape=(module.classes,), keepdims=0)
    return g.add("Log", g.add("Max", g.add("Mul", share, weight), g.constant(LEAST)))


@emit.register
def _centres(module: caches.Centres, g: Graph, params: Params, x: Value) -> Value:
    distance, index = _nearest(g, params, x, module.cells, 1)
    shares = g.constant(_one_hot(params, module.classes) * np.reshape(params["share"], (-1, 1)))
    share = g.add("Gather", shares, _column(g, index), shape=(module.classes,))
    return g.add("Log", g.add("Max", g.add("Div", share, distance), g.constant(LEAST)))


def _nearest(g: Graph, params: Params, x: Value, cells: int | None, k: int) -> tuple[Value, Value]:
    """Return distances and indices of the nearest points, [k] each: see ``gati_jax.caches.nearest``."""
    layer, points = params["hidden"], g.constant(params["keys"])
    layer, x = (layer, _flat(g, x)) if cells is None else _on_grid(g, layer, x, cells)
    key = g.add("Relu", dense(g, layer, x))
    length = g.add("ReduceL2", key, g.ints(1), shape=(1,))
    norms = g.constant(params["norms"])
    product = g.add("Gemm", key, points, norms, shape=norms.shape, alpha=-2.0, transB=1)
    squared = g.add("Max", g.add("Add", product, g.add("Mul", length, length)), g.constant(0))
    _, index = _top(g, squared, k, largest=0)
    found = g.add("Gather", points, index, shape=(k, *key.shape))
    apart = g.add("Sub", found, g.add("Unsqueeze", key, g.ints(1)))
    exact = g.add("ReduceL2", apart, g.ints(2), shape=(k,), keepdims=0)
    floor = g.add("Add", g.add("Mul", length, g.constant(REPEAT)), g.constant(TINY))
    absent = np.where(np.isinf(params["norms"]), np.inf, 0)  # rows without a point
    return g.add("Max", exact, floor, g.add("Gather", g.constant(absent), index)), index


def _one_hot(params: Params, classes: int) -> np.ndarray:
    """Return one-hot labels of all points; a row without a point has zeros."""
    return np.reshape(params["labels"], (-1, 1)) == np.arange(classes)


# --- Selectors --------------------------------------------------------------------------------------------------------


@emit.register
def _linear_selector(_: caches.LinearSelector, g: Graph, params: Params, x: Value) -> Value:
    kernel, bias = params["out"]["kernel"], params["out"]["bias"]
    layer = {"kernel": kernel[:, 1:] - kernel[:, :1], "bias": bias[1:] - bias[:1]}  # hit minus miss
    return _column(g, dense(g, layer, _log_probabilities(g, x)))


@emit.register
def _probability_selector(_: caches.ProbabilitySelector, g: Graph, params: Params, x: Value) -> Value:
    del params
    first, others = g.add_node(
        "Split", _top(g, x, x.shape[0])[0], g.ints(1, x.shape[0] - 1), outputs=2, shape=(1,), axis=1
    )
    return _column(g, g.add("Sub", first, g.add("ReduceLogSumExp", others, g.ints(1), shape=(1,))))


@emit.register
def _sorted_selector(module: caches.SortedSelector, g: Graph, params: Params, x: Value) -> Value:
    top = min(module.top, x.shape[0])
    largest, _ = _top(g, _log_probabilities(g, x), top)
    hidden, out = params["hidden"], params["out"]
    y = g.add("Relu", dense(g, {**hidden, "kernel": hidden["kernel"] / -LOG_FLOOR}, largest))
    joined = g.add("Concat", y, largest, shape=(y.shape[0] + top,), axis=1)
    skip = np.pad(out["kernel"], ((0, top - 1), (0, 0)))  # of the largest only the first is an input of "out"
    return _column(g, dense(g, {**out, "kernel": skip}, joined))


@emit.register
def _confidence(_: caches.Confidence, g: Graph, params: Params, x: Value) -> Value:
    del params
    return g.add("ReduceMax", x, g.ints(1), shape=(), keepdims=0)


# --- What they are made of --------------------------------------------------------------------------------------------


def dense(g: Graph, layer: Params, x: Value) -> Value:
    """Add a linear layer."""
    kernel, bias = (g.constant(layer[name]) for name in ("kernel", "bias"))
    return g.add("Gemm", x, kernel, bias, shape=bias.shape)


def mlp(g: Graph, params: Params, x: Value) -> Value:
    """Add the two layers of a head."""
    return dense(g, params["out"], g.add("Relu", dense(g, params["hidden"], x)))


def _grid_mlp(g: Graph, params: Params, x: Value, cells: int) -> Value:
    hidden, x = _on_grid(g, params["hidden"], x, cells)
    return mlp(g, {**params, "hidden": hidden}, x)


def _on_grid(g: Graph, layer: Params, x: Value, cells: int) -> tuple[Params, Value]:
    """Return means over a grid, flat, and the layer behind them, whose rows come in their order: channels first."""
    for axis in range(2, len(x.shape) + 1):
        x = _average(g, x, min(cells, x.shape[axis - 1]), axis)
    channels, *positions = x.shape
    kernel = layer["kernel"].reshape(*positions, channels, -1)
    return {**layer, "kernel": np.moveaxis(kernel, -2, 0).reshape(-1, kernel.shape[-1])}, _flat(g, x)


def _average(g: Graph, x: Value, size: int, axis: int) -> Value:
    """Average one axis of positions in ``size`` bins: see ``gati_jax.caches.adaptive_average``."""
    n, shape = x.shape[axis - 1], (*x.shape[: axis - 1], size, *x.shape[axis:])
    if n % size == 0:
        kernel = [n // size if i == axis else 1 for i in range(2, len(x.shape) + 1)]
        return g.add("AveragePool", x, shape=shape, kernel_shape=kernel, strides=kernel)
    index, weight = bins_of(n, size)
    weight = g.constant(np.reshape(weight, (*weight.shape, *(1,) * (len(x.shape) - axis))))
    bins = g.add("Mul", g.add("Gather", x, g.constant(index, np.int64), axis=axis), weight)
    return g.add("ReduceSum", bins, g.ints(axis + 1), shape=shape, keepdims=0)


def _global_average(g: Graph, x: Value) -> Value:
    return _flat(g, g.add("GlobalAveragePool", x, shape=(x.shape[0], *(1,) * len(x.shape[1:]))))


def _flat(g: Graph, x: Value) -> Value:
    return g.add("Flatten", x, shape=(int(np.prod(x.shape)),))


def convolution(g: Graph, layer: Params, x: Value, *, stride: int = 1, pad: int = 0) -> Value:
    """Convolve a picture or a line with a kernel [*window, in, out]."""
    kernel = np.moveaxis(layer["kernel"], (-1, -2), (0, 1))
    sizes = tuple((n + 2 * pad - k) // stride + 1 for n, k in zip(x.shape[1:], kernel.shape[2:], strict=True))
    strides, pads = [stride] * len(sizes), [pad] * 2 * len(sizes)
    weights = g.constant(kernel), g.constant(layer["bias"])
    return g.add("Conv", x, *weights, shape=(len(kernel), *sizes), strides=strides, pads=pads)


def _max_pool(g: Graph, x: Value, *, kernel: int, pad: int = 0) -> Value:
    shape = (x.shape[0], *((n + 2 * pad - kernel) // 2 + 1 for n in x.shape[1:]))
    return g.add("MaxPool", x, shape=shape, kernel_shape=[kernel] * 2, strides=[2, 2], pads=[pad] * 4)


def _subsample(g: Graph, x: Value, stride: int, shape: Shape) -> Value:
    """Take every ``stride``-th position and add channels of zeros, as many before as behind."""
    bounds = [g.ints(*v) for v in ((0, 0), (2**31 - 1,) * 2, (2, 3), (stride, stride))]  # start, stop, axes, steps
    before, missing = (shape[0] - x.shape[0]) // 2, shape[0] - x.shape[0]
    pads = g.ints(0, before, 0, 0, 0, missing - before, 0, 0)
    return g.add("Pad", g.add("Slice", x, *bounds), pads, shape=shape)


def _top(g: Graph, x: Value, k: int, *, largest: int = 1) -> list[Value]:
    """Return the ``k`` largest or smallest values of each row in order, and their indices."""
    return g.add_node("TopK", x, g.ints(k), outputs=2, shape=(k,), axis=1, largest=largest)


def _log_probabilities(g: Graph, x: Value) -> Value:
    return g.add("Max", g.add("LogSoftmax", x, axis=1), g.constant(LOG_FLOOR))


def _column(g: Graph, x: Value) -> Value:
    return g.add("Squeeze", x, g.ints(1), shape=())
