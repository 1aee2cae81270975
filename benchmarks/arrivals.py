"""When requests come, and which image each asks for: made from a seed, or recorded.

A trace is a file that anyone can write. As JSON:

    {"format_version": 1, "times": [0.0, 0.013, ...], "rows": [17, 4, ...]}

``times``: seconds from the start, never falling. ``rows``: for each request, the row of a dataset's split. As NPZ:
arrays of the same names, ``times`` float64[n] and ``rows`` int64[n].
"""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from gati_jax import InputError

FORMAT_VERSION = 1
MOST_REQUESTS = 10_000_000
LONGEST_SECONDS = 7 * 24 * 3600.0


@dataclasses.dataclass(frozen=True)
class Trace:
    """Requests in the order in which they come."""

    times: Float[np.ndarray, " n"]
    """Seconds from the start, never falling."""
    rows: Int[np.ndarray, " n"]
    """The image of each."""

    def __post_init__(self) -> None:
        """Check it.

        Raises:
            InputError: Lengths that differ, or times or rows out of bounds.
        """
        if self.times.ndim != 1 or self.times.shape != self.rows.shape:
            shapes = f"{list(self.times.shape)} and {list(self.rows.shape)}"
            raise InputError(f"trace: expected times[n] and rows[n], got {shapes}")
        if not 0 < len(self.times) <= MOST_REQUESTS:
            raise InputError(f"trace: expected 1 .. {MOST_REQUESTS} requests, got {len(self.times)}")
        bounded = (self.times >= 0) & (self.times <= LONGEST_SECONDS)  # false for NaN
        if not bounded.all():
            i = int(np.flatnonzero(~bounded)[0])
            raise InputError(f"trace: expected times in 0 .. {LONGEST_SECONDS:g} s, got times[{i}] = {self.times[i]}")
        if (np.diff(self.times) < 0).any():
            i = int(np.flatnonzero(np.diff(self.times) < 0)[0])
            pair = f"times[{i}] = {self.times[i]} before times[{i + 1}] = {self.times[i + 1]}"
            raise InputError(f"trace: expected times that never fall, got {pair}")
        if (self.rows < 0).any():
            raise InputError(f"trace: expected rows of 0 or more, got {self.rows.min()}")

    def __len__(self) -> int:
        """Return n."""
        return len(self.times)


def poisson(rate: float, seconds: float, *, images: int, seed: int) -> Trace:
    """Return arrivals that know nothing of one another.

    Args:
        rate: Requests a second.
        seconds: How long they come.
        images: Rows to draw from, each as likely as any other.
        seed: The same seed gives the same trace.
    """
    return bursty(rate, seconds, images=images, seed=seed, ratio=1.0)


def bursty(
    rate: float,
    seconds: float,
    *,
    images: int,
    seed: int,
    ratio: float = 5.0,
    share: float = 0.2,
    burst_seconds: float = 0.5,
) -> Trace:
    """Return arrivals of a Markov-modulated Poisson process: bursts and calms of exponential length follow one another.

    Args:
        rate: Requests a second, bursts and calms together.
        seconds: How long they come.
        images: Rows to draw from, each as likely as any other.
        seed: The same seed gives the same trace.
        ratio: The rate within bursts over the rate between them.
        share: Of the time, how much is bursts.
        burst_seconds: A burst's mean length.

    Raises:
        InputError: An argument is out of its bounds.
    """
    _check_positive(rate=rate, seconds=seconds, images=images, ratio=ratio, burst_seconds=burst_seconds)
    if not 0 < share < 1:
        raise InputError(f"share: expected a share of the time in (0, 1), got {share}")
    if rate * seconds > MOST_REQUESTS:
        raise InputError(f"rate: expected at most {MOST_REQUESTS} requests, got {rate:g} a second for {seconds:g} s")
    random = np.random.default_rng(seed)
    calm = rate / (1 + share * (ratio - 1))
    rates, lengths = (calm, ratio * calm), (burst_seconds * (1 - share) / share, burst_seconds)
    # Requests expected up to every change, piecewise linear: the arrivals are a unit Poisson process seen through it.
    state, changes, expected = int(random.random() < share), [0.0], [0.0]
    while changes[-1] < seconds:
        length = min(random.exponential(lengths[state]), seconds - changes[-1])
        length = seconds - changes[-1] if ratio == 1 else length
        changes.append(changes[-1] + length)
        expected.append(expected[-1] + length * rates[state])
        state = 1 - state
    count = max(1, int(random.poisson(expected[-1])))
    times = np.interp(np.sort(random.uniform(0, expected[-1], count)), expected, changes)
    return Trace(times, random.integers(0, images, count))


def draw_rows(count: int, *, images: int, seed: int) -> Int[np.ndarray, " count"]:
    """Return what clients of a closed loop ask for, one after another."""
    _check_positive(count=count, images=images)
    return np.random.default_rng(seed).integers(0, images, count)


def save(path: Path, trace: Trace) -> None:
    """Write a trace as .json or .npz.

    Raises:
        InputError: Another suffix.
    """
    if path.suffix == ".npz":
        np.savez_compressed(path, times=trace.times, rows=trace.rows)
    elif path.suffix == ".json":
        content = {"format_version": FORMAT_VERSION, "times": trace.times.tolist(), "rows": trace.rows.tolist()}
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    else:
        raise InputError(f"trace: expected a file named *.json or *.npz, got {path}")


def load(path: Path, *, images: int) -> Trace:
    """Read a trace.

    Args:
        path: A .json or .npz file.
        images: How many rows there are to ask for.

    Raises:
        InputError: It is no trace, or asks for a row that does not exist.
    """
    try:
        content = _read(path)
        times, rows = np.asarray(content["times"], np.float64), np.asarray(content["rows"])
        rows = rows.astype(np.int64, casting="safe")
    except (ValueError, KeyError, TypeError, OverflowError, EOFError, zipfile.BadZipFile) as error:
        msg = f"trace: expected times and rows, see benchmarks/arrivals.py, got {path}: {error!r}"
        raise InputError(msg) from error
    trace = Trace(times, rows)
    if trace.rows.max() >= images:
        raise InputError(f"trace: expected rows below {images}, the number of images, got {trace.rows.max()} in {path}")
    return trace


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".npz":
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("times", "rows")}
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version {content['format_version']}, not {FORMAT_VERSION}")
    return content


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{name}: expected a number above 0, got {value}")
