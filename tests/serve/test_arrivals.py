"""Arrival times: their laws, their files, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import arrivals
from benchmarks.arrivals import Trace
from gati_jax import InputError


@pytest.mark.parametrize("make", [arrivals.poisson, arrivals.bursty])
def test_a_seed_gives_one_trace(make):
    one, same, other = (make(50, 10, images=20, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.times, same.times)
    np.testing.assert_array_equal(one.rows, same.rows)
    assert len(one) != len(other) or (one.times != other.times).any()
    assert set(one.rows) == set(range(20))
    assert 0 <= one.times[0] <= one.times[-1] <= 10


def test_poisson_gaps_are_exponential():
    gaps = np.diff(arrivals.poisson(200, 500, images=1, seed=0).times)
    n = len(gaps)
    assert abs(n - 100_000) < 5 * np.sqrt(100_000)
    # Kolmogorov-Smirnov against 1 - exp(-200 t); 1.95 / sqrt(n) is exceeded once in a thousand.
    law = 1 - np.exp(-200 * np.sort(gaps))
    assert np.abs(law - (np.arange(n) + 0.5) / n).max() < 1.95 / np.sqrt(n)


def test_bursts_have_the_stated_mean_rate_and_dispersion():
    rate, ratio, share, burst, window = 100.0, 5.0, 0.2, 0.5, 20.0
    times = arrivals.bursty(rate, 20_000, images=1, seed=3, ratio=ratio, share=share, burst_seconds=burst).times
    counts = np.histogram(times, np.arange(0, 20_001, window))[0]
    # Calm 100 / 1.8, bursts 5 times that. The rate's autocovariance is share (1 - share) (h - c)^2 exp(-s / tau) with
    # 1 / tau = 1 / 0.5 + 1 / 2; integrated twice over a window it adds to the Poisson variance.
    calm, tau = rate / 1.8, 0.4
    rates_variance = share * (1 - share) * (4 * calm) ** 2
    variance = rate * window + 2 * rates_variance * tau * (window - tau * (1 - np.exp(-window / tau)))
    assert counts.mean() == pytest.approx(rate * window, abs=5 * np.sqrt(variance / len(counts)))
    assert counts.var() == pytest.approx(variance, rel=0.25)
    assert variance > 10 * rate * window  # a Poisson process would fail this


@given(
    times=st.lists(st.floats(0, 1e5), min_size=1, max_size=30).map(sorted),
    suffix=st.sampled_from([".json", ".npz"]),
    data=st.data(),
)
def test_traces_survive_a_file(tmp_path_factory, times, suffix, data):
    rows = data.draw(st.lists(st.integers(0, 9), min_size=len(times), max_size=len(times)))
    path = tmp_path_factory.mktemp("trace") / f"trace{suffix}"
    arrivals.save(path, Trace(np.array(times), np.array(rows)))
    loaded = arrivals.load(path, images=10)
    np.testing.assert_array_equal(loaded.times, times)
    np.testing.assert_array_equal(loaded.rows, rows)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"times": [0.0], "rows": [0]}, "expected times and rows.*format_version"),
        ({"format_version": 2, "times": [0.0], "rows": [0]}, "format_version 2, not 1"),
        ({"format_version": 1, "times": [0.0]}, "expected times and rows.*'rows'"),
        ([1, 2], "expected times and rows"),
        ({"format_version": 1, "times": [0.0, 1.0], "rows": [0]}, r"expected times\[n\] and rows\[n\], got \[2\] and"),
        ({"format_version": 1, "times": [0.0], "rows": [0.5]}, "Cannot cast"),
        ({"format_version": 1, "times": ["soon"], "rows": [0]}, "expected times and rows"),
        ({"format_version": 1, "times": [1.0, 0.5], "rows": [0, 0]}, r"never fall, got times\[0\] = 1.0 before"),
        ({"format_version": 1, "times": [0.0, -1.0], "rows": [0, 0]}, r"got times\[1\] = -1.0"),
        ({"format_version": 1, "times": [float("nan")], "rows": [0]}, r"got times\[0\] = nan"),
        ({"format_version": 1, "times": [1e9], "rows": [0]}, r"expected times in 0 .. 604800 s"),
        ({"format_version": 1, "times": [0.0], "rows": [-1]}, "expected rows of 0 or more, got -1"),
        ({"format_version": 1, "times": [0.0], "rows": [10]}, "expected rows below 10, the number of images, got 10"),
        ({"format_version": 1, "times": [0.0], "rows": [10**30]}, "expected times and rows"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path, content, complaint):
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=complaint):
        arrivals.load(tmp_path / "t.json", images=10)


def test_a_damaged_or_empty_file_is_refused(tmp_path):
    for name, content in (("t.npz", b"PK\3\4nothing"), ("t.json", b"{"), ("u.npz", b""), ("v.json", b"\xff")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="expected times and rows"):
            arrivals.load(tmp_path / name, images=10)
    np.savez(tmp_path / "objects.npz", times=np.array([{}]), rows=np.array([0]))
    with pytest.raises(InputError, match="expected times and rows"):  # never unpickled
        arrivals.load(tmp_path / "objects.npz", images=10)
    with pytest.raises(InputError, match=r"\*.json or \*.npz"):
        arrivals.save(tmp_path / "t.csv", Trace(np.zeros(1), np.zeros(1, int)))


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"seconds": -1}, {"images": 0}, {"share": 1.0}, {"rate": 1e9}])
def test_arguments_out_of_bounds_are_named(wrong):
    with pytest.raises(InputError, match=f"^{next(iter(wrong))}: expected"):
        arrivals.bursty(**({"rate": 10.0, "seconds": 10.0, "images": 5, "seed": 0} | wrong))
