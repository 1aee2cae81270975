"""When requests come: laws of arrival, made from a seed.

Each returns times in seconds from the start, never falling. Without ``count`` their number is as random as the law has
it; with it, times are the law's given that so many come.
"""

import numpy as np
from jaxtyping import Float64, Int, Int32

from gati_jax import InputError
from gati_jax.adaptation import Trace
from gati_jax.adaptation.trace import MOST_REQUESTS

Times = Float64[np.ndarray, " n"]
_DAY_STEPS = 1440  # of the piecewise linear law of a day


def steady(rate: float, seconds: float, *, count: int | None = None) -> Times:
    """Return one request after another at even distances, from a camera or a batch job.

    Args:
        rate: Requests a second.
        seconds: How long they come.
        count: So many, at that rate.
    """
    _check(rate, seconds)
    return np.arange(max(1, round(rate * seconds)) if count is None else count) / rate


def poisson(rate: float, seconds: float, *, seed: int, count: int | None = None) -> Times:
    """Return arrivals that know nothing of one another.

    Args:
        rate: Requests a second.
        seconds: How long they come.
        seed: The same seed gives the same times.
        count: So many.
    """
    _check(rate, seconds)
    return _seen_through(np.random.default_rng(seed), np.array([0, seconds]), np.array([0, rate * seconds]), count)


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
    """Return arrivals of a Markov-modulated Poisson process: bursts and calms of exponential length follow one another.

    Args:
        rate: Requests a second, bursts and calms together.
        seconds: How long they come.
        seed: The same seed gives the same times.
        count: So many.
        ratio: The rate within bursts over the rate between them.
        share: Of the time, how much is bursts.
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
    return _seen_through(random, np.array(changes), np.array(expected), count)


def diurnal(
    rate: float,
    seconds: float,
    *,
    seed: int,
    count: int | None = None,
    swing: float = 0.8,
    day_seconds: float = 86_400.0,
) -> Times:
    """Return Poisson arrivals whose rate rises and falls with the time of day, beginning at its lowest.

    Args:
        rate: Requests a second, over whole days.
        seconds: How long they come.
        seed: The same seed gives the same times.
        count: So many.
        swing: How far the rate goes up and down, as a share of its mean.
        day_seconds: How long a day is.

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
    return _seen_through(np.random.default_rng(seed), at, rate * (at - swing * np.sin(turn * at) / turn), count)


def draw_rows(count: int, *, images: int, seed: int) -> Int[np.ndarray, " count"]:
    """Return what clients ask for, one request after another, each image as likely as any other."""
    _check_positive(count=count, images=images)
    return np.random.default_rng([seed, images]).integers(0, images, count)


def of_rows(seconds: Times, *, images: int, seed: int) -> Trace:
    """Return requests at these times, for images drawn as in ``draw_rows``."""
    rows: Int32[np.ndarray, " n"] = draw_rows(len(seconds), images=images, seed=seed).astype(np.int32)
    return Trace(item=rows, seconds=seconds)


def _seen_through(random: np.random.Generator, at: Times, expected: Times, count: int | None) -> Times:
    """Return a unit Poisson process seen through the requests ``expected`` up to each time, piecewise linear."""
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
