"""A vision transformer's modules as ONNX nodes: importing this adds them to ``graph.emit``.

Between modules values are channels first, as all of a graph's are: [features, tokens]. Inside of a block tokens come
first; ONNX Runtime cancels the transpositions that two blocks have between them.
"""

import math

import numpy as np

from gati_jax import caches
from gati_jax.models import transformers

from .graph import Graph, Params, Value, convolution, dense, emit, mlp


@emit.register
def _first_block(module: transformers.FirstEncoderBlock, g: Graph, params: Params, x: Value) -> Value:
    return emit(module.block, g, params["block"], emit(module.tokens, g, params["tokens"], x))


@emit.register
def _tokens(module: transformers.PatchTokens, g: Graph, params: Params, x: Value) -> Value:
    x = convolution(g, params["patches"], x, stride=module.patch)
    patches = x.shape[1] * x.shape[2]
    x = g.add("Reshape", x, g.ints(0, module.width, patches), shape=(module.width, patches))
    x = g.add("Pad", x, g.ints(0, 0, 1, 0, 0, 0), shape=(module.width, patches + 1))  # room for the class token
    added = np.array(params["positions"])
    added[:, :1] += params["class_token"]
    return g.add("Add", x, g.constant(np.swapaxes(added, 1, 2)))


@emit.register
def _block(module: transformers.EncoderBlock, g: Graph, params: Params, x: Value) -> Value:
    def normalized(name: str, y: Value) -> Value:
        return _layer_norm(g, params[name], y, module.epsilon)

    x = _transposed(g, x)
    if module.norm_first:
        x = g.add("Add", x, _attention(module.heads, g, params["attention"], normalized("norm1", x)))
        x = g.add("Add", x, _mlp(g, params, normalized("norm2", x)))
    else:
        x = normalized("norm1", g.add("Add", x, _attention(module.heads, g, params["attention"], x)))
        x = normalized("norm2", g.add("Add", x, _mlp(g, params, x)))
    return _transposed(g, x)


@emit.register
def _classifier(module: transformers.ClassTokenClassifier, g: Graph, params: Params, x: Value) -> Value:
    return dense(g, params["head"], _layer_norm(g, params["last_norm"], _class_token(g, x), module.epsilon))


@emit.register
def _class_token_head(_: caches.ClassToken, g: Graph, params: Params, x: Value) -> Value:
    return mlp(g, params, _class_token(g, x))


def _attention(heads: int, g: Graph, params: Params, x: Value) -> Value:
    tokens, width = x.shape
    each = width // heads
    qkv = _linear(g, params["qkv"], x)
    qkv = g.add("Reshape", qkv, g.ints(0, tokens, 3, heads, each), shape=(tokens, 3, heads, each))
    parts = g.add_node("Split", qkv, g.ints(1, 1, 1), outputs=3, shape=(tokens, 1, heads, each), axis=2)
    q, k, v = (g.add("Squeeze", part, g.ints(2), shape=(tokens, heads, each)) for part in parts)
    q, v = (g.add("Transpose", part, shape=(heads, tokens, each), perm=(0, 2, 1, 3)) for part in (q, v))
    k = g.add("Transpose", k, shape=(heads, each, tokens), perm=(0, 2, 3, 1))
    scores = g.add("MatMul", g.add("Mul", q, g.constant(each**-0.5)), k, shape=(heads, tokens, tokens))
    y = g.add("MatMul", g.add("Softmax", scores, axis=-1), v, shape=(heads, tokens, each))
    y = g.add("Transpose", y, shape=(tokens, heads, each), perm=(0, 2, 1, 3))
    return _linear(g, params["proj"], g.add("Reshape", y, g.ints(0, tokens, width), shape=x.shape))


def _mlp(g: Graph, params: Params, x: Value) -> Value:
    x = _linear(g, params["fc1"], x)
    erf = g.add("Erf", g.add("Mul", x, g.constant(1 / math.sqrt(2))))
    gelu = g.add("Mul", g.add("Mul", x, g.constant(0.5)), g.add("Add", erf, g.constant(1)))
    return _linear(g, params["fc2"], gelu)


def _linear(g: Graph, layer: Params, x: Value) -> Value:
    kernel, bias = (g.constant(layer[name]) for name in ("kernel", "bias"))
    return g.add("Add", g.add("MatMul", x, kernel, shape=(x.shape[0], *bias.shape)), bias)


def _layer_norm(g: Graph, layer: Params, x: Value, epsilon: float) -> Value:
    scale, bias = (g.constant(layer[name]) for name in ("scale", "bias"))
    return g.add("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)


def _class_token(g: Graph, x: Value) -> Value:
    return g.add("Gather", x, g.constant(0, np.int64), shape=x.shape[:1], axis=2)


def _transposed(g: Graph, x: Value) -> Value:
    return g.add("Transpose", x, shape=x.shape[::-1], perm=(0, 2, 1))
