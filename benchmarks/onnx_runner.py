"""ONNX Runtime's full network behind our engine: one route of one stage, so that only the network differs."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

import gati_jax
from gati_jax import InputError
from serve.engine.records import Route, Running, StageResult, Step
from train.config import build_config

from .contenders import CONTENDERS, Predict
from .worker import task_of

BUCKETS = (1, 2, 4, 8, 16, 32)
CAPACITY = 256
ROUNDS = 9
ROUTE = "onnx"


class _Done:
    """A step that has run."""

    def __init__(self, result: StageResult) -> None:
        self._result = result

    def result(self) -> StageResult:
        return self._result


class FullRunner:
    """A full network, as a function from images to logits, that the engine can run.

    It takes batches without padding, because ONNX Runtime needs none. It computes within ``dispatch``: another thread
    would only add to its time, because the engine waits anyway.
    """

    def __init__(
        self,
        predict: Predict,
        *,
        depth: int,
        stage_ms: Mapping[int, tuple[float, ...]],
        capacity: int = CAPACITY,
        name: str = ROUTE,
    ) -> None:
        """Take a network.

        Args:
            predict: From images to logits.
            depth: Blocks of the network: the exit of every answer.
            stage_ms: See ``measure``.
            capacity: The most requests in flight.
            name: The route's.
        """
        self._predict, self._capacity = predict, capacity
        self._routes = (Route(name=name, sites=(), depth=depth, epsilon=None, stage_ms=stage_ms, leave=(1.0,)),)

    @property
    def routes(self) -> tuple[Route, ...]:
        """Its only route."""
        return self._routes

    @property
    def capacity(self) -> int:
        """Slots; they hold nothing, but all contenders get the same number."""
        return self._capacity

    def dispatch(self, step: Step) -> Running:
        """Compute a step."""
        logits = self._predict(np.stack([job.image for job in step.jobs]))
        n = len(logits)
        return _Done(StageResult(np.ones(n, bool), logits.argmax(-1), np.full(n, math.inf, np.float32), logits))


def measure(
    predict: Predict, images: np.ndarray, *, rounds: int = ROUNDS, clock: Callable[[], float] = time.perf_counter
) -> dict[int, tuple[float, ...]]:
    """Return, by bucket, the median milliseconds of a batch; buckets take turns, and the first round is not counted."""
    times: dict[int, list[float]] = {bucket: [] for bucket in BUCKETS}
    for _ in range(1 + rounds):
        for bucket, ms in times.items():
            batch = np.take(images, range(bucket), axis=0, mode="wrap")
            start = clock()
            predict(batch)
            ms.append((clock() - start) * 1e3)
    return {bucket: (statistics.median(ms[1:]),) for bucket, ms in times.items()}


def onnx_runner(path: Path, images: np.ndarray, folder: Path) -> FullRunner:
    """Export a bundle's base from PyTorch and open it in ONNX Runtime.

    Args:
        path: The bundle's, whose provenance says which network and weights.
        images: To time it on.
        folder: For the exported file.
    """
    bundle = gati_jax.load_bundle(path)
    config = build_config(bundle.provenance.config)
    if config.base.weights is None:
        raise InputError("bundle: expected the file of its base's weights in its provenance, got none")
    task = task_of(path, config, config.base.network, config.base.weights, folder)
    predict = CONTENDERS["onnxruntime full"](task)
    return FullRunner(predict, depth=len(bundle.chain.blocks), stage_ms=measure(predict, images))
