"""Networks against plain PyTorch, whose VGGs have a bias before every batch norm; random weights and statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from gati_jax import models
from gati_jax.errors import InputError, WeightsError
from gati_jax.models import VGG, Architecture, ResNet, architecture, layers, resnet, vgg
from tests.models.torch_reference import logits as torch_logits
from tests.models.torch_reference import nn, random_network, state_dict, tensor_shapes, torch_shapes

BASIC = ResNet(stages=(1, 2), widths=(6, 10), classes=4, input_shape=(9, 9, 3))
BOTTLENECK = ResNet(stages=(2, 1), widths=(4, 6), bottleneck=True, classes=4, input_shape=(8, 8, 3))
TINY = {
    "basic, A": ResNet(stages=(1, 2), widths=(6, 11), shortcut="A", classes=4, input_shape=(9, 9, 3)),
    "basic, B": BASIC,
    "basic, equal widths": ResNet(stages=(1, 1), widths=(6, 6), classes=4, input_shape=(8, 8, 3)),
    "basic, 7x7 stem": ResNet(stages=(1, 1), widths=(6, 8), stem=7, classes=4, input_shape=(21, 26, 3)),
    "bottleneck, A": ResNet(
        stages=(2, 1), widths=(4, 6), bottleneck=True, shortcut="A", classes=4, input_shape=(8, 8, 3)
    ),
    "bottleneck, B": BOTTLENECK,
    "bottleneck, 7x7 stem": ResNet(
        stages=(1, 1), widths=(4, 6), bottleneck=True, stem=7, classes=4, input_shape=(20, 24, 3)
    ),
}
PUBLISHED = {
    "resnet20, A": resnet("resnet20"),
    "resnet20, B": resnet("resnet20", shortcut="B"),
    "resnet18, 3x3 stem": resnet("resnet18"),
    "resnet18, 7x7 stem": resnet("resnet18", input_shape=(64, 64, 3), classes=7),
    "resnet50, 3x3 stem": resnet("resnet50"),
}
TINY_VGG = VGG(convolutions=(1, 2), channels=(6, 10), classes=4, input_shape=(9, 12, 3))
VGGS = {"tiny vgg": TINY_VGG, "vgg11 with 100 classes": vgg("vgg11", classes=100), "vgg16": vgg("vgg16")}
BIASES = {"features.0.bias", "features.4.bias", "features.7.bias"}  # TINY_VGG's convolutions; the first block pools
SLOW = {"resnet20, A", "resnet18, 3x3 stem", "resnet50, 3x3 stem", "vgg16"}  # these take minutes


def each(networks):
    marked = [pytest.param(n, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, n in networks.items()]
    return pytest.mark.parametrize("network", marked)


apply = jax.jit(models.apply, static_argnums=0)
apply_train = jax.jit(models.apply_train, static_argnums=0)


def images_for(network, batch, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, *network.input_shape)).astype(np.float32)


init = jax.jit(models.init, static_argnums=0)


def key(seed=0):
    return jax.random.key(seed, impl="rbg")  # compiles ten times faster than the default


@functools.cache
def random_variables(network):
    return models.import_state_dict(network, state_dict(random_network(network)))


def assert_close(actual, expected, tolerance=1e-4):
    """Compare relative to the largest value: rounding in deep networks does not shrink with a single output."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@each(TINY | PUBLISHED | VGGS)
def test_imported_network_gives_the_logits_of_torch(network):
    model, images = random_network(network), images_for(network, 3)
    variables = models.import_state_dict(network, state_dict(model))
    expected = torch_logits(model, images)
    # Without shortcuts, less of the image comes through eight or more random layers than of their biases.
    spread, tolerance = (0.01, 1e-4) if isinstance(network, ResNet) else (1e-3, 1e-5)
    assert np.ptp(expected, axis=0).max() > spread * np.abs(expected).max()  # the logits depend on the image
    assert_close(apply(network, variables, images), expected, tolerance)


@each(TINY | VGGS)
def test_folded_chain_equals_the_unfolded_network(network):
    variables = random_variables(network)
    chain = models.to_chain(network, models.fold(variables))
    images = jnp.asarray(images_for(network, 3))
    assert (len(chain), chain.classes) == (network.depth, network.classes)
    assert_close(jax.jit(models.Chain.__call__)(chain, images), apply(network, variables, images), 1e-5)


def test_folded_parameters_hold_biased_convolutions_only():
    leaves = jax.tree_util.tree_flatten_with_path(jax.eval_shape(models.fold, random_variables(BASIC)))[0]
    assert {path[-1].key for path, _ in leaves} == {"kernel", "bias"}
    assert not any("norm" in jax.tree_util.keystr(path) for path, _ in leaves)


def batch_statistics(model, images):
    """Run torch in training mode; return logits and, for each batch norm, values seen per channel."""
    counts = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(
                lambda _, x, __, name=name: counts.update({name: x[0].numel() / x[0].shape[1]})
            )
    return torch_logits(model.train(), images), counts


@pytest.mark.parametrize("network", [BASIC, BOTTLENECK], ids=["basic", "bottleneck"])
def test_training_normalises_and_advances_statistics_as_torch_does(network):
    model = random_network(network)
    before = state_dict(model)
    variables = models.import_state_dict(network, before)
    images = images_for(network, 5)
    logits, advanced = apply_train(network, variables, images)
    expected, counts = batch_statistics(model, images)
    assert_close(logits, expected)
    found, after = models.export_state_dict(network, advanced), state_dict(model)
    for name, n in counts.items():
        mean, var = f"{name}.running_mean", f"{name}.running_var"
        assert_close(found[mean], after[mean])
        # torch blends in the unbiased variance (n / (n - 1) times the mean square), flax the biased one.
        seen = (after[var] - 0.9 * before[var]) * (n - 1) / n
        assert_close(found[var], 0.9 * before[var] + seen)


def test_training_changes_running_statistics_only():
    variables = random_variables(BASIC)
    _, advanced = apply_train(BASIC, variables, images_for(BASIC, 5))
    assert jax.tree.structure(advanced) == jax.tree.structure(variables)
    for old, new in zip(variables, advanced, strict=True):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, old["params"], new["params"]))
        pairs = zip(jax.tree.leaves(old.get("batch_stats")), jax.tree.leaves(new.get("batch_stats")), strict=True)
        assert not any(jnp.array_equal(a, b) for a, b in pairs)


SHAPES = {"basic": BASIC, "bottleneck": BOTTLENECK, **PUBLISHED, "vgg16": vgg("vgg16"), "vgg19": vgg("vgg19")}


@pytest.mark.parametrize("network", SHAPES.values(), ids=SHAPES)
def test_init_has_the_tensors_of_torch(network):
    assert tensor_shapes(network) == torch_shapes(network)


def test_init_is_a_function_of_its_key():
    one, same, other = (init(BASIC, key(seed)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, one, same))
    assert not jnp.array_equal(
        one[1]["params"]["conv1"]["conv"]["kernel"], other[1]["params"]["conv1"]["conv"]["kernel"]
    )


def test_init_draws_kernels_with_the_variance_of_he():
    network = ResNet(stages=(1,), widths=(64,), input_shape=(4, 4, 3))
    kernel = init(network, key())[0]["params"]["block"]["conv1"]["conv"]["kernel"]
    # 36,864 draws: the standard error of the standard deviation is below 0.4 %.
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (3 * 3 * 64)), rtol=0.03)


@pytest.mark.parametrize("name", models.RESNETS)
def test_number_of_blocks_follows_from_the_name(name):
    # The name counts the stem, the linear layer and each block's convolutions.
    layers = int(name.removeprefix("resnet"))
    network = resnet(name)
    per_block = 3 if network.bottleneck else 2
    assert sum(network.stages) == (layers - 2) / per_block
    assert network.bottleneck == (name in {"resnet50", "resnet101", "resnet152"})
    assert len(network.modules("folded")) == sum(network.stages) + 1


def test_stem_follows_the_input():
    assert [resnet("resnet18", input_shape=(n, n, 3)).stem for n in (32, 63, 64, 224)] == [3, 3, 7, 7]
    assert resnet("resnet20", input_shape=(64, 64, 3)).stem == 3


def test_shortcut_follows_the_family_unless_told():
    assert (resnet("resnet20").shortcut, resnet("resnet20", shortcut="B").shortcut) == ("A", "B")
    assert (resnet("resnet18").shortcut, resnet("resnet18", shortcut="A").shortcut) == ("B", "A")


@pytest.mark.parametrize(("network", "least"), [(BASIC, 1e-3), (TINY_VGG, 1e-4)], ids=["resnet", "vgg"])
def test_every_tensor_of_torch_matters(network, least):
    """The comparisons above see a wrong one. A VGG's biases matter too, which batch norm swallows in training."""
    state, images = state_dict(random_network(network)), images_for(network, 2)
    before = apply(network, random_variables(network), images)
    for name, tensor in state.items():
        if not name.endswith("num_batches_tracked"):
            changed = models.import_state_dict(network, state | {name: tensor * np.float32(1.5)})
            assert np.abs(apply(network, changed, images) - before).max() > least * np.abs(before).max(), name


def test_a_vgg_normalises_in_training_as_torch_does():
    model, images = random_network(TINY_VGG), images_for(TINY_VGG, 5)
    variables = models.import_state_dict(TINY_VGG, state_dict(model))
    logits, advanced = apply_train(TINY_VGG, variables, images)
    assert_close(logits, torch_logits(model.train(), images))
    expected = models.import_state_dict(TINY_VGG, state_dict(model))
    for one, other in zip(advanced[:-1], expected[:-1], strict=True):
        assert_close(*(v["batch_stats"]["conv"]["norm"]["mean"] for v in (one, other)))


def test_a_vgg_is_exported_as_a_state_dict_of_torch_and_comes_back():
    variables = random_variables(TINY_VGG)
    tensors = models.export_state_dict(TINY_VGG, variables)
    assert {k: v.shape for k, v in tensors.items()} == torch_shapes(TINY_VGG)
    assert jax.tree.all(jax.tree.map(np.array_equal, models.import_state_dict(TINY_VGG, tensors), variables))
    models.import_state_dict(TINY_VGG, {k: v for k, v in tensors.items() if k not in BIASES})
    with pytest.raises(WeightsError, match=r"features\.0\.bias"):
        models.import_state_dict(TINY_VGG, tensors | {"features.0.bias": np.zeros(3, np.float32)})


COUNTS = {"vgg11": 8, "vgg13": 10, "vgg16": 13, "vgg19": 16, "resnet56": 55, "resnet18": 20, "resnet50": 53}


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_published_networks_have_as_many_convolutions_as_published(name, count):
    network = architecture(name)
    assert sum(map(len, layers(network))) == count
    if isinstance(network, VGG):  # the name counts ImageNet's three linear layers, too
        assert network.depth == count == int(name.removeprefix("vgg")) - 3


def test_an_architecture_is_known_by_its_fields():
    """A manifest holds one or the other."""
    adapter = TypeAdapter(Architecture)
    for network in (TINY_VGG, ResNet(stages=(1,), widths=(4,))):
        assert adapter.validate_json(adapter.dump_json(network)) == network
    with pytest.raises(ValidationError):
        adapter.validate_python({"convolutions": [1], "channels": [10**9]})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet("resnet21"), "name: expected one of resnet20, .*resnet152, got 'resnet21'"),
        (lambda: ResNet(stages=(1, 1), widths=(4, 8, 16)), "widths: expected one for each of 2 stages, got 3"),
        # Zero channels can be added, never taken away.
        (lambda: ResNet(stages=(1, 1), widths=(8, 4), shortcut="A"), "widths: expected rising ones"),
        (lambda: vgg("vgg12"), "name: expected one of vgg11, .*got 'vgg12'"),
        (lambda: vgg("vgg16", input_shape=(16, 32, 3)), "input_shape: expected at least 32 rows"),
        (lambda: VGG(convolutions=(1, 2), channels=(4,)), "channels: expected one for each of 2 stages, got 1"),
        (lambda: architecture("vgg16", shortcut="A"), "shortcut: expected none"),
        (lambda: architecture("resnet21"), "name: expected one of resnet20, .*, vit_base, got 'resnet21'"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
