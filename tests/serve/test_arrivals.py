"""Arrival times: their laws, and what is refused."""

import numpy as np
import pytest

from benchmarks import arrivals
from benchmarks.load import Load, images_of, make_trace, parser
from gati_jax import InputError
from gati_jax.adaptation import Trace, save_trace


@pytest.mark.parametrize("make", [arrivals.poisson, arrivals.bursty, arrivals.diurnal])
def test_a_seed_gives_one_trace(make):
    one, same, other = (arrivals.of_rows(make(500, 10, seed=seed), images=20, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.seconds, same.seconds)
    np.testing.assert_array_equal(one.item, same.item)
    assert len(one) != len(other) or (one.seconds != other.seconds).any()
    assert set(one.item) == set(range(20))
    assert 0 <= one.seconds[0] <= one.seconds[-1] <= 10


def test_poisson_gaps_are_exponential():
    gaps = np.diff(arrivals.poisson(200, 500, seed=0))
    n = len(gaps)
    assert abs(n - 100_000) < 5 * np.sqrt(100_000)
    # Kolmogorov-Smirnov against 1 - exp(-200 t); 1.95 / sqrt(n) is exceeded once in a thousand.
    law = 1 - np.exp(-200 * np.sort(gaps))
    assert np.abs(law - (np.arange(n) + 0.5) / n).max() < 1.95 / np.sqrt(n)


def test_bursts_have_the_stated_mean_rate_and_dispersion():
    rate, ratio, share, burst, window = 100.0, 5.0, 0.2, 0.5, 20.0
    times = arrivals.bursty(rate, 20_000, seed=3, ratio=ratio, share=share, burst_seconds=burst)
    counts = np.histogram(times, np.arange(0, 20_001, window))[0]
    # Calm 100 / 1.8, bursts 5 times that. The rate's autocovariance is share (1 - share) (h - c)^2 exp(-s / tau) with
    # 1 / tau = 1 / 0.5 + 1 / 2; integrated twice over a window it adds to the Poisson variance.
    calm, tau = rate / 1.8, 0.4
    rates_variance = share * (1 - share) * (4 * calm) ** 2
    variance = rate * window + 2 * rates_variance * tau * (window - tau * (1 - np.exp(-window / tau)))
    assert counts.mean() == pytest.approx(rate * window, abs=5 * np.sqrt(variance / len(counts)))
    assert counts.var() == pytest.approx(variance, rel=0.25)
    assert variance > 10 * rate * window  # a Poisson process would fail this


def test_a_trace_may_not_ask_for_what_is_not_there(tmp_path):
    save_trace(tmp_path / "t.safetensors", Trace(item=np.array([3], np.int32), seconds=np.zeros(1)))
    load = Load(kind="trace", trace=str(tmp_path / "t.safetensors"))
    assert make_trace(load, 4).item.tolist() == [3]
    with pytest.raises(InputError, match="expected items below 3, the number of images, got 3"):
        make_trace(load, 3)


def test_images_come_from_the_trace_or_from_a_data_set(tmp_path):
    images = np.zeros((1, 2, 2, 3), np.uint8)
    for name, own in (("with", images), ("without", None)):
        save_trace(tmp_path / f"{name}.safetensors", Trace(item=np.zeros(1, np.int32), seconds=np.zeros(1), images=own))
    command = ["--url", "u", "--trace"]
    with_images = parser().parse_args([*command, str(tmp_path / "with.safetensors")])
    np.testing.assert_array_equal(images_of(with_images), images)
    without = str(tmp_path / "without.safetensors")
    digits = parser().parse_args([*command, without, "--data", "digits", "--split", "all[:5]"])
    assert images_of(digits).shape == (5, 8, 8, 1)
    for given, found in ((["without.safetensors"], "neither"), (["with.safetensors", "--data", "digits"], "both")):
        with pytest.raises(InputError, match=f"--data: expected .* got {found}"):
            images_of(parser().parse_args([*command, str(tmp_path / given[0]), *given[1:]]))


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"seconds": -1}, {"burst_seconds": 0}, {"share": 1.0}, {"rate": 1e9}])
def test_arguments_out_of_bounds_are_named(wrong):
    with pytest.raises(InputError, match=f"^{next(iter(wrong))}: expected"):
        arrivals.bursty(**({"rate": 10.0, "seconds": 10.0, "seed": 0} | wrong))
