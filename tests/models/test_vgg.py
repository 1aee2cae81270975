"""VGG with batch norm against PyTorch's, which has a bias before every batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from gati_jax import InputError, models
from gati_jax.errors import WeightsError
from gati_jax.models import VGG, Architecture, ResNet, architecture, layers, vgg, with_algorithms
from tests.models.torch_reference import logits as torch_logits
from tests.models.torch_reference import random_network, state_dict, tensor_shapes, torch_shapes

TINY = VGG(convolutions=(1, 2), channels=(6, 10), classes=4, input_shape=(9, 12, 3))
NETWORKS = [
    pytest.param(TINY, id="tiny"),
    pytest.param(vgg("vgg11", classes=100), id="vgg11 with 100 classes"),
    pytest.param(vgg("vgg16"), id="vgg16", marks=pytest.mark.slow),
]
BIASES = {"features.0.bias", "features.4.bias", "features.7.bias"}  # TINY's convolutions; the first block pools
apply = jax.jit(models.apply, static_argnums=0)


def images_for(network, batch):
    return np.random.default_rng(1).normal(size=(batch, *network.input_shape)).astype(np.float32)


def assert_close(actual, expected, tolerance=1e-4):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("network", NETWORKS)
def test_imported_network_gives_the_logits_of_torch(network):
    model, images = random_network(network), images_for(network, 3)
    variables = models.import_state_dict(network, state_dict(model))
    expected = torch_logits(model, images)
    # Without shortcuts, less of the image comes through eight or more random layers than of their biases.
    assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max()
    assert_close(apply(network, variables, images), expected, 1e-5)
    chain = models.to_chain(network, models.fold(variables))
    assert (len(chain), chain.classes) == (network.depth, network.classes)
    assert_close(jax.jit(models.Chain.__call__)(chain, jnp.asarray(images)), expected, 1e-5)


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_published_networks_have_the_tensors_of_torch(name):
    assert tensor_shapes(vgg(name)) == torch_shapes(vgg(name))


def test_every_tensor_of_torch_matters():
    """A convolution's bias, too, though batch norm would swallow it in training."""
    model, images = random_network(TINY), images_for(TINY, 2)
    before = torch_logits(model.float(), images)
    for name, tensor in state_dict(model.float()).items():
        if not name.endswith("num_batches_tracked"):
            changed = state_dict(model) | {name: tensor * np.float32(1.5)}
            found = apply(TINY, models.import_state_dict(TINY, changed), images)
            assert np.abs(found - before).max() > 1e-4 * np.abs(before).max(), name


def test_training_normalises_as_torch_does():
    model, images = random_network(TINY), images_for(TINY, 5)
    variables = models.import_state_dict(TINY, state_dict(model))
    logits, advanced = jax.jit(models.apply_train, static_argnums=0)(TINY, variables, images)
    assert_close(logits, torch_logits(model.train(), images))
    found, after = models.import_state_dict(TINY, state_dict(model)), advanced
    for one, other in zip(found[:-1], after[:-1], strict=True):
        mean = lambda v: v["batch_stats"]["conv"]["norm"]["mean"]  # noqa: E731
        assert_close(mean(other), mean(one))


def test_what_is_exported_is_a_state_dict_of_torch_and_comes_back():
    model = random_network(TINY).float()
    variables = models.import_state_dict(TINY, state_dict(model))
    tensors = models.export_state_dict(TINY, variables)
    assert {k: v.shape for k, v in tensors.items()} == torch_shapes(TINY)
    back = models.import_state_dict(TINY, tensors)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, variables))


def test_weights_without_the_biases_are_taken_and_misshapen_ones_are_named():
    tensors = models.export_state_dict(TINY, models.init(TINY, jax.random.key(0)))
    models.import_state_dict(TINY, {k: v for k, v in tensors.items() if k not in BIASES})
    with pytest.raises(WeightsError, match=r"features\.0\.bias"):
        models.import_state_dict(TINY, tensors | {"features.0.bias": np.zeros(3, np.float32)})


def test_layers_are_those_of_the_parameters_and_do_the_same_by_other_algorithms():
    params = models.fold(models.import_state_dict(TINY, state_dict(random_network(TINY))))
    for (layer,), block in zip(layers(TINY), params, strict=False):
        assert block["conv"]["conv"]["kernel"].shape == (3, 3, layer.inputs, layer.outputs)
    chain, images = models.to_chain(TINY, params), jnp.asarray(images_for(TINY, 2))
    sizes = [(site.shape[0], site.shape[1]) for site in chain.site_specs]
    assert [(layer.height, layer.width) for (layer,) in layers(TINY)] == sizes
    for algorithm in ("im2col", "winograd2", "winograd4"):
        other = with_algorithms(chain, {layer.kind: algorithm for (layer,) in layers(TINY)})
        np.testing.assert_allclose(other(images), chain(images), atol=1e-4 * float(jnp.abs(chain(images)).max()))


@pytest.mark.parametrize(("name", "count"), [("vgg11", 8), ("vgg13", 10), ("vgg16", 13), ("vgg19", 16)])
def test_depth_follows_from_the_name(name, count):
    """It counts the convolutions and ImageNet's three linear layers."""
    assert (architecture(name).depth, sum(map(len, layers(architecture(name))))) == (count, count)
    assert count == int(name.removeprefix("vgg")) - 3


def test_an_architecture_is_known_by_its_fields():
    """A manifest holds one or the other."""
    adapter = TypeAdapter(Architecture)
    for network in (TINY, ResNet(stages=(1,), widths=(4,))):
        assert adapter.validate_json(adapter.dump_json(network)) == network
    with pytest.raises(ValidationError):
        adapter.validate_python({"convolutions": [1], "channels": [10**9]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vgg("vgg12"), "name: expected one of vgg11, .*got 'vgg12'"),
        (lambda: vgg("vgg16", input_shape=(16, 32, 3)), "input_shape: expected at least 32 rows"),
        (lambda: VGG(convolutions=(1, 2), channels=(4,)), "channels: expected one for each of 2 stages, got 1"),
        (lambda: architecture("vgg16", shortcut="A"), "shortcut: expected none"),
        (lambda: architecture("resnet21"), "name: expected one of resnet20, .*, vgg19, got 'resnet21'"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
