"""The paper's predictors against PyTorch, on activations laid out as PyTorch lays them out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax.caches import Conv, FullyConnected, Pool, adaptive_average

torch = pytest.importorskip("torch")
functional = torch.nn.functional

SITES = [(12,), (50,), (4, 4, 3), (7, 5, 3)]
every_site = pytest.mark.parametrize("site", SITES, ids=str)
average = jax.jit(adaptive_average, static_argnums=(1, 2))


def case(predictor, site):
    """Logits, variables as tensors, and the activation flattened from [batch, channels, height, width]."""
    rng = np.random.default_rng(0)
    activation = jnp.asarray(rng.normal(2, 1, (3, *site)), jnp.float32)
    shapes = jax.eval_shape(predictor.init, jax.random.key(0), activation)
    # Positive throughout, standard deviations are among them; half of the standardised features are negative.
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 3, leaf.shape) / 3, leaf.dtype), shapes)
    flat = tensor(activation)
    flat = flat.permute(0, 3, 1, 2).flatten(1) if flat.ndim == 4 else flat
    return jax.jit(predictor.apply)(variables, activation), jax.tree.map(tensor, variables), flat


def tensor(array):
    return torch.tensor(np.asarray(array, np.float64))


def linear(params, x):
    return functional.linear(x, params["kernel"].T, params["bias"])


def mlp(variables, x):
    statistics, params = variables["statistics"]["standardize"], variables["params"]
    x = (x - statistics["mean"]) / statistics["std"]
    return linear(params["out"], torch.relu(linear(params["hidden"], x)))


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


@every_site
def test_fully_connected(site):
    logits, variables, flat = case(FullyConnected(5, hidden=6), site)
    assert_close(logits, mlp(variables, flat))


@every_site
@pytest.mark.parametrize("size", [1, 6, 16, 200])
def test_pool(site, size):
    logits, variables, flat = case(Pool(5, size=size, hidden=6), site)
    size = min(size, flat.shape[1])  # fewer values than bins are taken as they are
    assert_close(logits, mlp(variables, functional.adaptive_avg_pool1d(flat, size)))


@every_site
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 3), (12, 5)])
def test_conv(site, kernel, stride):
    logits, variables, flat = case(Conv(5, kernel=kernel, stride=stride), site)
    params = variables["params"]
    convolution = torch.nn.Conv1d(1, 1, kernel, stride).double()
    with torch.no_grad():
        convolution.weight.copy_(params["conv"]["kernel"].permute(2, 1, 0))  # [k, in, out] to [out, in, k]
        convolution.bias.copy_(params["conv"]["bias"])
        assert_close(logits, linear(params["out"], torch.relu(convolution(flat[:, None])[:, 0])))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 24), size=st.integers(1, 30), seed=st.integers(0, 9))
def test_adaptive_average(n, size, seed):
    x = np.random.default_rng(seed).normal(size=(2, n)).astype(np.float32)
    expected = functional.adaptive_avg_pool1d(torch.tensor(x), size)
    assert_close(average(jnp.asarray(x), size, 1), expected)
