"""The recipe against a plain loop that spells out what schedule, optimiser, loss and average are."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax import InputError
from gati_jax.models import apply_train
from tests.train.one_pass import TINY
from train import epoch_order, recipe, run_epochs, scan_epoch
from train.config import BaseTraining, build_config
from train.recipe import Recipe, augmented, begin, cutout, make_optimizer, make_schedule, train_step

N, BATCH, EPOCHS, SEED = 44, 10, 2, 5  # four rows of every epoch are left out
STEPS = EPOCHS * (N // BATCH)
PEAK, MOMENTUM, DECAY, SMOOTHING, AVERAGE = 0.05, 0.8, 1e-2, 0.1, 0.6


def recipe_of(**training) -> Recipe:
    given = {
        "epochs": EPOCHS, "batch": BATCH, "learning_rate": PEAK, "momentum": MOMENTUM, "weight_decay": DECAY,
        "label_smoothing": SMOOTHING, "average": AVERAGE, "augment": {"pad": 1, "flip": True}, "cutout": 3,
    } | training  # fmt: skip
    splits = dict.fromkeys(["fit", "select", "certify", "test"], "all")
    source = {"name": "digits", "base_trained_on": ["all"], "splits": splits}
    normalization = {"mean": [0.3], "std": [0.4], "scale": 0.0625}
    base = {"network": "resnet20", "input_shape": (8, 8, 1), "normalization": normalization, "training": given}
    return dataclasses.replace(Recipe.of(build_config({"seed": SEED, "data": source, "base": base}), N), network=TINY)


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, N).astype(np.int32)
    images = (rng.integers(0, 8, (N, 8, 8, 1)) + labels[:, None, None, None] * 0.8).astype(np.uint8)
    return images, labels


def trained(by, rows, **options):
    epoch = scan_epoch(functools.partial(train_step, by), n=N, batch=BATCH, seed=SEED)
    records = []
    state = run_epochs(
        epoch, begin(by, jax.random.key(SEED)), rows, steps=N // BATCH, epochs=EPOCHS, report=records.append,
        progress=False, **options,
    )  # fmt: skip
    return state, np.concatenate([record.metrics["loss"] for record in records])


def cosine(start, stop, share):
    return stop + (start - stop) * (1 + np.cos(np.pi * share)) / 2


def learning_rate(step):
    """One cycle: from a 25th of the peak to the peak in a fifth of the steps, then down to a 250,000th."""
    up = int(0.2 * STEPS)
    if step < up:
        return cosine(PEAK / 25, PEAK, step / up)
    return cosine(PEAK, PEAK / 25 / 1e4, (step - up) / (STEPS - up))


def put(variables, params):
    return tuple({**v, "params": p} for v, p in zip(variables, params, strict=True))


@jax.jit
def gradient(variables, x, labels):
    """Return the smoothed cross-entropy, spelt out, with advanced statistics, and its gradient."""

    def loss(params):
        logits, new = apply_train(TINY, put(variables, params), x)
        log_p = logits - jax.scipy.special.logsumexp(logits, -1, keepdims=True)
        right = jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]
        return -((1 - SMOOTHING) * right + SMOOTHING * log_p.mean(-1)).mean(), new

    return jax.value_and_grad(loss, has_aux=True)(tuple(v["params"] for v in variables))


def plain_loop(by, rows):
    """Train by a Python loop and NumPy: losses and both sets of weights."""
    images, labels = rows
    variables = average = begin(by, jax.random.key(SEED)).params.trained
    velocity = [np.zeros(p.shape) for v in variables for p in jax.tree.leaves(v["params"])]
    losses = []
    for step in range(STEPS):
        batch = np.asarray(epoch_order(SEED, step // 4, N))[step % 4 * BATCH :][:BATCH]
        x = augmented(by, step, jnp.asarray(images[batch]))
        (loss, variables), gradients = gradient(variables, x, jnp.asarray(labels[batch]))
        losses.append(float(loss))
        params, structure = jax.tree.flatten(tuple(v["params"] for v in variables))
        decayed = [
            np.asarray(g, np.float64) + (DECAY * np.asarray(p) if p.ndim > 1 else 0)
            for g, p in zip(jax.tree.leaves(gradients), params, strict=True)
        ]
        velocity = [MOMENTUM * v + g for v, g in zip(velocity, decayed, strict=True)]
        steps = [learning_rate(step) * (MOMENTUM * v + g) for v, g in zip(velocity, decayed, strict=True)]
        params = [np.float32(p - s) for p, s in zip(params, steps, strict=True)]
        variables = put(variables, jax.tree.unflatten(structure, params))
        keep = min(AVERAGE, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, b, keep=keep: np.float32(keep * a + (1 - keep) * b), average, variables)
    return np.array(losses), variables, average


def test_the_loss_curve_and_the_weights_are_those_of_a_plain_loop(rows):
    ours = recipe_of()
    rates = [recipe.learning_rate(ours.schedule, i) for i in range(STEPS)]
    np.testing.assert_allclose(rates, [learning_rate(i) for i in range(STEPS)], rtol=1e-4)
    state, losses = trained(ours, rows)
    expected, variables, average = plain_loop(ours, rows)
    assert len(losses) == STEPS
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    for actual, plain in ((state.params.trained, variables), (state.params.final, average)):
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-3 * max(1e-2, np.abs(b).max()))
    assert np.ptp(losses) > 0.1  # something happens


def test_the_seed_decides_everything(rows):
    one, same = (trained(recipe_of(), rows)[0] for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, same))
    other, _ = trained(dataclasses.replace(recipe_of(), seed=SEED + 1), rows)  # other crops, flips and cutouts
    assert not any(map(np.array_equal, jax.tree.leaves(one.opt_state), jax.tree.leaves(other.opt_state)[:-1]))


def test_bfloat16_computes_nearly_the_same_and_keeps_float32(rows):
    exact, coarse = (trained(recipe_of(bfloat16=b, average=0.0), rows) for b in (False, True))
    assert exact[0].params.average is None  # then the trained weights are kept
    assert exact[0].params.final is exact[0].params.trained
    assert {leaf.dtype for leaf in jax.tree.leaves(coarse[0].params)} == {np.dtype(np.float32)}
    # bfloat16 has 8 bits: a loss is off by about a hundredth, and not by nothing.
    difference = np.abs(exact[1] - coarse[1])
    assert 1e-5 < difference.max() < 0.05 * exact[1].max()


def test_muon_makes_the_step_of_every_convolution_nearly_orthogonal():
    training = BaseTraining(optimizer="muon", learning_rate=0.1, weight_decay=0, epochs=1, batch=1)
    optimizer = make_optimizer(training, make_schedule(training, 10))
    rng = np.random.default_rng(0)
    uneven = rng.normal(size=(3, 3, 4, 6)) * 2.0 ** np.arange(6)
    params = {"conv": {"kernel": uneven}, "fc": {"kernel": rng.normal(size=(6, 5))}}
    params = jax.tree.map(jnp.float32, params)
    updates: Any
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(params, optimizer.init(params), params)
    singular = np.linalg.svd(np.reshape(updates["conv"]["kernel"], (36, 6)), compute_uv=False)
    given = np.linalg.svd(np.reshape(params["conv"]["kernel"], (36, 6)), compute_uv=False)
    assert singular.max() / singular.min() < 2
    assert given.max() / given.min() > 10
    # The classifier's moves as Adam's first step does, with Nesterov's look ahead: against the sign, all by as much.
    rate = training.rest_learning_rate / 25 * (1 + 0.9 * (1 - 0.9) / (1 - 0.9**2))
    np.testing.assert_allclose(updates["fc"]["kernel"], -rate * np.sign(params["fc"]["kernel"]), rtol=1e-3)


def test_muon_trains(rows):
    losses = trained(recipe_of(optimizer="muon", learning_rate=0.02, weight_decay=0.0), rows)[1]
    assert np.isfinite(losses).all()
    assert losses[-2:].mean() < losses[:2].mean()


def test_fewer_rows_than_a_batch_are_refused():
    with pytest.raises(InputError, match="expected at least one batch of 10 rows, got 9"):
        scan_epoch(lambda state, _: (state, {}), n=9, batch=10, seed=0)


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
