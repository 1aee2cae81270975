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
from gati_jax import InputError
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


def test_candidates_are_named_by_head_and_site_and_know_their_epochs(fitted):
    assert [(c.name, c.site) for c in fitted] == [("fc@1", 1), ("fc@2", 2)]
    assert len(fitted) == 2
    assert fitted.epochs == fitted.take(["fc@1"]).epochs == tiny.CONFIG.epochs
    one_step = tiny.fit(sites=(1,), config=gati_jax.FitConfig(epochs=1, batch=tiny.ROWS))
    assert [c.name for c in one_step] == ["fc@1"]


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


def of_pixels():
    """The tiny chain behind 2x2 images of three channels."""
    base = tiny.chain()
    blocks = (lambda params, x: jnp.tanh(x.reshape(len(x), -1) @ params), *base.blocks[1:])
    spec = jax.ShapeDtypeStruct((2, 2, 3), np.float32)
    normalization = gati_jax.Normalization(mean=(0.5,) * 3, std=(0.25,) * 3)
    return gati_jax.Chain(blocks, base.classifier, base.params, spec, normalization)


ROWS, SELECT = tiny.images()
PIXELS = np.random.default_rng(0).integers(0, 256, (90, 2, 2, 3)).astype(np.uint8)
PREPARED = np.asarray(of_pixels().prepare(PIXELS))
MANY = np.concatenate([ROWS, SELECT + 9])  # the select split may be the larger one
REFUSED = [
    # Digests are of bytes: the same image would not be recognised.
    ("select: expected uint8, as images, got float32", of_pixels, PIXELS[:60], PREPARED[60:]),
    ("select: expected uint8, as images, got float32", of_pixels, PIXELS[:60], PREPARED[:60]),
    ("select: expected float32, as images, got uint8", of_pixels, PREPARED[:60], PIXELS[60:]),
    ("select and fit disjoint, got 5 rows", tiny.chain, ROWS, np.concatenate([SELECT[:50], ROWS[-5:]])),
    ("fit and select disjoint, got 5 rows", tiny.chain, np.concatenate([ROWS[:200] + 5, MANY[-5:]]), MANY),
    (r"images: expected shape \[batch, 12\], got \[256, 11\]", tiny.chain, ROWS[:, :11], SELECT),
    ("select: expected float32, got float64", tiny.chain, ROWS, SELECT.astype(np.float64)),
    ("select: expected finite values", tiny.chain, ROWS, np.full_like(SELECT, np.nan)),
]


@pytest.mark.parametrize(("message", "chain", "rows", "select"), REFUSED)
def test_both_ways_to_fit_refuse_splits_before_anything_is_trained(monkeypatch, message, chain, rows, select):
    for room, fit in (("fit", gati_jax.fit), ("freeze", gati_jax.fit_freeze)):
        module = vars(importlib.import_module(f"gati_jax.fitting.{room}"))
        monkeypatch.setitem(module, "parts_of", None)  # comes next, and would raise a TypeError
        with pytest.raises(InputError, match=message):
            fit(chain(), rows, select=select, progress=False)


def test_the_odd_duplicate_of_real_data_passes():
    many = np.concatenate([SELECT, SELECT + 1, SELECT + 2])  # 180 rows: one is less than a hundredth
    many[7] = ROWS[11]
    assert len(check_splits(tiny.chain(), ROWS, many).select_rows) == 180
    many[8] = ROWS[12]
    with pytest.raises(InputError, match="disjoint, got 2 rows"):
        check_splits(tiny.chain(), ROWS, many)
    for pixels in (PIXELS, PREPARED):  # the chain takes either
        assert check_splits(of_pixels(), pixels[:60], pixels[60:]).images.dtype == pixels.dtype


def test_too_few_rows_are_refused():
    options = {"heads": [tiny.head(1)], "config": tiny.CONFIG, "progress": False}
    with pytest.raises(InputError, match="expected at least one batch of 32 rows, got 31"):
        gati_jax.fit(tiny.chain(), ROWS[:31], select=SELECT, **options)
    with pytest.raises(InputError, match="at least one distinct row for each of 5 folds, got 1"):
        gati_jax.fit(tiny.chain(), ROWS, select=np.repeat(SELECT[:1], 60, 0), **options)


def test_a_fit_of_pixels_is_replayed_on_pixels(fitted):
    """Rows of another dtype are refused, for they could not be told apart."""
    with pytest.raises(InputError, match="float16"):
        gati_jax.replay(tiny.chain(), fitted, SELECT.astype(np.float16))
    base, config = of_pixels(), dataclasses.replace(tiny.CONFIG, epochs=1)
    of_bytes = gati_jax.fit(base, PIXELS[:60], select=PIXELS[60:], heads=[tiny.head(1)], config=config, progress=False)
    with pytest.raises(InputError, match="images: expected uint8, as in the fit, got float32"):
        gati_jax.replay(base, of_bytes, PREPARED[60:])


def test_part_of_a_fit_knows_the_same_rows(fitted):
    part = fitted.take(["fc@2"])
    assert [c.name for c in part] == ["fc@2"]
    whole, alone = (gati_jax.replay(tiny.chain(), c, SELECT) for c in (fitted, part))
    np.testing.assert_array_equal(whole.take(["fc@2"]).scores, alone.scores)
    with pytest.raises(InputError, match="images and fit"):
        gati_jax.replay(tiny.chain(), part, ROWS)


def test_a_fit_that_diverges_says_so():
    config = dataclasses.replace(tiny.CONFIG, optimizer="sgd", learning_rate=1e30, epochs=2)
    with pytest.raises(InputError, match="fc@1 diverged"):
        tiny.fit(sites=(1,), config=config)


NOT_POSITIVE = (0.0, -1.0, np.inf, np.nan)


@pytest.mark.parametrize(
    ("option", "value"),
    # The selector without the only fold would learn from no row at all.
    [*(("learning_rate", v) for v in NOT_POSITIVE), *(("minutes", v) for v in NOT_POSITIVE), ("folds", 1)],
)
def test_options_that_cannot_work_are_refused(option, value):
    with pytest.raises(InputError, match=f"{option}: expected a "):
        gati_jax.FitConfig(**{option: value})
