"""Recorded workloads of every kind: what their names promise, from a seed, and arrival laws."""

import json

import numpy as np
import pytest

from benchmarks import arrivals, traces
from benchmarks.corruptions import CORRUPTIONS
from gati_jax import InputError
from gati_jax.adaptation import load_trace


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)


def test_every_variant_is_another_picture_of_its_row(rows):
    codes = np.arange(3 * traces.VARIANTS)
    made = traces.pictures(rows, codes)
    assert len(np.unique(made.reshape(len(made), -1), axis=0)) == len(made)
    middle = traces.VARIANTS // 2 - traces.VARIANTS // 2 % 2  # not shifted, not mirrored
    np.testing.assert_array_equal(made[middle], rows[0])
    np.testing.assert_array_equal(made[middle + 1], rows[0, :, ::-1])
    np.testing.assert_array_equal(made[traces.VARIANTS][2:, 2:], rows[1, :-2, :-2])  # by the most, down and right


def test_independent_requests_never_repeat(rows):
    content = traces.independent(rows, 2000, np.random.default_rng(1))
    assert len(np.unique(content.images[content.item].reshape(2000, -1), axis=0)) == 2000
    with pytest.raises(InputError, match="--requests: expected at most 3000"):
        traces.independent(rows, 3001, np.random.default_rng(1))


def test_zipf_is_zipf(rows):
    n = 60_000
    content = traces.zipf(rows, n, np.random.default_rng(2), exponent=1.0)
    counts = np.sort(np.bincount(content.item, minlength=len(rows)))[::-1]
    expected = n / np.arange(1, 61) / (1 / np.arange(1, 61)).sum()
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()  # a rank or two may have changed places
    assert np.argmax(np.bincount(content.item)) != 0  # ranks are shuffled


def test_classes_drift_to_a_few_and_come_back(rows):
    labels = np.arange(60) % 10
    content = traces.classes(rows, labels, 600, np.random.default_rng(3))
    of = {tuple(picture.ravel()): labels[i // traces.VARIANTS] for i, picture in enumerate(all_pictures(rows))}
    asked = np.array([of[tuple(picture.ravel())] for picture in content.images])
    seen = [len(set(asked[content.phase == phase])) for phase in range(5)]
    assert seen[0] == seen[4] == 10
    assert seen[2] == traces.FEW_CLASSES
    with pytest.raises(InputError, match="--requests: expected no more"):
        traces.classes(rows, labels, 6000, np.random.default_rng(3))


def all_pictures(rows):
    return traces.pictures(rows, np.arange(len(rows) * traces.VARIANTS))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_sets_in_by_degrees_and_goes_away(rows, kind):
    n = 2400
    content = traces.corrupted(rows, n, np.random.default_rng(4), kind=kind)
    clean = traces.independent(rows, n, np.random.default_rng(4)).images
    change = np.abs(content.images.astype(float) - clean).mean((1, 2, 3))
    by_phase = [change[content.phase == phase].mean() for phase in range(len(content.phases))]
    assert by_phase[0] == by_phase[-1] == 0
    assert (np.diff(by_phase[:6]) > 0).all()
    assert (np.diff(by_phase[5:]) < 0).all()
    assert (content.phase == 0).sum() == n / 4
    assert (content.phase == 10).sum() >= n / 3  # 20,000 of 60,000
    assert content.phases[5] == f"{kind} 5"


def test_brightness_keeps_hue_and_saturation():
    image = np.array([[[[100, 50, 25], [0, 0, 0], [250, 125, 0]]]], np.uint8)
    brighter = CORRUPTIONS["brightness"](image, 3, np.random.default_rng(0))  # 0.15 of 255 is 38.25
    np.testing.assert_array_equal(brighter, [[[[138, 69, 35], [38, 38, 38], [255, 128, 0]]]])


def test_cameras_are_interleaved_and_every_frame_comes_once():
    clips = [(np.full((n, 2, 2, 3), 50 * i, np.uint8) + np.arange(n, dtype=np.uint8)[:, None, None, None], fps)
             for i, (n, fps) in enumerate([(40, 4.0), (10, 2.0)])]  # fmt: skip
    trace = traces.video(clips, None, np.random.default_rng(5))
    assert trace.images is not None
    values = trace.images[trace.item][:, 0, 0, 0]
    for camera, (frames, fps) in enumerate(clips):
        here = trace.source == camera
        np.testing.assert_array_equal(values[here], frames[:, 0, 0, 0])
        np.testing.assert_allclose(np.diff(trace.seconds[here]), 1 / fps)
    assert (np.diff(trace.source) != 0).sum() > 10
    assert len(traces.video(clips, 7, np.random.default_rng(5))) == 7


def test_a_day_has_its_peak_at_noon():
    times = arrivals.diurnal(10.0, 2000.0, seed=0, swing=0.8, day_seconds=1000.0)
    counts = np.histogram(times % 1000, np.linspace(0, 1000, 9))[0]
    edges = 2 * np.pi * np.linspace(0, 1, 9)
    expected = 20_000 * (1 / 8 - 0.8 * np.diff(np.sin(edges)) / (2 * np.pi))
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    assert counts[3] > 5 * counts[0]


@pytest.mark.parametrize("law", traces.ARRIVALS)
def test_so_many_arrive_as_are_wanted(law):
    times = traces.times(law, 20.0, 500, 1)
    assert len(times) == 500
    assert times[0] >= 0
    assert (np.diff(times) >= 0).all()
    assert times[-1] <= 25


def test_a_seed_makes_one_file(tmp_path, capsys, shared):
    for kind in ("zipf", "blur", "video"):
        command = ["--kind", kind, "--requests", "300", "--data", str(shared), "--split", "test[9000:]", "--json"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            traces.main([*command, "--seed", str(seed), "--out", str(tmp_path / f"{name}.safetensors")])
        assert json.loads(capsys.readouterr().out.splitlines()[0])["requests"] == 300
        one, same, other = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
        assert one == same != other
        trace = load_trace(tmp_path / "a.safetensors")
        assert (len(trace), trace.about["kind"]) == (300, kind)
