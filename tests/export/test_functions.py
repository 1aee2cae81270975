"""Functions of JAX as ONNX models: each answers as JAX does, for any number of rows, or is refused by name."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
from gati_jax.export.models import span_model  # noqa: E402
from gati_jax.export.sessions import open_session, to_array, to_value  # noqa: E402

IMAGE, SEQUENCE, ROW, IDS = (8, 7, 6), (6, 4), (8,), (5,)
TABLE = np.random.default_rng(1).normal(size=(11, 3)).astype(np.float32)


class Network(nn.Module):
    """Layers that people's networks have."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return features."""
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        x = nn.silu(nn.Conv(8, (3, 3), feature_group_count=2, kernel_dilation=2)(x))
        return nn.GroupNorm(2)(jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME"))


Case = tuple[Callable[..., Any], Any, tuple[int, ...]]


def linen(module: nn.Module, shape: tuple[int, ...]) -> Case:
    return module.apply, module.init(jax.random.key(0), jnp.zeros((1, *shape))), shape


def of(function: Callable[[jax.Array], jax.Array], shape: tuple[int, ...]) -> Case:
    return lambda _, x: function(x), (), shape


SAME = {
    "convolutions": linen(Network(), IMAGE),
    "transposed convolution": linen(nn.ConvTranspose(5, (3, 3)), IMAGE),
    "line": linen(nn.Conv(5, (3,), strides=2), SEQUENCE),
    "attention": linen(nn.MultiHeadDotProductAttention(2), SEQUENCE),
    "layers": linen(nn.Sequential([nn.LayerNorm(), nn.Dense(7), nn.gelu, nn.Dense(4), nn.softmax]), SEQUENCE),
    "activations": of(
        lambda x: nn.softplus(x) + nn.elu(x) + nn.leaky_relu(x) + nn.hard_swish(x) + nn.log_sigmoid(x), ROW
    ),
    "elements": of(
        lambda x: jnp.sin(x) ** 3 + jnp.log1p(x * x) + jnp.expm1(-jnp.abs(x)) + jax.lax.rsqrt(1 + x * x) + 2**x, ROW
    ),
    "comparisons": of(lambda x: jnp.where((x > 0) & ~(x != x.max(1, keepdims=True)), x, jnp.clip(x, -0.5, 0.2)), ROW),
    "moments": of(lambda x: (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 1), SEQUENCE),
    "products": (lambda p, x: jnp.einsum("btc,cd->bdt", x, p), TABLE[:4], SEQUENCE),
    "all steps of all rows": (lambda p, x: (x.reshape(-1, 4) @ p).reshape(len(x), 6, 3).sum(1), TABLE[:4], SEQUENCE),
    "one more": (lambda p, x: jnp.concatenate([jnp.tile(p, (len(x), 1, 1)), x], 1), TABLE[:4, :1].T, SEQUENCE),
    "ends": of(lambda x: x[:, 0] * 2 + x[:, -1], SEQUENCE),
    "known places": of(lambda x: x[:, jnp.array([3, 1, 3]), ::2], SEQUENCE),
    "patches": of(lambda x: jnp.swapaxes(x[:, :, :6].reshape(-1, 4, 2, 3, 2, 6), 2, 3).reshape(-1, 4, 3, 24), IMAGE),
    "margins": of(lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0)))[:, ::-1], SEQUENCE),
    "larger": of(lambda x: jax.image.resize(x, (len(x), 16, 7, 6), "bilinear"), IMAGE),
    "running sums": of(lambda x: jnp.cumsum(x, 1) + jnp.tril(jnp.ones((1, 6, 4))), SEQUENCE),
    "largest": of(lambda x: jax.lax.top_k(x, 2)[0] + jax.nn.one_hot(x.argmax(-1), 2), SEQUENCE),
    "halves": of(lambda x: jnp.tile(jnp.prod(jnp.stack(jnp.split(x, 2, axis=1)), 0), (1, 2, 1)), SEQUENCE),
    "first": of(lambda x: jnp.unstack(x, axis=1)[0], SEQUENCE),
    "functions in functions": of(jax.checkpoint(jax.jit(jnp.tanh)), ROW),
    "constants": (lambda p, x: jnp.zeros((len(x), 3)) + jnp.sqrt(p), np.float32(2), ROW),
    "nothing": of(lambda x: x, SEQUENCE),
    "look-up": (lambda p, x: jnp.take(p, x, axis=0), TABLE, IDS),
    "table": (lambda p, x: jnp.where((x != 0)[..., None], p[x], -1), TABLE, IDS),
    "one-hot": (lambda p, x: jax.nn.one_hot(x, 11) @ p, TABLE, IDS),
}  # fmt: skip


def chain_of(function: Callable[..., Any], params: Any, shape: tuple[int, ...]) -> gati_jax.Chain:
    spec = jax.ShapeDtypeStruct(shape, np.int32 if shape == IDS else np.float32)

    def classified(_: Any, y: jax.Array) -> jax.Array:
        return y.reshape(len(y), -1)[:, :2]

    return gati_jax.Chain((lambda _, x: x, function, lambda _, x: x), classified, ((), params, (), ()), spec)


@pytest.mark.parametrize("case", SAME)
def test_a_function_answers_as_in_jax(case):
    function, params, shape = SAME[case]
    chain, rng = chain_of(function, params, shape), np.random.default_rng(0)
    x = rng.integers(0, 11, (5, *shape), np.int32) if shape == IDS else rng.normal(size=(5, *shape)).astype(np.float32)
    model = span_model(chain, 1, 2)
    onnx.checker.check_model(model, full_check=True)
    session = open_session(model)
    for rows in ([4, 0, 2, 2], [1]):
        given = {"activation": to_value(np.moveaxis(x, -1, 1)), "rows": to_value(np.array(rows))}
        (found,) = session.run_with_ort_values(["next"], given)
        expected = np.asarray(chain.span(jnp.asarray(x[rows]), 1, 2))
        np.testing.assert_allclose(np.moveaxis(to_array(found), 1, -1), expected, rtol=1e-5, atol=2e-6)


REFUSED = {
    "reduce_sum over rows": of(lambda x: x - x.mean(0, keepdims=True), ROW),
    "a number that depends on the number of rows": of(lambda x: x / len(x), ROW),
    "that depends on the number of rows": of(lambda x: x ** (1 / len(x)), ROW),
    "depends on the number of rows": of(lambda x: x * jnp.float32(3 if len(x) % 4 == 1 else 2), ROW),
    "rows that are joined with others": of(lambda x: jnp.concatenate([x, x])[: len(x)], ROW),
    "a choice of rows": of(lambda x: jnp.roll(x, 1, axis=0), ROW),
    "rows in another order": of(lambda x: x[::-1], ROW),
    "a count of rows": of(lambda x: x + jnp.arange(len(x), dtype=jnp.float32)[:, None], ROW),
    "a sum over rows": of(lambda x: x @ (x.T @ x), ROW),
    "the operation sort": of(jnp.sort, ROW),
    "the operation scan": of(lambda x: jax.lax.scan(lambda c, _: (c + 1, None), x, None, 3)[0], ROW),
    "the operation fft": of(lambda x: jnp.abs(jnp.fft.rfft(x)), ROW),
    "of bfloat16": of(lambda x: (x.astype(jnp.bfloat16) * 2).astype(jnp.float32), ROW),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_onnx_cannot_express_is_refused_by_name(what):
    with pytest.raises(
        gati_jax.InputError, match=f"expected functions that ONNX can express, got .*{what}.* in block 2"
    ):
        span_model(chain_of(*REFUSED[what]), 1, 2)
