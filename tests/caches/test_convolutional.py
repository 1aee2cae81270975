"""Convolutional and cascaded heads, against XLA's own convolution and plain sums."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax import InputError
from gati_jax.caches import Cascaded, Convolutional, Grid, fold_standardize
from gati_jax.pytrees import call

PICTURE = jnp.asarray(np.random.default_rng(0).standard_normal((3, 9, 7, 4)) * 3 + 1, jnp.float32)


def by_xla(params, x, *, kernel, stride, cells):
    for i in range(len([name for name in params if name.startswith("conv_")])):
        layer = params[f"conv_{i}"]
        assert layer["kernel"].shape[:2] == tuple(min(kernel, size) for size in x.shape[1:3])
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (stride, stride), "VALID", dimension_numbers=dims)
        x = nn.relu(x + layer["bias"].reshape(1, 1, 1, -1))
    head = Grid(5, cells=cells, hidden=params["hidden"]["bias"].shape[0], standardize=False)
    return call(head, {"params": {name: params[name] for name in ("hidden", "out")}}, x)


@settings(max_examples=6, deadline=None)
@given(
    channels=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    cells=st.integers(1, 3),
)
def test_patches_are_a_convolution_and_standardisation_folds_into_it(channels, kernel, stride, cells):
    head = Convolutional(5, tuple(channels), kernel, stride, cells, hidden=6)
    variables = head.init(jax.random.key(1), PICTURE)
    mean, std = (jnp.asarray(variables["statistics"]["standardize"][name]) for name in ("mean", "std"))
    standardised = (PICTURE - mean.reshape(1, 1, 1, -1)) / std.reshape(1, 1, 1, -1)
    expected = by_xla(variables["params"], standardised, kernel=kernel, stride=stride, cells=cells)
    np.testing.assert_allclose(call(head, variables, PICTURE), expected, rtol=2e-4, atol=2e-4)
    folded, own = fold_standardize(head, variables)
    assert not folded.standardize
    np.testing.assert_allclose(call(folded, own, PICTURE), expected, rtol=2e-4, atol=2e-4)


def test_statistics_are_those_of_channels():
    variables = Convolutional(5).init(jax.random.key(0), PICTURE)
    mean = jnp.asarray(variables["statistics"]["standardize"]["mean"])
    np.testing.assert_allclose(mean, PICTURE.mean((0, 1, 2)), rtol=1e-5)


def test_vectors_are_refused():
    with pytest.raises(InputError, match="conv2d: expected a site of"):
        Convolutional(5).init(jax.random.key(0), PICTURE[:, 0, 0])


def test_a_cascaded_head_is_a_geometric_ensemble_of_itself_and_the_one_before():
    inner, previous = Convolutional(5, (4,)), jax.random.normal(jax.random.key(1), (3, 5))
    head = Cascaded(5, inner)
    variables = head.init(jax.random.key(0), PICTURE, previous)
    own = {kind: tree["inner"] for kind, tree in variables.items()}
    alone = jax.nn.softmax(call(inner, own, PICTURE))
    product = alone * jax.nn.softmax(previous)  # weights begin as the identity
    together = jax.nn.softmax(call(head, variables, PICTURE, previous))
    np.testing.assert_allclose(together, product / product.sum(-1, keepdims=True), rtol=1e-4)
    folded, folded_variables = fold_standardize(head, variables)
    expected = call(head, variables, PICTURE, previous)
    np.testing.assert_allclose(call(folded, folded_variables, PICTURE, previous), expected, rtol=1e-4, atol=1e-4)
