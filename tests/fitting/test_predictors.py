"""Augmentation, the distillation loss, and training: one pass against one head at a time in plain NumPy."""

import dataclasses
import importlib
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, rel_entr, softmax

import gati_jax
from gati_jax import Augment, Normalization
from gati_jax.caches import Summary
from gati_jax.data import batches
from gati_jax.fitting import distillation_loss
from gati_jax.models import ResNet, fold, init, to_chain
from tests.fitting import tiny


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


def by_scipy(logits, base_logits, alpha, temperature):
    """alpha T^2 KL(teacher_T || student_T) + (1 - alpha) CE(student, the base's answer), in float64."""
    logits, base_logits = logits.astype(np.float64), base_logits.astype(np.float64)
    teacher, student = softmax(base_logits / temperature, axis=-1), softmax(logits / temperature, axis=-1)
    soft = rel_entr(teacher, student).sum(-1)
    hard = -log_softmax(logits, axis=-1)[np.arange(len(logits)), base_logits.argmax(-1)]
    return (alpha * temperature**2 * soft + (1 - alpha) * hard).mean()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from([1.0, 2.5, 6.0]))
def test_loss_is_the_papers(seed, alpha, temperature):
    logits, base_logits = 4 * np.random.default_rng(seed).standard_normal((2, 7, 5)).astype(np.float32)
    loss = distillation_loss(jnp.asarray(logits), jnp.asarray(base_logits), alpha=alpha, temperature=temperature)
    assert float(loss) == pytest.approx(by_scipy(logits, base_logits, alpha, temperature), rel=2e-4, abs=1e-5)


def test_defaults_are_the_released_codes():
    logits, base_logits = np.random.default_rng(0).standard_normal((2, 7, 5)).astype(np.float32)
    loss = distillation_loss(jnp.asarray(logits), jnp.asarray(base_logits))
    assert float(loss) == pytest.approx(by_scipy(logits, base_logits, 0.5, 6.0), rel=1e-4)


def test_the_soft_term_vanishes_for_the_bases_own_logits_only():
    base_logits = jnp.asarray([[3.0, 1.0, -2.0]])
    assert float(distillation_loss(base_logits, base_logits, alpha=1.0)) == pytest.approx(0, abs=1e-6)
    assert float(distillation_loss(base_logits[:, ::-1], base_logits, alpha=1.0)) > 0.1


def initial_values(site, width, heads):
    """The first head's, drawn from the first of the seed's keys."""
    key = jax.random.split(jax.random.key(tiny.CONFIG.seed), heads)[site - 1]
    module = tiny.head(site).predictor(tiny.CLASSES)
    return jax.tree.map(lambda v: np.asarray(v, np.float64), module.init(key, jnp.eye(width))["params"])


def gradients(p, x, base_logits, alpha, temperature):
    """Backpropagation by hand through Linear, ReLU, Linear and the distillation loss."""
    n, answers = len(x), np.eye(base_logits.shape[-1])[base_logits.argmax(-1)]
    before = x @ p["hidden"]["kernel"] + p["hidden"]["bias"]
    hidden = np.maximum(before, 0)
    z = hidden @ p["out"]["kernel"] + p["out"]["bias"]
    soft = temperature * (softmax(z / temperature, axis=-1) - softmax(base_logits / temperature, axis=-1))
    dz = (alpha * soft + (1 - alpha) * (softmax(z, axis=-1) - answers)) / n
    dh = dz @ p["out"]["kernel"].T * (before > 0)
    return {"hidden": {"kernel": x.T @ dh, "bias": dh.sum(0)}, "out": {"kernel": hidden.T @ dz, "bias": dz.sum(0)}}


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


def reused(recent, step, config):
    """The batches that are drawn from recent ones: the room's slot i has the newest of number i modulo room."""
    key = jax.random.fold_in(jax.random.key(config.seed + 3), step)
    known = len(recent) * config.batch
    drawn = np.asarray(jax.random.randint(key, (config.reuse - 1, config.batch), 0, known))
    first = step + 1 - len(recent)  # number of the oldest batch
    slots = np.concatenate([recent[(slot - first) % len(recent)] for slot in range(len(recent))])
    return slots[drawn]


def train_alone(site, config, heads, kept=1):
    """Train one head by itself: NumPy, float64, one plain loop. Returns its values, before and after, standardised."""
    rows, _ = tiny.images()
    base = [np.asarray(p, np.float64) for p in tiny.chain().params]
    width = base[site - 1].shape[1]
    features = run_base(base, rows)[site]  # the tiny fit split is small enough that all of it is standardised by
    mean, std = features.mean(0), np.sqrt(features.var(0) + 0.01 * features.var(0).mean())
    params = initial = initial_values(site, width, heads)
    zeros = jax.tree.map(np.zeros_like, params)
    state, t = (zeros, zeros), 0
    rates = list(learning_rates(config, config.reuse * config.epochs * (len(rows) // config.batch)))
    recent = deque(maxlen=kept)  # of row indices, a batch each
    for epoch in range(config.epochs):
        for index in batches(len(rows), config.batch, seed=(config.seed, epoch)):
            recent.append(index)
            for drawn in (index, *reused(recent, t // config.reuse, config)):
                sites = run_base(base, rows[drawn])
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
def test_two_heads_in_one_pass_are_each_as_if_alone(fitted, site, width):
    found = fitted.items[site - 1].params["predictor"]["params"]
    assert found["hidden"]["kernel"].shape[0] == width
    assert_trained_alike(found, *train_alone(site, tiny.CONFIG, heads=2))


def test_sgd_is_the_papers():
    config = dataclasses.replace(
        tiny.CONFIG, optimizer="sgd", learning_rate=0.05, weight_decay=5e-3, alpha=0.3, temperature=3.0, epochs=3
    )
    found = tiny.fit(sites=(1,), config=config).items[0].params["predictor"]["params"]
    assert_trained_alike(found, *train_alone(1, config, heads=1))


@pytest.mark.parametrize("kept", [3, 1])
def test_a_batch_is_used_again_with_rows_of_recent_ones(monkeypatch, kept):
    """Each in ``reuse`` steps on the mean, all in one schedule, and the base runs once for each batch."""
    module = importlib.import_module("gati_jax.fitting.predictors")
    monkeypatch.setattr(module, "_RECENT_BYTES", (kept * 32 + 20) * 4 * (10 + tiny.CLASSES))
    base = importlib.import_module("gati_jax.fitting.base")
    ran, run = [], base._run_base
    monkeypatch.setattr(base, "_run_base", lambda *a, **k: (ran.append(len(a[1])), run(*a, **k))[1])
    config = dataclasses.replace(tiny.CONFIG, epochs=2, reuse=3)
    found = tiny.fit(sites=(1,), config=config).items[0].params["predictor"]["params"]
    assert ran == [tiny.ROWS, *[32] * 16]  # all for the first values, then every batch once
    assert_trained_alike(found, *train_alone(1, config, heads=1, kept=kept))


@pytest.mark.parametrize("backend", ["onnx", "xla"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_fastest_backend_gives_the_bases_activations(monkeypatch, backend, dtype):
    """Of a residual network with random weights, at all sites, the input among them; a grid, a mean and the whole."""
    module = importlib.import_module("gati_jax.fitting.base")
    if backend == "xla":
        monkeypatch.setattr(module, "_onnx_spans", lambda *_: None)
    else:
        pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    chain, rng = small_network(), np.random.default_rng(4)
    pixels = rng.integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    images = pixels if dtype == np.uint8 else np.asarray(chain.prepare(pixels))
    kinds = Summary("grid", 1), Summary("grid", 3), Summary("whole")
    inputs = tuple((site, kind) for site in range(len(chain)) for kind in kinds)
    found, logits = module.base_runner(chain, inputs)(images)
    expected, base_logits = chain.activations(chain.prepare(pixels))
    np.testing.assert_allclose(logits, base_logits, atol=1e-4 * np.ptp(base_logits))
    assert len(found) == len(inputs)
    for got, (site, kind) in zip(found, inputs, strict=True):
        whole = np.asarray(expected[site])
        if kind.kind == "grid":  # bins as PyTorch has them
            n, size = whole.shape[1], min(kind.size, whole.shape[1])
            bins = [(i * n // size, -((i + 1) * -n // size)) for i in range(size)]
            whole = np.stack([np.stack([whole[:, a:b, c:d].mean((1, 2)) for c, d in bins], 1) for a, b in bins], 1)
        assert got.shape == whole.shape
        np.testing.assert_allclose(got, whole, atol=1e-4 * np.ptp(np.asarray(expected[site])))


def small_network():
    network = ResNet(stages=(2, 1), widths=(4, 8), shortcut="B", classes=5, input_shape=(8, 8, 3))
    rng, shapes = np.random.default_rng(0), jax.eval_shape(lambda: fold(init(network, jax.random.key(0))))
    params = jax.tree.map(lambda v: (rng.normal(size=v.shape) / 3).astype(np.float32), shapes)
    return to_chain(network, params, Normalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))


def test_statistics_come_from_rows_of_the_whole_split(monkeypatch):
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
