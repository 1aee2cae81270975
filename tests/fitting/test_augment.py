import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax import Augment
from gati_jax.fitting import cutout


def variants(image, pad, flip):
    """All pictures that may come of one: (2 pad + 1)^2 crops, mirrored or not."""
    height, width, _ = image.shape
    padded = np.zeros((height + 2 * pad, width + 2 * pad, image.shape[2]), image.dtype)
    padded[pad : pad + height, pad : pad + width] = image
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[top : top + height, left : left + width]
            yield crop
            if flip:
                yield crop[:, ::-1]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(1, False), (0, True), (2, True), (3, False)]),
    st.sampled_from([(4, 5, 1), (3, 3, 2)]),
    st.sampled_from([np.uint8, np.float32]),
)
def test_every_image_is_one_of_its_own_crops(seed, options, shape, dtype):
    pad, flip = options
    images = np.random.default_rng(seed).integers(1, 256, (6, *shape)).astype(dtype)
    out = np.asarray(Augment(pad=pad, flip=flip)(jax.random.key(seed), jnp.asarray(images)))
    assert out.dtype == dtype
    for image, augmented in zip(images, out, strict=True):
        assert any(np.array_equal(augmented, variant) for variant in variants(image, pad, flip))


def test_every_variant_occurs_and_images_vary_independently():
    image = np.arange(1, 10, dtype=np.float32).reshape(3, 3, 1)
    out = np.asarray(Augment(pad=1, flip=True)(jax.random.key(0), jnp.asarray(np.stack([image] * 1000))))
    expected = {variant.tobytes() for variant in variants(image, 1, True)}
    seen, counts = np.unique(out.reshape(1000, 9), axis=0, return_counts=True)
    assert {row.tobytes() for row in seen} == expected
    # Each of 18 variants is expected 55.6 times with a standard deviation of 7.2.
    assert counts.min() > 20
    assert counts.max() < 92


def test_the_key_decides():
    augment, images = Augment(pad=2, flip=True), jnp.arange(8 * 36.0).reshape(8, 6, 6, 1)
    one, same, other = (np.asarray(augment(jax.random.key(k), images)) for k in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_without_options_any_input_passes_unchanged():
    flat = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(Augment()(jax.random.key(0), flat), flat)


@pytest.mark.parametrize("options", [{"pad": 1}, {"flip": True}])
def test_options_need_images(options):
    with pytest.raises(gati_jax.InputError, match=r"augment: expected images\[.*\] to shift or flip, got \[2, 3\]"):
        Augment(**options)(jax.random.key(0), jnp.zeros((2, 3)))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from([(5, 7, 1), (4, 4, 3)]))
def test_a_cutout_is_one_square_that_may_hang_over_the_edge(seed, size, shape):
    images = jnp.ones((8, *shape))
    for image in np.asarray(cutout(jax.random.key(seed), images, size)):
        hole = image == 0
        assert (hole == hole[:, :, :1]).all()  # the same in every channel
        rows, columns = (np.flatnonzero(hole[:, :, 0].any(axis)) for axis in (1, 0))
        assert hole[:, :, 0].sum() == len(rows) * len(columns) > 0
        for at, n in ((rows, shape[0]), (columns, shape[1])):
            assert (np.diff(at) == 1).all()
            assert len(at) <= size
            assert len(at) == size or at[0] == 0 or at[-1] == n - 1


def test_cutouts_are_everywhere_and_none_is_asked_for_with_zero():
    images = jnp.ones((4000, 6, 6, 1))
    np.testing.assert_array_equal(cutout(jax.random.key(0), images, 0), images)
    covered = np.asarray(cutout(jax.random.key(0), images, 1) == 0).mean(0)[:, :, 0]
    # One pixel of 36: 0.0278, with a standard deviation of 0.0026.
    assert 0.017 < covered.min() < covered.max() < 0.039
