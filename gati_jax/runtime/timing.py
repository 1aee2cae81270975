"""Timing programs in turn, so that a disturbance of the machine meets all of them."""

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float


def time_interleaved(
    programs: Mapping[str, Callable[[], object]], *, rounds: int
) -> dict[str, Float[np.ndarray, " rounds"]]:
    """Time programs in turn, so that a disturbance of the machine meets all of them.

    Args:
        programs: Each returns what ``jax.block_until_ready`` can wait for. All are run once before, to warm up.
        rounds: How often each is timed.

    Returns:
        Milliseconds of every run.
    """
    for program in programs.values():
        jax.block_until_ready(program())
    times = {name: np.empty(rounds) for name in programs}
    for i in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            times[name][i] = (time.perf_counter() - start) * 1e3
    return times


def time_turns(
    programs: Mapping[str, Sequence[Callable[[], object]]], rounds: int
) -> dict[str, Float[np.ndarray, "rounds groups"]]:
    """Let contenders take turns in answering all groups, one after another.

    Who has just run has its weights in the processor's caches, as under traffic; were another to run in between, each
    would find them cold.
    """
    times = {name: np.empty((rounds, len(calls))) for name, calls in programs.items()}
    for i in range(-1, rounds):  # the first turn warms up
        for name, calls in programs.items():
            for g, call in enumerate(calls):
                start = time.perf_counter()
                jax.block_until_ready(call())
                if i >= 0:
                    times[name][i, g] = (time.perf_counter() - start) * 1e3
    return times


def spread(times: Float[np.ndarray, " rounds"]) -> float:
    """Return the interquartile range over the median."""
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
    return float((high - low) / median)
