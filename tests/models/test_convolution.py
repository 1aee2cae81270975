"""Every algorithm against SciPy's correlation in float64; whole networks by other algorithms against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate2d

import gati_jax
from gati_jax.models import ALGORITHMS, Algorithm, fold, init, layers, resnet, to_chain, with_algorithms
from gati_jax.models.convolution import applicable, convolve, store, stored_shape
from gati_jax.models.resnet import ResNet


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


@settings(max_examples=15, deadline=None)
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
    "large stem": ResNet(stages=(1, 1), widths=(4, 8), stem=7, input_shape=(37, 34, 3)),
}


def random_chain(network: ResNet) -> gati_jax.Chain:
    """Random kernels and biases, of a size that keeps activations near one."""
    shapes = jax.eval_shape(lambda: fold(init(network, jax.random.key(0))))
    rng = np.random.default_rng(1)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = np.sqrt(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 10
        return (rng.normal(size=leaf.shape) / scale).astype(np.float32)

    return to_chain(network, jax.tree.map(draw, shapes))


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_those_of_the_parameters(name):
    network = NETWORKS[name]
    for block, params in zip(layers(network), random_chain(network).params, strict=False):
        kernels = {
            tuple(key.key for key in path[:-2]): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if path[-1].key == "kernel"
        }
        expected = {layer.path: (layer.kernel, layer.kernel, layer.inputs, layer.outputs) for layer in block}
        assert kernels == expected


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


@pytest.mark.parametrize(("name", "count"), [("resnet56", 55), ("resnet18", 20), ("resnet50", 53)])
def test_published_networks_have_as_many_convolutions_as_published(name, count):
    assert sum(map(len, layers(resnet(name)))) == count
