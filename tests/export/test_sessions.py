"""ONNX Runtime as a backend answers as the library's own programs do, in batches of any size."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import InputError
from gati_jax.runtime import Cascade, predict_batch
from tests.export.made import CASES, N, assert_same, with_two_plans

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
from gati_jax.export import sessions
from gati_jax.export.sessions import OnnxCascade, Spans
from gati_jax.profiling import onnx_tuning, replays_on_onnx, spans_of


@pytest.fixture(scope="module", params=CASES)
def case(request) -> tuple[gati_jax.Bundle, np.ndarray]:
    """A bundle that has been tuned for ONNX Runtime, and requests of which half leave at each cache."""
    bundle, images = CASES[request.param]()
    return dataclasses.replace(bundle, tunings=(onnx_tuning(bundle.chain, bundle.caches),)), images


def first(prediction: gati_jax.Prediction, n: int) -> gati_jax.Prediction:
    return jax.tree.map(lambda rows: np.asarray(rows)[:n], prediction)


def test_requests_are_answered_as_by_the_reference(case, monkeypatch):
    bundle, images = case
    thresholds = np.asarray(bundle.cascade.thresholds)
    expected = gati_jax.infer_batch(bundle, images, numerics="reference")
    assert set(np.asarray(expected.exit)) == {*bundle.cascade.sites, len(bundle.chain)}
    for n in (1, 3, N):
        found = gati_jax.infer_batch(bundle, images[:n], backend="onnxruntime")
        assert_same(found, first(expected, n), thresholds)
        assert [v.dtype for v in found] == [np.int32, np.int32, np.float32, np.float32]
        assert (found.score[found.exit == len(bundle.chain)] == np.inf).all()
    alone = gati_jax.infer(bundle, images[5], backend="onnxruntime")
    assert_same([np.asarray(v)[None] for v in alone], [np.asarray(v)[5:6] for v in expected], thresholds)
    empty = gati_jax.infer_batch(bundle, images[:0], backend="onnxruntime")
    assert [v.shape for v in empty] == [(0,), (0,), (0,), (0, bundle.chain.classes)]
    if bundle.chain.normalization is not None:  # prepared inputs instead of pixels
        prepared = np.asarray(bundle.chain.normalization(images))
        assert_same(gati_jax.infer_batch(bundle, prepared, backend="onnxruntime"), expected, thresholds)
    monkeypatch.setattr(sessions, "_BATCH", 25)  # several parts, the last of them smaller
    assert_same(OnnxCascade(bundle.cascade).predict(images), expected, thresholds)


@pytest.mark.parametrize("threshold", [-np.inf, np.inf], ids=["all hit", "all miss"])
def test_extremes(case, threshold):
    bundle, images = case
    cascade = Cascade(bundle.chain, bundle.cascade.caches, jnp.full(len(bundle.cascade.sites), threshold))
    found = OnnxCascade(cascade).predict(images[:9])
    assert_same(found, predict_batch(cascade, images[:9]), np.zeros(0))
    assert len(set(found.exit.tolist())) == 1


def test_every_output_is_what_a_replay_has(case):
    """Of each image by itself, and in batches."""
    bundle, images = case
    caches = sorted(bundle.caches, key=lambda cache: cache.site)
    expected = gati_jax.replay(bundle.chain, bundle.caches, images)
    found = replays_on_onnx(expected, bundle.chain, caches, images)
    by_name = expected.take([cache.name for cache in caches])
    for table in found:
        assert (table.names, table.sites) == (by_name.names, by_name.sites)
        np.testing.assert_array_equal(table.rows, expected.rows)
        assert (table.answers != expected.answers).sum() <= 1  # a tie, at the most
        assert (table.classes != by_name.classes).sum() <= 0.02 * table.classes.size
        np.testing.assert_allclose(table.scores, by_name.scores, rtol=2e-4, atol=2e-4)
    assert len(found) == 3


def test_plans_share_the_sessions_of_their_base(monkeypatch):
    """Two caches are at one site, and a session of the base is opened once for both plans."""
    opened, new = [], sessions.open_session
    monkeypatch.setattr(sessions, "open_session", lambda model: opened.append(model) or new(model))
    bundle, images = with_two_plans()
    spans = spans_of(bundle.chain, bundle.caches)
    on_onnx = {name: OnnxCascade(cascade, spans) for name, cascade in bundle.cascades.items()}
    assert len(opened) == 3  # lookups
    for name, cascade in on_onnx.items():
        expected, thresholds = gati_jax.infer_batch(bundle, images, plan=name), np.asarray(cascade.cascade.thresholds)
        assert_same(cascade.predict(images), expected, thresholds)
        assert_same(cascade.predict(images[:5]), first(expected, 5), thresholds)
    assert len(opened) == 3 + 3  # to site 1, to site 2, to the logits
    table = gati_jax.replay(bundle.chain, bundle.caches, images[:5])
    assert {one.sites for one in replays_on_onnx(table, bundle.chain, bundle.caches, images[:5])} == {(1, 1, 2)}


OTHERS = """
import numpy as np, onnxruntime
from gati_jax.export.models import lookup_model
from gati_jax.export.sessions import Lookup, to_value
from tests.export.made import with_two_plans
bundle, _ = with_two_plans()
cache = bundle.caches[0]
*positions, channels = bundle.chain.site_specs[cache.site].shape
x = to_value(np.random.default_rng(0).normal(size=(3, channels, *positions)).astype(np.float32))
options = onnxruntime.SessionOptions()
if {shared}:
    onnxruntime.set_global_thread_pool_sizes(1, 1)
    options.use_per_session_threads = False
ours = Lookup(bundle.chain, cache)
theirs = onnxruntime.InferenceSession(lookup_model(bundle.chain, cache).SerializeToString(), options)
assert np.array_equal(theirs.run_with_ort_values(["logits"], {{"activation": x}})[0].numpy(), ours(x)[0])
"""


@pytest.mark.parametrize("shared", [True, False])
def test_other_sessions_of_the_process_have_one_pool_of_threads_or_their_own(shared):
    command = [sys.executable, "-c", OTHERS.format(shared=shared)]
    found = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=300
    )
    assert (found.returncode, found.stdout) == (0, ""), found.stderr


def test_what_answers_is_what_was_replayed_bit_by_bit():
    """By the sessions that all plans of a bundle share, image by image: this is what was certified."""
    bundle, images = with_two_plans()
    caches = sorted(bundle.caches, key=lambda cache: cache.site)
    table = gati_jax.replay(bundle.chain, bundle.caches, images)
    alone, *_ = replays_on_onnx(table, bundle.chain, caches, images)
    spans = spans_of(bundle.chain, bundle.caches)
    for cascade in bundle.cascades.values():
        served = OnnxCascade(cascade, spans)
        index = [alone.names.index(cache.name) for cache in cascade.caches]
        for row, image in enumerate(images[:24]):
            found = served.predict(image[None])
            hits = [i for i, t in zip(index, np.asarray(cascade.thresholds), strict=True) if alone.scores[i, row] >= t]
            expected = (
                (alone.classes[hits[0], row], alone.scores[hits[0], row]) if hits else (alone.answers[row], np.inf)
            )
            assert (found.class_index[0], found.score[0]) == expected


def test_sessions_without_a_cut_at_a_cache_are_refused():
    """They would run past it."""
    bundle, _ = CASES["basic, shortcut A"]()
    with pytest.raises(InputError, match=r"spans: expected cuts at every cache, got none at sites \[0\]"):
        OnnxCascade(bundle.cascade, Spans(bundle.chain, [1]))
