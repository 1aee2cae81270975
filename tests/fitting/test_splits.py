"""The one check of the fit and the select split, behind both ways to fit."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import InputError, data
from gati_jax.fitting.fit import check_splits

FITS = ["fit", "fit_freeze"]


def refused(monkeypatch, name, message, chain, rows, select):
    """Both refuse before anything is trained."""
    for room in ("candidates", "freeze"):
        module = vars(importlib.import_module(f"gati_jax.fitting.{room}"))
        monkeypatch.setitem(module, "parts_of", None)  # comes next, and would raise a TypeError
    with pytest.raises(InputError, match=message):
        getattr(gati_jax, name)(chain, rows, select=select, progress=False)


def of_pixels(tiny):
    """The tiny chain behind 2x2 images of three channels."""
    base = tiny.chain()
    blocks = (lambda params, x: jnp.tanh(x.reshape(len(x), -1) @ params), *base.blocks[1:])
    spec = jax.ShapeDtypeStruct((2, 2, 3), np.float32)
    return gati_jax.Chain(
        blocks, base.classifier, base.params, spec, gati_jax.Normalization(mean=(0.5,) * 3, std=(0.25,) * 3)
    )


def test_splits_come_back_with_their_digests(tiny):
    rows, select = tiny.images()
    checked = check_splits(tiny.chain(), rows, select)
    np.testing.assert_array_equal(checked.images, rows)
    np.testing.assert_array_equal(checked.select, select)
    np.testing.assert_array_equal(checked.fit_rows, data.row_digests(rows))
    np.testing.assert_array_equal(checked.select_rows, data.row_digests(select))


@pytest.mark.parametrize("name", FITS)
def test_splits_of_two_dtypes_are_refused_though_the_chain_takes_either(tiny, monkeypatch, name):
    """Digests are of bytes: the same image would not be recognised."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 2, 2, 3)).astype(np.uint8)
    chain = of_pixels(tiny)
    prepared = np.asarray(chain.prepare(pixels))
    for select in (pixels[60:], prepared[60:]):
        assert check_splits(chain, select[:20], select[20:]).images.dtype == select.dtype
    message = "select: expected uint8, as images, got float32"
    refused(monkeypatch, name, message, chain, pixels[:60], prepared[60:])
    refused(monkeypatch, name, message, chain, pixels[:60], prepared[:60])  # the same images, too
    refused(monkeypatch, name, "select: expected float32, as images, got uint8", chain, prepared[:60], pixels[60:])


@pytest.mark.parametrize("name", FITS)
def test_shared_rows_are_refused_whichever_split_is_the_smaller(tiny, monkeypatch, name):
    rows, select = tiny.images()
    chain = tiny.chain()
    select_too = np.concatenate([select, rows[-5:]])
    refused(monkeypatch, name, "select and fit disjoint, got 5 rows", chain, rows, select_too)
    many = np.concatenate([rows, select + 9])  # the select split may be the larger one
    fit_too = np.concatenate([rows[:200] + 5, many[-5:]])
    refused(monkeypatch, name, "fit and select disjoint, got 5 rows", chain, fit_too, many)


def test_the_odd_duplicate_of_real_data_passes(tiny):
    rows, select = tiny.images()
    many = np.concatenate([select, select + 1, select + 2])  # 180 rows: one is less than a hundredth
    many[7] = rows[11]
    assert len(check_splits(tiny.chain(), rows, many).select_rows) == 180
    many[8] = rows[12]
    with pytest.raises(InputError, match="disjoint, got 2 rows"):
        check_splits(tiny.chain(), rows, many)
