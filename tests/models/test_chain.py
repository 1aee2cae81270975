"""Chains of small dense blocks, whose every activation NumPy computes too."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gati_jax import models
from gati_jax.errors import InputError
from gati_jax.models import Chain, Normalization, ResNet, check_images

SIZES = (5, 7, 3, 6, 4, 8)  # what enters each of five blocks, and what leaves the last
NORMALIZATION = Normalization(mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.7))


def block(params, x):
    return jnp.tanh(x @ params["w"])


def classifier(params, x):
    return x @ params


@functools.cache
def build(seed=0, normalization=None):
    rng = np.random.default_rng(seed)
    pairs = itertools.pairwise(SIZES)
    params = [{"w": jnp.asarray(rng.normal(size=pair), jnp.float32)} for pair in pairs]
    last = jnp.asarray(rng.normal(size=(SIZES[-1], 3)), jnp.float32)
    if normalization is not None:
        normalization = Normalization(mean=normalization.mean[:1], std=normalization.std[:1])  # one for all features
    return Chain((block,) * 5, classifier, [*params, last], jax.ShapeDtypeStruct((5,), jnp.float32), normalization)


def inputs(batch=4):
    return np.random.default_rng(9).normal(size=(batch, SIZES[0])).astype(np.float32)


def numpy_sites(chain, x):
    """What enters each block, what leaves the last, and the logits."""
    sites = [np.asarray(x, np.float64)]
    for params in chain.params[:-1]:
        sites.append(np.tanh(sites[-1] @ np.asarray(params["w"], np.float64)))
    return sites, sites[-1] @ np.asarray(chain.params[-1], np.float64)


@pytest.mark.parametrize(("start", "stop"), list(itertools.combinations_with_replacement(range(6), 2)))
def test_span_equals_numpy(start, stop):
    sites, _ = numpy_sites(build(), inputs())
    x = jnp.asarray(sites[start], jnp.float32)
    found = build().span(x, start, stop)
    np.testing.assert_allclose(found, sites[stop], rtol=1e-5, atol=1e-6)
    for middle in range(start, stop):
        assert jnp.array_equal(build().span(build().span(x, start, middle), middle, stop), found)


def test_activations_are_the_sites_of_numpy_and_of_spans():
    chain, x = build(), jnp.asarray(inputs())
    sites, logits = chain.activations(x)
    expected, expected_logits = numpy_sites(chain, inputs())
    assert len(sites) == len(chain) == 5
    for k, site in enumerate(sites):
        np.testing.assert_allclose(site, expected[k], rtol=1e-5, atol=1e-6)
        assert jnp.array_equal(site, chain.span(x, 0, k))
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-5, atol=1e-5)
    assert jnp.array_equal(logits, chain(x))
    assert jnp.array_equal(logits, chain.classify(chain.span(x, 0, 5)))
    assert [(spec.shape, spec.dtype) for spec in chain.site_specs] == [((n,), np.float32) for n in SIZES[:-1]]
    assert chain.classes == 3


def test_pytree_round_trip_keeps_everything():
    chain = build(normalization=NORMALIZATION)
    leaves, structure = jax.tree.flatten(chain)
    assert len(leaves) == 6
    assert all(a is b["w"] for a, b in zip(leaves[:-1], chain.params[:-1], strict=True))
    rebuilt = jax.tree.unflatten(structure, leaves)
    for name in ("blocks", "classifier", "input_spec", "normalization", "network"):
        assert getattr(rebuilt, name) == getattr(chain, name)
    assert jax.tree.structure(rebuilt) == structure
    assert jnp.array_equal(rebuilt(jnp.asarray(inputs())), chain(jnp.asarray(inputs())))
    assert jax.tree.leaves(jax.tree.unflatten(structure, range(6))) == list(range(6))


def test_structures_are_equal_if_all_but_the_parameters_is():
    one, other = jax.tree.structure(build(0)), jax.tree.structure(build(1))
    assert one == other
    assert hash(one) == hash(other)
    assert one != jax.tree.structure(build(normalization=NORMALIZATION))


def test_equal_configurations_make_equal_structures():
    def structure(width):
        network = ResNet(stages=(1, 1), widths=(2, width), input_shape=(8, 8, 3), classes=3)
        variables = jax.eval_shape(lambda: models.init(network, jax.random.key(0)))
        return jax.tree.structure(models.to_chain(network, jax.eval_shape(models.fold, variables)))

    assert structure(4) == structure(4)
    assert hash(structure(4)) == hash(structure(4))
    assert structure(4) != structure(6)


def test_new_parameters_do_not_trace_again():
    traces = []

    @jax.jit
    def logits(chain, x):
        traces.append(1)
        return chain(x)

    for seed in (0, 1):
        np.testing.assert_allclose(
            logits(build(seed), inputs()), numpy_sites(build(seed), inputs())[1], rtol=1e-4, atol=1e-5
        )
    assert len(traces) == 1
    logits(build(0, NORMALIZATION), inputs())
    assert len(traces) == 2


@pytest.mark.parametrize(("blocks", "count"), [(5, 0), (5, 4), (5, 5), (5, 7), (0, 1)])
def test_wrong_number_of_params_is_refused(blocks, count):
    spec = jax.ShapeDtypeStruct((5,), jnp.float32)
    with pytest.raises(InputError, match=f"params: expected one entry for each of {blocks} blocks and .* got {count}"):
        Chain((block,) * blocks, classifier, [jnp.zeros(1)] * count, spec)


@pytest.mark.parametrize("shape", [(4, 3, 3), (2, 4, 5, 3)], ids=["one", "batch"])
@pytest.mark.parametrize("scale", [1 / 255, 1 / 16])
def test_normalization_equals_numpy(shape, scale):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = dataclasses.replace(NORMALIZATION, scale=scale)(jnp.asarray(pixels))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, (pixels * scale - [0.1, 0.5, 0.9]) / [0.2, 0.3, 0.7], rtol=1e-5, atol=1e-6)
    assert NORMALIZATION.scale == 1 / 255


@pytest.mark.parametrize(
    ("mean", "std"), [((0.0,), (0.0,)), ((0.0,), (-1.0,)), ((0.0, 0.0), (1.0,)), ((), ())], ids=str
)
def test_normalization_that_cannot_work_is_refused(mean, std):
    with pytest.raises(InputError, match=r"^(normalization: expected as many|std\.0: expected a number greater)"):
        Normalization(mean=mean, std=std)


def pictures(normalization: Normalization | None = NORMALIZATION, dtype=jnp.float32):
    spec = jax.ShapeDtypeStruct((4, 5, 3), dtype)
    return Chain((block,), classifier, (jnp.zeros(1), jnp.zeros(1)), spec, normalization)


def test_prepare_normalises_pixels_and_passes_prepared_inputs():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    prepared = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5, 3)), jnp.float32)
    assert jnp.array_equal(pictures().prepare(jnp.asarray(pixels)), NORMALIZATION(jnp.asarray(pixels)))
    assert pictures().prepare(prepared) is prepared
    assert pictures(normalization=None).prepare(prepared) is prepared


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("batch", [(), (0,), (1,), (3,)], ids=str)
def test_good_images_come_back_as_they_are(dtype, batch):
    images = np.ones((*batch, 4, 5, 3), dtype)
    assert check_images(pictures(), images, batched=bool(batch)) is images


BATCHES = [(4, 5, 3), (2, 4, 5), (2, 5, 4, 3), (2, 2, 4, 5, 3), (2, 4, 5, 1), (), (0,)]
SINGLE = [(1, 4, 5, 3), (5, 4, 3), (4, 5), ()]


@pytest.mark.parametrize(("batched", "shape"), [*((True, s) for s in BATCHES), *((False, s) for s in SINGLE)], ids=str)
def test_images_of_another_shape_are_refused(batched, shape):
    expected, got = "batch, 4, 5, 3" if batched else "4, 5, 3", ", ".join(map(str, shape))
    with pytest.raises(InputError, match=rf"photos: expected shape \[{expected}\], got \[{got}\]"):
        check_images(pictures(), np.zeros(shape, np.float32), batched=batched, argument="photos")


SCALARS = Chain((block,), classifier, (0, 0), jax.ShapeDtypeStruct((), jnp.float32))
PIXELS, OTHERS = np.zeros((2, 4, 5, 3), np.uint8), (np.float64, np.float16, np.int32, np.int8, np.bool_, np.complex64)


@pytest.mark.parametrize(
    ("chain", "images", "message"),
    [
        (SCALARS, np.float32(1), r"shape \[batch, \], got \[\]"),
        (pictures(), [[[1.0]], [[1.0, 2.0]]], "an array, got rows of different lengths"),
        (pictures(normalization=None), PIXELS, "float32, got uint8"),
        *((pictures(), PIXELS.astype(t), f"uint8 pixels or float32, got {np.dtype(t)}") for t in (*OTHERS, object)),
    ],
)
def test_other_images_are_refused(chain, images, message):
    with pytest.raises(InputError, match=f"^images: expected {message}"):
        check_images(chain, images)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["single", "half", "bfloat16"])
def test_one_value_that_is_not_finite_is_refused(value, dtype):
    images = np.zeros((2, 4, 5, 3), dtype)
    images[1, 3, 4, 2] = value
    for batched, array in ((True, images), (False, images[1])):
        with pytest.raises(InputError, match="images: expected finite values, got NaN or infinity"):
            check_images(pictures(dtype=dtype), array, batched=batched)
