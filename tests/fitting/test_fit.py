"""A whole fit: determinism, resumption after a real kill, what is refused, and which rows it knows."""

import dataclasses
import importlib
import logging
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import InputError, data
from gati_jax.fitting.fit import check_splits
from tests.fitting import tiny


def assert_equal_trees(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(one) == jax.tree.structure(other)


def assert_same_fit(one, other):
    assert_equal_trees([c.params for c in one], [c.params for c in other])
    assert_equal_trees(one.fold_selectors, other.fold_selectors)
    np.testing.assert_array_equal(one.select_fold, other.select_fold)


def test_predictors_learn_the_bases_answers(fitted):
    table = gati_jax.replay(tiny.chain(), fitted, tiny.images()[1])
    most_frequent = np.bincount(table.answers).max() / len(table)
    assert (table.agrees.mean(1) > most_frequent + 0.1).all()


def test_a_fit_is_deterministic_and_leaves_the_base_as_it_is(fitted):
    """The second base's parameters are on the device."""
    base = tiny.chain()
    before = [np.array(p) for p in base.params]
    base = gati_jax.Chain(base.blocks, base.classifier, [jnp.asarray(p) for p in before], base.input_spec)
    assert_same_fit(fitted, tiny.fit(base=base))
    assert [p.tobytes() for p in before] == [np.asarray(p).tobytes() for p in base.params]


def checkpointed_step(folder):
    """The newest step that has been saved whole."""
    return max((int(path.name) for path in folder.glob("*/*") if path.name.isdigit()), default=0)


def kill_midway(folder, after):
    """Fit in another process, and kill that once ``after`` steps are saved."""
    process = subprocess.Popen([sys.executable, tiny.__file__, str(folder)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while checkpointed_step(folder) < after and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors


def test_a_killed_fit_resumes_exactly(fitted, tmp_path, caplog):
    total = tiny.CONFIG.epochs * (tiny.ROWS // tiny.CONFIG.batch)
    kill_midway(tmp_path, after=3)
    reached = checkpointed_step(tmp_path)
    assert 3 <= reached < total - 1
    with caplog.at_level(logging.INFO):
        resumed = tiny.fit(checkpoint=tmp_path)
    assert f"fitting 2 predictors: resumed at step {reached} of {total}" in caplog.text
    assert_same_fit(fitted, resumed)


class SeenError(Exception):
    """Ends a fit before its first step."""


def identity_of(monkeypatch, **options):
    """The identity under which a fit keeps its checkpoints."""
    seen = []

    def look(*_, identity, **__):
        seen.append(identity)
        raise SeenError

    module = vars(importlib.import_module("gati_jax.fitting.predictors"))
    monkeypatch.setitem(module, "run_loop", look)
    monkeypatch.setitem(module, "_init", lambda *_, **__: ({}, {}))  # initial values would take seconds to compile
    with pytest.raises(SeenError):
        tiny.fit(**options)
    return seen[0]


def nudged():
    base = tiny.chain()
    base.params[2][0, 0] = np.nextafter(base.params[2][0, 0], np.float32(9))
    return base


OTHER_FITS = {
    "learning rate": {"config": dataclasses.replace(tiny.CONFIG, learning_rate=0.01)},
    "epochs": {"config": dataclasses.replace(tiny.CONFIG, epochs=7)},
    "augmentation": {"config": dataclasses.replace(tiny.CONFIG, augment=gati_jax.Augment(flip=True))},
    "sites": {"sites": (2,)},
    "a parameter's last bit": {"base": nudged()},
    "blocks": {"base": tiny.chain(tiny.relu)},
}


def test_another_fit_does_not_resume_from_the_checkpoint(monkeypatch):
    mine = identity_of(monkeypatch)
    assert identity_of(monkeypatch) == mine
    others = {name: identity_of(monkeypatch, **options) for name, options in OTHER_FITS.items()}
    assert [name for name, identity in others.items() if identity == mine] == []
    # The configuration's part of the identity: more time makes no other fit, and must find the checkpoints of less.
    assert str(dataclasses.replace(tiny.CONFIG, minutes=9.0)) == str(tiny.CONFIG)


def test_one_step_is_a_fit():
    rows, _ = tiny.images()
    candidates = tiny.fit(sites=(1,), config=gati_jax.FitConfig(epochs=1, batch=len(rows)))
    assert [c.name for c in candidates] == ["fc@1"]


def test_candidates_are_named_by_head_and_site_and_know_their_epochs(fitted):
    assert [(c.name, c.site) for c in fitted] == [("fc@1", 1), ("fc@2", 2)]
    assert len(fitted) == 2
    assert fitted.epochs == fitted.take(["fc@1"]).epochs == tiny.CONFIG.epochs


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ((3,), r"heads: expected sites 0 to 2 for fc, got \[3\]"),
        ((-1,), r"sites\.0: expected a number greater than or equal to 0, got -1"),
        ((1, 7), r"heads: expected sites 0 to 2 for fc, got \[7\]"),
        ((), "heads: expected at least one at some site"),
        ((1, 1), "heads: expected distinct names"),
    ],
    ids=str,
)
def test_sites_that_the_chain_does_not_have_or_has_once_are_refused(sites, message):
    with pytest.raises(InputError, match=message):
        tiny.fit(sites=sites)


def test_a_chain_of_one_block_has_no_site_by_default():
    base = tiny.chain()
    short = gati_jax.Chain(base.blocks[:1], base.classifier, (base.params[0], np.eye(10, 4)), base.input_spec)
    with pytest.raises(InputError, match="a chain of 1 blocks has by default sites 1 to N - 1"):
        gati_jax.fit(short, tiny.images()[0], select=tiny.images()[1])


def refused(monkeypatch, message, chain, rows, select):
    """Both ways to fit check the splits before anything is trained."""
    for room, fit in (("fit", gati_jax.fit), ("freeze", gati_jax.fit_freeze)):
        module = vars(importlib.import_module(f"gati_jax.fitting.{room}"))
        monkeypatch.setitem(module, "parts_of", None)  # comes next, and would raise a TypeError
        with pytest.raises(InputError, match=message):
            fit(chain, rows, select=select, progress=False)


def of_pixels():
    """The tiny chain behind 2x2 images of three channels."""
    base = tiny.chain()
    blocks = (lambda params, x: jnp.tanh(x.reshape(len(x), -1) @ params), *base.blocks[1:])
    spec = jax.ShapeDtypeStruct((2, 2, 3), np.float32)
    normalization = gati_jax.Normalization(mean=(0.5,) * 3, std=(0.25,) * 3)
    return gati_jax.Chain(blocks, base.classifier, base.params, spec, normalization)


def pixels():
    return np.random.default_rng(0).integers(0, 256, (90, 2, 2, 3)).astype(np.uint8)


def test_splits_come_back_with_their_digests():
    rows, select = tiny.images()
    checked = check_splits(tiny.chain(), rows, select)
    np.testing.assert_array_equal(checked.images, rows)
    np.testing.assert_array_equal(checked.select, select)
    np.testing.assert_array_equal(checked.fit_rows, data.row_digests(rows))
    np.testing.assert_array_equal(checked.select_rows, data.row_digests(select))


def test_splits_of_two_dtypes_are_refused_though_the_chain_takes_either(monkeypatch):
    """Digests are of bytes: the same image would not be recognised."""
    chain, images = of_pixels(), pixels()
    prepared = np.asarray(chain.prepare(images))
    for select in (images[60:], prepared[60:]):
        assert check_splits(chain, select[:20], select[20:]).images.dtype == select.dtype
    message = "select: expected uint8, as images, got float32"
    refused(monkeypatch, message, chain, images[:60], prepared[60:])
    refused(monkeypatch, message, chain, images[:60], prepared[:60])  # the same images, too
    refused(monkeypatch, "select: expected float32, as images, got uint8", chain, prepared[:60], images[60:])


def test_shared_rows_are_refused_whichever_split_is_the_smaller(monkeypatch):
    rows, select = tiny.images()
    chain = tiny.chain()
    refused(monkeypatch, "select and fit disjoint, got 5 rows", chain, rows, np.concatenate([select[:50], rows[-5:]]))
    many = np.concatenate([rows, select + 9])  # the select split may be the larger one
    fit_too = np.concatenate([rows[:200] + 5, many[-5:]])
    refused(monkeypatch, "fit and select disjoint, got 5 rows", chain, fit_too, many)


def test_the_odd_duplicate_of_real_data_passes():
    rows, select = tiny.images()
    many = np.concatenate([select, select + 1, select + 2])  # 180 rows: one is less than a hundredth
    many[7] = rows[11]
    assert len(check_splits(tiny.chain(), rows, many).select_rows) == 180
    many[8] = rows[12]
    with pytest.raises(InputError, match="disjoint, got 2 rows"):
        check_splits(tiny.chain(), rows, many)


def test_inputs_that_the_chain_does_not_take_are_refused(monkeypatch):
    rows, select = tiny.images()
    chain = tiny.chain()
    refused(monkeypatch, r"images: expected shape \[batch, 12\], got \[256, 11\]", chain, rows[:, :11], select)
    refused(monkeypatch, "select: expected float32, got float64", chain, rows, select.astype(np.float64))
    refused(monkeypatch, "select: expected finite values", chain, rows, np.full_like(select, np.nan))


def test_too_few_rows_are_refused():
    rows, select = tiny.images()
    options = {"heads": [tiny.head(1)], "config": tiny.CONFIG, "progress": False}
    with pytest.raises(InputError, match="expected at least one batch of 32 rows, got 31"):
        gati_jax.fit(tiny.chain(), rows[:31], select=select, **options)
    with pytest.raises(InputError, match="at least one distinct row for each of 5 folds, got 1"):
        gati_jax.fit(tiny.chain(), rows, select=np.repeat(select[:1], 60, 0), **options)


def test_a_fit_of_pixels_is_replayed_on_pixels(fitted):
    """Rows of another dtype are refused, for they could not be told apart."""
    with pytest.raises(InputError, match="float16"):
        gati_jax.replay(tiny.chain(), fitted, tiny.images()[1].astype(np.float16))
    base, images = of_pixels(), pixels()
    config = dataclasses.replace(tiny.CONFIG, epochs=1)
    of_bytes = gati_jax.fit(base, images[:60], select=images[60:], heads=[tiny.head(1)], config=config, progress=False)
    with pytest.raises(InputError, match="images: expected uint8, as in the fit, got float32"):
        gati_jax.replay(base, of_bytes, np.asarray(base.prepare(images[60:])))


def test_part_of_a_fit_knows_the_same_rows(fitted):
    part = fitted.take(["fc@2"])
    assert [c.name for c in part] == ["fc@2"]
    rows, select = tiny.images()
    whole, alone = (gati_jax.replay(tiny.chain(), c, select) for c in (fitted, part))
    np.testing.assert_array_equal(whole.take(["fc@2"]).scores, alone.scores)
    with pytest.raises(InputError, match="images and fit"):
        gati_jax.replay(tiny.chain(), part, rows)


def test_a_fit_that_diverges_says_so():
    config = dataclasses.replace(tiny.CONFIG, optimizer="sgd", learning_rate=1e30, epochs=2)
    with pytest.raises(InputError, match="fc@1 diverged"):
        tiny.fit(sites=(1,), config=config)


@pytest.mark.parametrize("rate", [0.0, -1.0, np.inf, np.nan])
def test_learning_rates_are_positive_numbers(rate):
    with pytest.raises(InputError, match="learning_rate: expected a "):
        gati_jax.FitConfig(learning_rate=rate)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes_are_positive_numbers(minutes):
    with pytest.raises(InputError, match="minutes: expected a "):
        gati_jax.FitConfig(minutes=minutes)


def test_one_fold_is_refused():
    # The selector without the only fold would learn from no row at all.
    with pytest.raises(InputError, match="folds: expected"):
        gati_jax.FitConfig(folds=1)
