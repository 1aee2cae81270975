"""Every predictor through the same tests; each against NumPy or XLA's own convolution."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax.caches import (
    Cascaded,
    Conv,
    Convolutional,
    FullyConnected,
    GlobalAverage,
    Grid,
    Pool,
    adaptive_average,
    fold_standardize,
    summary_for,
    unfold_standardize,
)
from gati_jax.errors import InputError
from gati_jax.pytrees import call

CLASSES, BATCH = 5, 4
PREDICTORS: dict[str, Any] = {
    "fc": FullyConnected(CLASSES, hidden=6),
    "pool": Pool(CLASSES, size=16, hidden=6),
    "pool, odd": Pool(CLASSES, size=7, hidden=6),
    "conv": Conv(CLASSES),
    "conv, strided": Conv(CLASSES, kernel=8, stride=3),
    "gap": GlobalAverage(CLASSES, hidden=6),
    "grid": Grid(CLASSES, cells=2, hidden=6),
    "grid, odd": Grid(CLASSES, cells=3, hidden=6),
}
SITES = [(12,), (50,), (4, 4, 3), (7, 5, 3)]  # 50 and 7 x 5 are multiples of none of the pools
every_predictor = pytest.mark.parametrize("predictor", PREDICTORS.values(), ids=PREDICTORS)
every_site = pytest.mark.parametrize("site", SITES, ids=str)

init = jax.jit(lambda predictor, key, x: predictor.init(key, x), static_argnums=0)
average = jax.jit(adaptive_average, static_argnums=(1, 2))
apply = jax.jit(lambda predictor, variables, x: predictor.apply(variables, x), static_argnums=0)


def key(seed=0):
    return jax.random.key(seed, impl="rbg")  # compiles twice as fast as the default


def activation_at(site, batch=BATCH, seed=0):
    """Features with means far from zero and scales far apart, as behind a ReLU."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(2, 1, (batch, *site)) * rng.uniform(0.1, 3, site[-1]), jnp.float32)


@functools.cache
def case(predictor, site):
    """An activation and random variables: fresh biases would be zero, and drawing kernels compiles for seconds."""
    activation = activation_at(site)
    rng = np.random.default_rng(1)
    variables = jax.eval_shape(predictor.init, key(), activation)
    draw = {"params": lambda shape: rng.normal(0, 0.5, shape), "statistics": lambda shape: rng.uniform(0.5, 2, shape)}
    return activation, {
        name: jax.tree.map(lambda leaf, name=name: jnp.asarray(draw[name](leaf.shape), leaf.dtype), tree)
        for name, tree in variables.items()
    }


def same(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(jnp.array_equal, one, other)
    )


@every_predictor
def test_init_draws_parameters_from_key_and_shape_only(predictor):
    one, again, other_key, other_values = (
        init(predictor, key(i), activation_at((7, 5, 3), seed=seed)) for i, seed in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    assert same(one, again)
    assert not same(one["params"], other_key["params"])
    assert same(one["params"], other_values["params"])


@pytest.mark.parametrize("site", [(50,), (7, 5, 3)], ids=str)
@every_predictor
def test_predictors_are_pure_and_compiled_as_eager(predictor, site):
    activation, variables = case(predictor, site)
    logits = apply(predictor, variables, activation)
    assert (logits.shape, logits.dtype) == ((BATCH, CLASSES), jnp.float32)
    eager, after = predictor.apply(variables, activation, mutable=True)
    assert same(after, variables)
    assert jnp.array_equal(predictor.apply(variables, activation), eager)
    np.testing.assert_allclose(eager, logits, rtol=1e-4, atol=1e-5)


@every_site
@every_predictor
def test_rows_do_not_see_each_other(predictor, site):
    activation, variables = case(predictor, site)
    logits = apply(predictor, variables, activation)
    poisoned = apply(predictor, variables, activation.at[1].set(jnp.nan))
    assert jnp.isnan(poisoned[1]).all()
    others = np.array([0, 2, 3])
    np.testing.assert_allclose(poisoned[others], logits[others], rtol=1e-6, atol=1e-7)
    alone = [apply(predictor, variables, activation[i : i + 1]) for i in range(BATCH)]
    np.testing.assert_allclose(np.concatenate(alone), logits, rtol=1e-4, atol=1e-5)


@every_predictor
def test_every_value_of_the_activation_counts(predictor):
    activation, variables = case(predictor, (7, 5, 3))
    jacobian = jax.jit(jax.jacobian(lambda x: predictor.apply(variables, x).sum(0)))
    # A ReLU closed in one row is open in another: over the rows each value moves some logit.
    moved = np.abs(sum(jacobian(activation * scale) for scale in (1.0, -1.0))).sum((0, 1))
    # A stride that does not divide drops the end of the flattened activation: 105 = 8 + 32 * 3 + 1.
    dropped = 1 if predictor == PREDICTORS["conv, strided"] else 0
    assert int((moved == 0).sum()) == dropped
    assert dropped == 0 or moved[-1, -1, -1] == 0


def mlp(variables, x):
    statistics, params = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables[name]) for name in ("statistics", "params")
    )
    x = (x - statistics["standardize"]["mean"]) / statistics["standardize"]["std"]
    hidden = np.maximum(x @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def bins(n, size):
    """PyTorch's adaptive bins: floor(i n / size) up to ceil((i + 1) n / size)."""
    return [slice(int(np.floor(i * n / size)), int(np.ceil((i + 1) * n / size))) for i in range(size)]


def fields(activation, cells):
    """Means over each field of the grid, concatenated; a flat activation as it is."""
    picture = np.asarray(activation, np.float64)
    if picture.ndim == 2:
        return picture
    rows, columns = (bins(n, min(cells, n)) for n in picture.shape[1:3])
    return np.concatenate([picture[:, i, j].mean((1, 2)) for i in rows for j in columns], axis=-1)


def flat(activation):
    """As PyTorch flattens [batch, channels, height, width]."""
    x = np.asarray(activation, np.float64)
    return np.moveaxis(x, -1, 1).reshape(len(x), -1)


def pooled(activation, size):
    """Fewer values than bins are taken as they are."""
    x = flat(activation)
    return np.stack([x[:, part].mean(1) for part in bins(x.shape[1], min(size, x.shape[1]))], axis=1)


HEADS: dict[str, tuple[Any, Any]] = {
    "fc": (PREDICTORS["fc"], flat),
    "gap": (PREDICTORS["gap"], functools.partial(fields, cells=1)),
    **{f"pool {n}": (Pool(CLASSES, n, hidden=6), functools.partial(pooled, size=n)) for n in (1, 6, 16, 200)},
    **{f"grid {n}": (Grid(CLASSES, n, hidden=6), functools.partial(fields, cells=n)) for n in (1, 2, 3, 6)},
}


@every_site
@pytest.mark.parametrize(("predictor", "features"), HEADS.values(), ids=HEADS)
def test_heads_are_an_mlp_on_their_features(predictor, features, site):
    activation, variables = case(predictor, site)
    expected = mlp(variables, features(activation))
    np.testing.assert_allclose(apply(predictor, variables, activation), expected, rtol=1e-3, atol=1e-4)


@every_site
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 3), (12, 5)])
def test_conv_equals_numpy(site, kernel, stride):
    predictor: Any = Conv(CLASSES, kernel=kernel, stride=stride)
    activation, variables = case(predictor, site)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    weights = params["conv"]["kernel"][:, 0, 0]
    maps = np.stack([np.correlate(row, weights, "valid")[::stride] for row in flat(activation)])
    expected = np.maximum(maps + params["conv"]["bias"], 0) @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(apply(predictor, variables, activation), expected, rtol=1e-3, atol=1e-4)


def test_features_are_standardised_by_the_batch_given_to_init():
    features = activation_at((12,), batch=50).at[:, 3].set(7.0)  # one that does not vary
    statistics = init(PREDICTORS["fc"], key(), features)["statistics"]["standardize"]
    variance = np.asarray(features, np.float64).var(0)
    np.testing.assert_allclose(statistics["mean"], np.asarray(features, np.float64).mean(0), rtol=1e-5)
    # At least a hundredth of the mean variance, and hardly more than the feature's own.
    least = 0.01 * variance.mean()
    assert (statistics["std"] ** 2 >= np.maximum(variance, least) * (1 - 1e-5)).all()
    assert (statistics["std"] ** 2 <= (variance + least) * (1 + 1e-5)).all()


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_adaptive_average_pools_any_axis(axis, size):
    x = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    moved = np.moveaxis(x, axis, 0)
    expected = np.moveaxis(np.stack([moved[part].mean(0) for part in bins(len(moved), size)]), 0, axis)
    np.testing.assert_allclose(average(jnp.asarray(x), size, axis), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 24), size=st.integers(1, 30), seed=st.integers(0, 9))
def test_adaptive_average_is_torch_s(n, size, seed):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(seed).normal(size=(2, n)).astype(np.float32)
    expected = torch.nn.functional.adaptive_avg_pool1d(torch.tensor(x), size).numpy()
    np.testing.assert_allclose(average(jnp.asarray(x), size, 1), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("site", [(12,), (7, 5, 3)], ids=str)
@every_predictor
def test_a_folded_predictor_is_the_same_function(predictor, site):
    activation, variables = case(predictor, site)
    folded, folded_variables = fold_standardize(predictor, variables)
    expected = np.asarray(predictor.apply(variables, activation))
    found = np.asarray(folded.apply(folded_variables, activation))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert set(folded_variables) == {"params"}
    assert fold_standardize(folded, folded_variables) == (folded, folded_variables)
    if hasattr(predictor, "standardize"):
        assert not folded.standardize
        unfolded, own = unfold_standardize(folded, folded_variables, activation * 2 + 1)
        assert unfolded == predictor
        again = np.asarray(unfolded.apply(own, activation))
        np.testing.assert_allclose(again, expected, atol=1e-5 * np.abs(expected).max())


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
    np.testing.assert_allclose(mean, PICTURE.mean((0, 1, 2)), rtol=1e-5)
    standardised = (PICTURE - mean.reshape(1, 1, 1, -1)) / std.reshape(1, 1, 1, -1)
    expected = by_xla(variables["params"], standardised, kernel=kernel, stride=stride, cells=cells)
    np.testing.assert_allclose(call(head, variables, PICTURE), expected, rtol=2e-4, atol=2e-4)
    folded, own = fold_standardize(head, variables)
    assert not folded.standardize
    np.testing.assert_allclose(call(folded, own, PICTURE), expected, rtol=2e-4, atol=2e-4)


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


@every_predictor
@every_site
def test_a_summary_is_all_that_a_predictor_reads(predictor, site):
    x = jax.random.normal(key(1), (BATCH, *site))
    variables = init(predictor, key(), x)
    summary = summary_for(predictor)(x)
    assert summary.size <= x.size
    np.testing.assert_allclose(
        apply(predictor, variables, summary), apply(predictor, variables, x), rtol=1e-5, atol=1e-5
    )


def test_a_pooled_site_has_a_small_summary():
    x = jnp.zeros((BATCH, 8, 8, 6))
    assert summary_for(Grid(CLASSES, cells=4))(x).shape == (BATCH, 4, 4, 6)
    assert summary_for(Cascaded(CLASSES, GlobalAverage(CLASSES)))(x).shape == (BATCH, 1, 1, 6)
    assert summary_for(Pool(CLASSES, size=16))(x).shape == (BATCH, 16)
