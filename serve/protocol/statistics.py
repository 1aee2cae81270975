"""What the protocol's ModelStatistics ask for: counts and times that add up."""

import threading
import time
from typing import NamedTuple

from serve.records import Step

from .messages import BatchStatistics, Duration, InferStatistics, ModelStatistics, Statistics


class Times(NamedTuple):
    """Where a request's time went, in seconds."""

    total: float
    decoding: float
    computing: float  # in steps, of the row that spent most there
    encoding: float


class Tally:
    """Adds up requests, as the front sees them, and steps, which come from the engine's thread."""

    def __init__(self) -> None:
        """Start from nothing."""
        self._lock = threading.Lock()
        self._steps: dict[int, tuple[int, float]] = {}  # by rows: how many, seconds
        self._answered = self._images = self._failed = self._last_ms = 0
        self._times = Times(0.0, 0.0, 0.0, 0.0)
        self._failing = 0.0

    def step(self, step: Step, seconds: float) -> None:
        """Count a step."""
        with self._lock:
            count, total = self._steps.get(len(step.jobs), (0, 0.0))
            self._steps[len(step.jobs)] = (count + 1, total + seconds)

    def answered(self, rows: int, times: Times) -> None:
        """Count an answered request."""
        with self._lock:
            self._answered += 1
            self._images += rows
            self._last_ms = time.time_ns() // 1_000_000
            self._times = Times(*(a + b for a, b in zip(self._times, times, strict=True)))

    def failed(self, seconds: float) -> None:
        """Count a request that got an error."""
        with self._lock:
            self._failed += 1
            self._failing += seconds

    def snapshot(self, name: str, version: str) -> ModelStatistics:
        """Return the statistics of now.

        What is neither decoding nor in a step nor encoding was waiting: so the parts add up to the whole.
        """
        with self._lock:
            times, answered, steps = self._times, self._answered, dict(self._steps)
            failed, images, last_ms = Duration(count=self._failed, ns=_ns(self._failing)), self._images, self._last_ms
        parts = [_ns(seconds) for seconds in (times.decoding, times.computing, times.encoding)]
        total = max(_ns(times.total), sum(parts))
        decoding, computing, encoding, waiting, whole = (
            Duration(count=answered, ns=ns) for ns in (*parts, total - sum(parts), total)
        )
        one = Statistics(
            name=name,
            version=version,
            last_inference=last_ms,
            inference_count=images,
            execution_count=sum(count for count, _ in steps.values()),
            inference_stats=InferStatistics(
                success=whole,
                fail=failed,
                queue=waiting,
                compute_input=decoding,
                compute_infer=computing,
                compute_output=encoding,
            ),
            batch_stats=[
                BatchStatistics(batch_size=rows, compute_infer=Duration(count=count, ns=_ns(seconds)))
                for rows, (count, seconds) in sorted(steps.items())
            ],
        )
        return ModelStatistics(model_stats=[one])


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
