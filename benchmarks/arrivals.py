"""Arrival processes, drawn from a seed.

Each returns sorted times in seconds from the start. Without ``count``, their number is random as well; with it, the
times are conditioned on that number.
"""

import numpy as np
from jaxtyping import Float64, Int, Int32

from gati_jax import InputError
from gati_jax.adaptation import Trace
from gati_jax.adaptation.trace import MOST_REQUESTS

Times = Float64[np.ndarray, " n"]
_DAY_STEPS = 1440  # of the piecewise linear rate of a day


def steady(rate: float, seconds: float, *, count: int | None = None) -> Times:
    """Return evenly spaced arrivals, as from a camera or a batch job.

    Args:
        rate: Requests per second.
        seconds: Duration.
        count: Number of requests, at that rate.
    """
    _check(rate, seconds)
    return np.arange(max(1, round(rate * seconds)) if count is None else count) / rate


def poisson(rate: float, seconds: float, *, seed: int, count: int | None = None) -> Times:
    """Return arrivals of a Poisson process.

    Args:
        rate: Requests per second.
        seconds: Duration.
        seed: The same seed gives the same times.
        count: Number of requests.
    """
    _check(rate, seconds)
    return _time_changed(np.random.default_rng(seed), np.array([0, seconds]), np.array([0, rate * seconds]), count)


def bursty(
    rate: float,
    seconds: float,
    *,
    seed: int,
    count: int | None = None,
    ratio: float = 5.0,
    share: float = 0.2,
    burst_seconds: float = 0.5,
) -> Times:
    """Return arrivals of a Markov-modulated Poisson process: bursts and calms of exponential length alternate.

    Args:
        rate: Requests per second, over bursts and calms.
        seconds: Duration.
        seed: The same seed gives the same times.
        count: Number of requests.
        ratio: The rate within bursts over the rate between them.
        share: Share of the time in bursts.
        burst_seconds: A burst's mean length.

    Raises:
        InputError: An argument is out of its bounds.
    """
    _check(rate, seconds)
    _check_positive(ratio=ratio, burst_seconds=burst_seconds)
    if not 0 < share < 1:
        raise InputError(f"share: expected a share of the time in (0, 1), got {share}")
    random = np.random.default_rng(seed)
    calm = rate / (1 + share * (ratio - 1))
    rates, lengths = (calm, ratio * calm), (burst_seconds * (1 - share) / share, burst_seconds)
    state, changes, expected = int(random.random() < share), [0.0], [0.0]
    while changes[-1] < seconds:
        length = min(random.exponential(lengths[state]), seconds - changes[-1])
        changes.append(changes[-1] + length)
        expected.append(expected[-1] + length * rates[state])
        state = 1 - state
    return _time_changed(random, np.array(changes), np.array(expected), count)


def diurnal(
    rate: float,
    seconds: float,
    *,
    seed: int,
    count: int | None = None,
    swing: float = 0.8,
    day_seconds: float = 86_400.0,
) -> Times:
    """Return Poisson arrivals whose rate follows the time of day, starting at its lowest.

    Args:
        rate: Requests per second, over whole days.
        seconds: Duration.
        seed: The same seed gives the same times.
        count: Number of requests.
        swing: Amplitude of the rate, as a share of its mean.
        day_seconds: Length of a day.

    Raises:
        InputError: An argument is out of its bounds.
    """
    _check(rate, seconds)
    _check_positive(day_seconds=day_seconds)
    if not 0 <= swing <= 1:
        raise InputError(f"swing: expected a share of the rate in [0, 1], got {swing}")
    steps = min(10**6, _DAY_STEPS * max(1, round(seconds / day_seconds)))
    at = np.linspace(0, seconds, steps + 1)
    turn = 2 * np.pi / day_seconds
    # The integral of rate (1 - swing cos(turn t)).
    return _time_changed(np.random.default_rng(seed), at, rate * (at - swing * np.sin(turn * at) / turn), count)


def draw_rows(count: int, *, images: int, seed: int) -> Int[np.ndarray, " count"]:
    """Return the image of each request, drawn uniformly."""
    _check_positive(count=count, images=images)
    return np.random.default_rng([seed, images]).integers(0, images, count)


def of_rows(seconds: Times, *, images: int, seed: int) -> Trace:
    """Return a trace with these times and images from ``draw_rows``."""
    rows: Int32[np.ndarray, " n"] = draw_rows(len(seconds), images=images, seed=seed).astype(np.int32)
    return Trace(item=rows, seconds=seconds)


def _time_changed(random: np.random.Generator, at: Times, expected: Times, count: int | None) -> Times:
    """Return a unit Poisson process, mapped to time by the expected number of requests up to each time."""
    if count is None:
        count = max(1, int(random.poisson(expected[-1])))
    return np.interp(np.sort(random.uniform(0, expected[-1], count)), expected, at)


def _check(rate: float, seconds: float) -> None:
    _check_positive(rate=rate, seconds=seconds)
    if rate * seconds > MOST_REQUESTS:
        raise InputError(f"rate: expected at most {MOST_REQUESTS} requests, got {rate:g} a second for {seconds:g} s")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{name}: expected a number above 0, got {value}")
