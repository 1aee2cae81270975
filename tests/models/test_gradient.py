"""The convolution that trains on a CPU against the compiler's gradient and PyTorch's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax.models import ResNet, apply_train, import_state_dict
from gati_jax.models.convolution import convolve, convolve_cpu
from tests.models.torch_reference import random_network, state_dict, torch


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([1, 3, 5, 7]), st.integers(1, 3), st.integers(4, 9), st.integers(4, 9), st.integers(1, 3),
    st.integers(1, 4),
)  # fmt: skip
def test_value_and_both_gradients_are_the_compiler_s(kernel, stride, height, width, inputs, outputs):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, height, width, inputs)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(kernel, kernel, inputs, outputs)), jnp.float32)
    expected, of_expected = jax.vjp(lambda x, w: convolve(x, w, "direct", kernel, stride), x, w)
    found: Any
    found, of_found = jax.vjp(lambda x, w: convolve_cpu(x, w, stride), x, w)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    dy = jnp.asarray(rng.normal(size=found.shape), jnp.float32)
    for one, other in zip(of_found(dy), of_expected(dy), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_network_s_gradient_is_torch_s(bottleneck):
    network = ResNet(stages=(1, 1), widths=(4, 6), bottleneck=bottleneck, classes=4, input_shape=(8, 8, 3))
    model = random_network(network).double().train()
    variables = import_state_dict(network, state_dict(model))
    rng = np.random.default_rng(1)
    images, labels = rng.normal(size=(6, 8, 8, 3)).astype(np.float32), rng.integers(0, 4, 6)
    x = jnp.asarray(images)

    def loss(params):
        given = tuple({**v, "params": p} for v, p in zip(variables, params, strict=True))
        logits, _ = apply_train(network, given, x)
        return -jax.nn.log_softmax(logits)[jnp.arange(6), labels].mean()

    found = jax.jit(jax.grad(loss))(tuple(v["params"] for v in variables))
    theirs_x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).double()
    torch.nn.functional.cross_entropy(model(theirs_x), torch.from_numpy(labels)).backward()
    gradients = {name: p.grad.float().numpy() for name, p in model.named_parameters()}
    statistics = {name: v for name, v in state_dict(model).items() if "running" in name}
    expected = import_state_dict(network, gradients | statistics)
    for one, other in zip(found, expected, strict=True):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other["params"]), strict=True)
        for mine, theirs in pairs:
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-3 * np.abs(theirs).max() + 1e-6)
