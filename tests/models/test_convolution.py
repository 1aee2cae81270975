"""Every algorithm against SciPy's correlation in float64, whole networks by each, and training on a CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate2d

import gati_jax
from gati_jax.models import (
    ALGORITHMS,
    VGG,
    Algorithm,
    Architecture,
    ResNet,
    apply_train,
    fold,
    import_state_dict,
    init,
    layers,
    to_chain,
    with_algorithms,
)  # fmt: skip
from gati_jax.models.convolution import applicable, convolve, convolve_cpu, store, stored_shape


def by_hand(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """Sum correlations channel by channel, pad kernel // 2, keep every ``stride``-th."""
    pad = kernel.shape[0] // 2
    x = np.pad(x.astype(np.float64), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    outputs = [
        [
            sum(correlate2d(image[..., i], kernel[..., i, o].astype(np.float64), "valid") for i in range(x.shape[-1]))
            for o in range(kernel.shape[-1])
        ]
        for image in x
    ]
    return np.moveaxis(np.array(outputs), 1, -1)[:, ::stride, ::stride]


@settings(max_examples=8, deadline=None)
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), kernel=st.sampled_from([1, 3, 7]), stride=st.integers(1, 2),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_algorithm_is_the_correlation(height, width, kernel, stride, seed):
    rng = np.random.default_rng(seed)
    batch, inputs, outputs = rng.integers(1, 4, 3)
    x = rng.normal(size=(batch, height, width, inputs)).astype(np.float32)
    k = rng.normal(size=(kernel, kernel, inputs, outputs)).astype(np.float32)
    expected = by_hand(x, k, stride)
    for algorithm in applicable(kernel, stride):
        stored = jnp.asarray(store(k, algorithm))
        assert stored.shape == stored_shape(k.shape, algorithm)
        found = convolve(jnp.asarray(x), stored, algorithm, kernel, stride)
        assert found.shape == expected.shape, algorithm
        np.testing.assert_allclose(found, expected, atol=2e-4, err_msg=algorithm)


def test_winograd_is_for_small_kernels_at_stride_one():
    assert applicable(3, 1) == ALGORITHMS
    assert set(applicable(3, 2)) == set(applicable(1, 1)) == {"direct", "im2col"}


NETWORKS = {
    "shortcut A": ResNet(stages=(1, 2), widths=(4, 8), shortcut="A", input_shape=(9, 8, 3)),
    "shortcut B": ResNet(stages=(2, 1), widths=(4, 8), shortcut="B", input_shape=(8, 8, 1)),
    "bottleneck": ResNet(stages=(1, 1), widths=(4, 4), bottleneck=True, input_shape=(8, 8, 3)),
    "vgg": VGG(convolutions=(1, 2), channels=(6, 10), classes=4, input_shape=(9, 12, 3)),
    "large stem": ResNet(stages=(1, 1), widths=(4, 8), stem=7, input_shape=(37, 34, 3)),
}


def random_chain(network: Architecture) -> gati_jax.Chain:
    """Random kernels and biases, of a size that keeps activations near one."""
    shapes = jax.eval_shape(lambda: fold(init(network, jax.random.key(0))))
    rng = np.random.default_rng(1)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = np.sqrt(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 10
        return (rng.normal(size=leaf.shape) / scale).astype(np.float32)

    return to_chain(network, jax.tree.map(draw, shapes))


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_those_of_the_parameters(name):
    network, chain = NETWORKS[name], random_chain(NETWORKS[name])
    for block, params, site in zip(layers(network), chain.params[:-1], chain.site_specs, strict=True):
        kernels = {
            tuple(key.key for key in path[:-2]): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if path[-1].key == "kernel"
        }
        expected = {layer.path: (layer.kernel, layer.kernel, layer.inputs, layer.outputs) for layer in block}
        assert kernels == expected
        assert (block[0].height, block[0].width) == site.shape[:2]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_by_other_algorithms_is_the_same_network(name, algorithm):
    network = NETWORKS[name]
    chain = random_chain(network)
    choice: dict[str, Algorithm] = {
        layer.kind: algorithm if algorithm in layer.applicable else "im2col"
        for block in layers(network)
        for layer in block
    }
    x = np.random.default_rng(2).normal(size=(3, *network.input_shape)).astype(np.float32)
    expected = np.asarray(chain(jnp.asarray(x)))
    other = with_algorithms(chain, choice)
    np.testing.assert_allclose(other(jnp.asarray(x)), expected, atol=1e-3 * np.ptp(expected))
    assert (other.network, other.normalization, len(other)) == (chain.network, chain.normalization, len(chain))
    if algorithm == "direct":
        assert jax.tree.structure(with_algorithms(chain, {}).params) == jax.tree.structure(chain.params)


def test_what_cannot_be_done_is_refused():
    chain = random_chain(NETWORKS["shortcut B"])
    kind = next(layer.kind for block in layers(chain.network) for layer in block if layer.stride == 2)
    with pytest.raises(gati_jax.InputError, match="choice: expected one of direct, im2col"):
        with_algorithms(chain, {kind: "winograd2"})
    own = gati_jax.Chain(chain.blocks, chain.classifier, chain.params, chain.input_spec)
    with pytest.raises(gati_jax.InputError, match="expected a network of this library"):
        with_algorithms(own, {})


@settings(deadline=None, max_examples=10)
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
    pytest.importorskip("torch")
    from tests.models.torch_reference import random_network, state_dict, torch  # noqa: PLC0415 (optional)

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
