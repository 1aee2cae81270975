"""Files that an earlier version wrote: bundles, the versions of adaptation and traces can still be read."""

import json
from pathlib import Path

import numpy as np

import gati_jax
from gati_jax.adaptation import load_trace
from gati_jax.bundle import Versions

OLD = Path(__file__).parents[1] / "fixtures" / "v1"
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8)


def assert_answers_as_before(bundle: gati_jax.Bundle) -> None:
    expected = json.loads((OLD / "answers.json").read_text())
    found = gati_jax.infer_batch(bundle, PIXELS[:12])
    np.testing.assert_array_equal(found.class_index, expected["class_index"])
    np.testing.assert_array_equal(found.exit, expected["exit"])
    np.testing.assert_allclose(found.logits, expected["logits"], rtol=1e-4, atol=1e-4)


def test_a_bundle_is_read_and_answers_as_it_did():
    bundle = gati_jax.load_bundle(OLD / "bundle")
    assert list(bundle.plans) == ["1%", "2%"]
    assert all(certificate.certified for certificate in bundle.certificates.values())
    assert bundle.class_names == ("a", "b", "c")
    assert (bundle.provenance.seed, bundle.provenance.command) == (3, ["train"])
    assert [table.lookup_ms for table in bundle.costs] == [{"gap@0": 0.1, "grid@1": 0.1}]
    (tuning,) = bundle.tunings
    assert [(tile.size, set(tile.algorithms.values())) for tile in tuning.tiles] == [(1, {"im2col"}), (4, {"im2col"})]
    assert_answers_as_before(bundle)


def test_a_folder_of_versions_is_read_and_its_trials_are_counted_on(tmp_path):
    versions = Versions(OLD / "versions")
    number, bundle = versions.load_current()
    assert (number, versions.history) == (1, (1,))
    assert_answers_as_before(bundle)
    copy = tmp_path / "versions"
    copy.mkdir()
    (copy / "versions.json").write_bytes((OLD / "versions" / "versions.json").read_bytes())
    assert Versions(copy).next_trial() == 3


def test_a_trace_is_read():
    trace = load_trace(OLD / "trace.npz")
    np.testing.assert_array_equal(trace.item, [0, 1, 2, 1, 0])
    np.testing.assert_array_equal(trace.seconds, [0.0, 0.5, 0.5, 2.0, 3.25])
    np.testing.assert_array_equal(trace.phase, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(trace.source, [0, 1, 0, 1, 0])
    assert trace.images is not None
    np.testing.assert_array_equal(trace.images, PIXELS[:3])
    assert (trace.phases, dict(trace.about)) == (("quiet", "blur 3"), {"from": "by hand"})
