"""Fitting all heads in one pass, against one head at a time in plain NumPy; resumption after a real kill."""

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
from gati_jax.data import batches


def assert_equal_trees(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(one) == jax.tree.structure(other)


def initial_values(tiny, site, width, heads):
    """The first head's, drawn from the first of the seed's keys."""
    key = jax.random.split(jax.random.key(tiny.CONFIG.seed), heads)[site - 1]
    module = tiny.head(site).predictor(tiny.CLASSES)
    return jax.tree.map(lambda v: np.asarray(v, np.float64), module.init(key, jnp.eye(width))["params"])


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gradients(p, x, base_logits, alpha, temperature):
    """Backpropagation by hand through Linear, ReLU, Linear and the distillation loss."""
    n, answers = len(x), np.eye(base_logits.shape[-1])[base_logits.argmax(-1)]
    before = x @ p["hidden"]["kernel"] + p["hidden"]["bias"]
    hidden = np.maximum(before, 0)
    z = hidden @ p["out"]["kernel"] + p["out"]["bias"]
    soft = temperature * (softmax(z / temperature) - softmax(base_logits / temperature))
    dz = (alpha * soft + (1 - alpha) * (softmax(z) - answers)) / n
    dh = dz @ p["out"]["kernel"].T * (before > 0)
    return {
        "hidden": {"kernel": x.T @ dh, "bias": dh.sum(0)},
        "out": {"kernel": hidden.T @ dz, "bias": dz.sum(0)},
    }


def learning_rates(config, total):
    """A linear rise over a tenth of the steps, then half a cosine down to zero."""
    warm = max(1, total // 10)
    for t in range(total):
        yield config.learning_rate * (t / warm if t < warm else (1 + np.cos(np.pi * (t - warm) / (total - warm))) / 2)


def sgd(params, grads, state, rate, t, config):
    """Momentum 0.9, and weight decay as L2."""
    del t
    grads = jax.tree.map(lambda g, p: g + config.weight_decay * p, grads, params)
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, state[0], grads)
    return jax.tree.map(lambda p, v: p - rate * v, params, velocity), (velocity, None)


def adamw(params, grads, state, rate, t, config):
    """Adam with decoupled weight decay; t counts from 1."""
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state[0], grads)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, state[1], grads)

    def update(p, m, v):
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        return p - rate * (step + config.weight_decay * p)

    return jax.tree.map(update, params, first, second), (first, second)


def run_base(base, x):
    """The activations at sites 0 .. 3, the last of which the classifier takes."""
    sites = [x.astype(np.float64)]
    for weights in base[:-1]:
        sites.append(np.tanh(sites[-1] @ weights))
    return sites


def train_alone(tiny, site, config, heads):
    """Train one head by itself: NumPy, float64, one plain loop. Returns its values, before and after, standardised."""
    rows, _ = tiny.images()
    base = [np.asarray(p, np.float64) for p in tiny.chain().params]
    width = base[site - 1].shape[1]
    features = run_base(base, rows)[site]  # the tiny fit split is small enough that all of it is standardised by
    mean, std = features.mean(0), np.sqrt(features.var(0) + 0.01 * features.var(0).mean())
    params = initial = initial_values(tiny, site, width, heads)
    zeros = jax.tree.map(np.zeros_like, params)
    state, t = (zeros, zeros), 0
    rates = list(learning_rates(config, config.epochs * (len(rows) // config.batch)))
    for epoch in range(config.epochs):
        for index in batches(len(rows), config.batch, seed=(config.seed, epoch)):
            sites = run_base(base, rows[index])
            x = (sites[site] - mean) / std
            grads = gradients(params, x, sites[-1] @ base[-1], config.alpha, config.temperature)
            update = sgd if config.optimizer == "sgd" else adamw
            params, state = update(params, grads, state, rates[t], t + 1, config)
            t += 1
    assert t == len(rates)

    def fold(p):
        kernel = p["hidden"]["kernel"] / std[:, None]
        return {**p, "hidden": {"kernel": kernel, "bias": p["hidden"]["bias"] - mean @ kernel}}

    return fold(params), fold(initial)


def assert_trained_alike(found, alone, initial):
    """Equal up to a thousandth of how far training has moved."""
    for path, value in jax.tree.leaves_with_path(alone):
        got, begin = found, initial
        for key in path:
            got, begin = got[key.key], begin[key.key]
        moved = np.abs(value - begin).max()
        assert moved > 1e-3
        np.testing.assert_allclose(got, value, rtol=0, atol=2e-3 * moved)


@pytest.mark.parametrize(("site", "width"), [(1, 10), (2, 9)])
def test_two_heads_in_one_pass_are_each_as_if_alone(tiny, fitted, site, width):
    found = fitted.items[site - 1].params["predictor"]["params"]
    assert found["hidden"]["kernel"].shape[0] == width
    assert_trained_alike(found, *train_alone(tiny, site, tiny.CONFIG, heads=2))


def test_sgd_is_the_papers(tiny):
    config = dataclasses.replace(
        tiny.CONFIG, optimizer="sgd", learning_rate=0.05, weight_decay=5e-3, alpha=0.3, temperature=3.0, epochs=3
    )
    found = tiny.fit(sites=(1,), config=config).items[0].params["predictor"]["params"]
    assert_trained_alike(found, *train_alone(tiny, 1, config, heads=1))


def test_predictors_learn_the_bases_answers(tiny, fitted):
    table = gati_jax.replay(tiny.chain(), fitted, tiny.images()[1])
    most_frequent = np.bincount(table.answers).max() / len(table)
    assert (table.agrees.mean(1) > most_frequent + 0.1).all()


@pytest.fixture(scope="module")
def again(tiny):
    """The same fit of a base whose parameters are on the device, and these parameters as they were before."""
    base = tiny.chain()
    before = [np.array(p) for p in base.params]
    base = gati_jax.Chain(base.blocks, base.classifier, [jnp.asarray(p) for p in before], base.input_spec)
    return before, base, tiny.fit(base=base)


def test_the_base_stays_frozen(again):
    before, base, _ = again
    assert [p.tobytes() for p in before] == [np.asarray(p).tobytes() for p in base.params]


def test_a_fit_is_deterministic(fitted, again):
    _, _, other = again
    assert_equal_trees([c.params for c in fitted], [c.params for c in other])
    assert_equal_trees(fitted.fold_selectors, other.fold_selectors)
    np.testing.assert_array_equal(fitted.select_fold, other.select_fold)


def checkpointed_step(folder):
    """The newest step that has been saved whole."""
    return max((int(path.name) for path in folder.glob("*/*") if path.name.isdigit()), default=0)


def kill_midway(tiny, folder, after):
    """Fit in another process, and kill that once ``after`` steps are saved."""
    process = subprocess.Popen([sys.executable, tiny.__file__, str(folder)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while checkpointed_step(folder) < after and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors


def test_a_killed_fit_resumes_exactly(tiny, fitted, tmp_path, caplog):
    total = tiny.CONFIG.epochs * (tiny.ROWS // tiny.CONFIG.batch)
    kill_midway(tiny, tmp_path, after=3)
    reached = checkpointed_step(tmp_path)
    assert 3 <= reached < total - 1
    with caplog.at_level(logging.INFO):
        resumed = tiny.fit(checkpoint=tmp_path)
    assert f"fitting 2 predictors: resumed at step {reached} of {total}" in caplog.text
    assert_equal_trees([c.params for c in fitted], [c.params for c in resumed])
    assert_equal_trees(fitted.fold_selectors, resumed.fold_selectors)


class SeenError(Exception):
    """Ends a fit before its first step."""


def identity_of(monkeypatch, tiny, **options):
    """The identity under which a fit keeps its checkpoints."""
    seen = []

    def look(*_, identity, **__):
        seen.append(identity)
        raise SeenError

    module = vars(importlib.import_module("gati_jax.fitting.predictors"))
    monkeypatch.setitem(module, "run_loop", look)
    monkeypatch.setitem(module, "_init", lambda *_: ({}, {}))  # initial values would take seconds to compile
    with pytest.raises(SeenError):
        tiny.fit(**options)
    return seen[0]


def nudged(tiny):
    base = tiny.chain()
    base.params[2][0, 0] = np.nextafter(base.params[2][0, 0], np.float32(9))
    return base


@pytest.mark.parametrize(
    "change",
    [
        lambda tiny: {"config": dataclasses.replace(tiny.CONFIG, learning_rate=0.01)},
        lambda tiny: {"config": dataclasses.replace(tiny.CONFIG, epochs=7)},
        lambda tiny: {"config": dataclasses.replace(tiny.CONFIG, augment=gati_jax.Augment(flip=True))},
        lambda _: {"sites": (2,)},
        lambda tiny: {"base": nudged(tiny)},
        lambda tiny: {"base": tiny.chain(tiny.relu)},
    ],
    ids=["learning rate", "epochs", "augmentation", "sites", "a parameter's last bit", "blocks"],
)
def test_another_fit_does_not_resume_from_the_checkpoint(monkeypatch, tiny, change):
    assert identity_of(monkeypatch, tiny) == identity_of(monkeypatch, tiny)
    assert identity_of(monkeypatch, tiny) != identity_of(monkeypatch, tiny, **change(tiny))


def test_one_step_is_a_fit(tiny):
    rows, select = tiny.images()
    config = gati_jax.FitConfig(epochs=1, batch=len(rows))
    candidates = gati_jax.fit(tiny.chain(), rows, select=select, heads=[tiny.head(1)], config=config, progress=False)
    assert [c.name for c in candidates] == ["fc@1"]


def test_candidates_are_named_by_head_and_site(fitted):
    assert [(c.name, c.site) for c in fitted] == [("fc@1", 1), ("fc@2", 2)]
    assert len(fitted) == 2


@pytest.mark.parametrize("sites", [(3,), (-1,), (1, 7)])
def test_sites_that_the_chain_does_not_have_are_refused(tiny, sites):
    with pytest.raises(gati_jax.InputError, match="heads: expected sites 0 to 2 for fc, got"):
        tiny.fit(sites=sites)


@pytest.mark.parametrize(("sites", "message"), [((), "at least one at some site"), ((1, 1), "distinct names")])
def test_no_head_and_a_head_twice_are_refused(tiny, sites, message):
    with pytest.raises(gati_jax.InputError, match=f"heads: expected {message}"):
        tiny.fit(sites=sites)


def test_a_chain_of_one_block_has_no_site_by_default(tiny):
    base = tiny.chain()
    short = gati_jax.Chain(base.blocks[:1], base.classifier, (base.params[0], np.ones((10, 4))), base.input_spec)
    with pytest.raises(gati_jax.InputError, match="a chain of 1 blocks has by default sites 1 to N - 1"):
        gati_jax.fit(short, tiny.images()[0], select=tiny.images()[1])


def test_statistics_come_from_rows_of_the_whole_split(tiny, monkeypatch):
    """Data sets are often sorted: their first rows say little of the rest."""
    rows, select = tiny.images()
    many = np.concatenate([np.zeros_like(rows)] * 3 + [rows + 8])
    many += np.arange(len(many), dtype=np.float32)[:, None] * 1e-6  # all rows distinct
    config = dataclasses.replace(tiny.CONFIG, epochs=1)
    seen = []
    module = importlib.import_module("gati_jax.fitting.predictors")
    monkeypatch.setattr(module, "fold_standardize", lambda predictor, v: (seen.append(v), (predictor, v))[1])
    gati_jax.fit(tiny.chain(), many, select=select, heads=[tiny.head(0)], config=config, progress=False)
    mean = seen[0]["statistics"]["standardize"]["mean"]
    np.testing.assert_allclose(mean, many.mean(0), atol=0.8)
    assert np.abs(many[:512].mean(0) - many.mean(0)).min() > 1.5


def refused(tiny, message, rows, select, **config):
    with pytest.raises(gati_jax.InputError, match=message):
        gati_jax.fit(
            tiny.chain(),
            rows,
            select=select,
            heads=[tiny.head(1)],
            config=dataclasses.replace(tiny.CONFIG, **config),
            progress=False,
        )


def test_overlapping_splits_are_refused(tiny):
    rows, select = tiny.images()
    refused(tiny, "select and fit disjoint, got 5 rows", rows, np.concatenate([select[:50], rows[:5]]))


def test_fewer_rows_than_a_batch_are_refused(tiny):
    rows, select = tiny.images()
    refused(tiny, "expected at least one batch of 32 rows, got 31", rows[:31], select)


def test_inputs_that_the_chain_does_not_take_are_refused(tiny):
    rows, select = tiny.images()
    refused(tiny, r"images: expected shape \[batch, 12\], got \[256, 11\]", rows[:, :11], select)
    refused(tiny, "select: expected float32, got float64", rows, select.astype(np.float64))
    refused(tiny, "select: expected finite values", rows, np.full_like(select, np.nan))


def test_one_fold_is_refused(tiny):
    # The selector without the only fold would learn from no row at all.
    refused(tiny, "folds: expected", *tiny.images(), folds=1)


def test_rows_of_another_dtype_are_refused_where_they_could_not_be_told_apart(tiny, fitted):
    _, select = tiny.images()
    with pytest.raises(gati_jax.InputError, match="float16"):
        gati_jax.replay(tiny.chain(), fitted, select.astype(np.float16))
    pixels = np.random.default_rng(0).integers(0, 256, (90, 4, 4, 1)).astype(np.uint8)
    flat = tiny.chain()
    normalization = gati_jax.Normalization(mean=(0.5,), std=(0.25,))
    blocks = (lambda params, x: jnp.tanh(x.reshape(len(x), -1)[:, :12] @ params), *flat.blocks[1:])
    spec = jax.ShapeDtypeStruct((4, 4, 1), np.float32)
    base = gati_jax.Chain(blocks, flat.classifier, flat.params, spec, normalization)
    config = dataclasses.replace(tiny.CONFIG, epochs=1)
    fitted = gati_jax.fit(base, pixels[:60], select=pixels[60:], heads=[tiny.head(1)], config=config, progress=False)
    with pytest.raises(gati_jax.InputError, match="images: expected uint8, as in the fit, got float32"):
        gati_jax.replay(base, fitted, np.asarray(base.prepare(pixels[60:])))
    with pytest.raises(gati_jax.InputError, match="select: expected uint8, as images, got float32"):
        gati_jax.fit(base, pixels[:60], select=np.asarray(base.prepare(pixels[60:])), heads=[tiny.head(1)])


def test_part_of_a_fit_knows_the_same_rows(tiny, fitted):
    part = fitted.take(["fc@2"])
    assert [c.name for c in part] == ["fc@2"]
    rows, select = tiny.images()
    whole, alone = (gati_jax.replay(tiny.chain(), c, select) for c in (fitted, part))
    np.testing.assert_array_equal(whole.take(["fc@2"]).scores, alone.scores)
    with pytest.raises(gati_jax.InputError, match="images and fit"):
        gati_jax.replay(tiny.chain(), part, rows)


def test_a_fit_that_diverges_says_so(tiny):
    rows, select = tiny.images()
    config = dataclasses.replace(tiny.CONFIG, optimizer="sgd", learning_rate=1e30, epochs=2)
    with pytest.raises(gati_jax.InputError, match="fc@1 diverged"):
        gati_jax.fit(tiny.chain(), rows, select=select, heads=[tiny.head(1)], config=config, progress=False)


@pytest.mark.parametrize("rate", [0.0, -1.0, np.inf, np.nan])
def test_learning_rates_are_positive_numbers(rate):
    with pytest.raises(gati_jax.InputError, match="learning_rate: expected a "):
        gati_jax.FitConfig(learning_rate=rate)


def test_equal_rows_make_no_folds(tiny):
    rows, select = tiny.images()
    with pytest.raises(gati_jax.InputError, match="at least one distinct row for each of 5 folds, got 1"):
        gati_jax.fit(tiny.chain(), rows, select=np.repeat(select[:1], 60, 0), heads=[tiny.head(1)], config=tiny.CONFIG)
