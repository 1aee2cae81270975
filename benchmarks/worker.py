"""One contender of ``benchmarks.compare`` in a process of its own, because thread pools would disturb one another.

It reads commands from standard input: ``time START SIZE CALLS`` returns the milliseconds of each of CALLS batches, from
image START on; ``answers`` returns the class of every image and the peak memory. Answers are lines of JSON on the
original standard output.
"""

import functools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

import numpy as np

import gati_jax
from gati_jax import Normalization
from gati_jax.models import architecture
from train.config import Config, build_config

from .contenders import CONTENDERS, Predict, Task

CHUNK = 128


def main() -> None:
    """Answer the parent process."""
    name, bundle, network, weights, rows = sys.argv[1:]
    answers = answers_descriptor()
    config = build_config(gati_jax.load_bundle(bundle).provenance.config)
    images = config.data.load(config.data.splits.test).images[: int(rows)]
    with tempfile.TemporaryDirectory() as folder:
        predict = CONTENDERS[name](task_of(Path(bundle), config, network, Path(weights), Path(folder)))
        print(json.dumps("ready"), file=answers)
        for line in sys.stdin:
            command, *numbers = line.split()
            if command == "time":
                start, size, calls = map(int, numbers)
                wanted = [range(start + i * size, start + (i + 1) * size) for i in range(calls)]
                batches = [np.ascontiguousarray(np.take(images, rows, axis=0, mode="wrap")) for rows in wanted]
                predict(batches[0])  # the processor's caches are cold after the other turns
                print(json.dumps([milliseconds(predict, batch) for batch in batches]), file=answers)
            else:
                chunks = [predict(images[i : i + CHUNK]).argmax(-1) for i in range(0, len(images), CHUNK)]
                print(json.dumps([np.concatenate(chunks).tolist(), peak_mib()]), file=answers)


def answers_descriptor() -> TextIO:
    """Return standard output for the answers, and redirect what libraries print to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def task_of(bundle: Path, config: Config, network: str, weights: Path, folder: Path) -> Task:
    """Return the input of a contender."""
    return Task(
        bundle=bundle,
        network=architecture(network, classes=config.base.classes, input_shape=config.base.input_shape),
        weights=weights,
        normalization=normalization_of(network, config),
        cores=len(os.sched_getaffinity(0)),
        fit=functools.partial(config.data.load, config.data.splits.fit),
        select=functools.partial(config.data.load, config.data.splits.select),
        epsilon=config.plan.epsilon,
        folder=folder,
    )


def milliseconds(predict: Predict, batch: np.ndarray) -> float:
    """Time one call."""
    started = time.perf_counter()
    predict(batch)
    return (time.perf_counter() - started) * 1e3


def peak_mib() -> float | None:
    """Return this process's peak memory; ``ru_maxrss`` would include the parent's."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def normalization_of(network: str, config: Config) -> Normalization:
    """Return a network's normalisation; the bundle's config also has those of its small networks."""
    small = next((small for small in config.fit.networks if small.network == network), None)
    own = small.normalization if small and network != config.base.network else None
    return own or config.base.normalize()


if __name__ == "__main__":
    main()
