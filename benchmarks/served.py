"""A contender behind the engine, in a process of its own, with the load generator beside it in another thread.

Every line on standard input is a load as JSON (``benchmarks.load.Load``), answered with its figures as a line of JSON.
So the generator uses the same cores as the server; ``generator_cores`` is its share.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import gati_jax
from benchmarks import targets
from serve import assemble
from serve.engine import routes
from serve.engine.engine import Engine
from serve.engine.programs import settle
from serve.engine.records import Runner
from train.config import build_config

from .driving import run
from .load import Load, measure
from .onnx_runner import CAPACITY, onnx_runner
from .worker import answers_descriptor

CASCADE, FULL, ONNX = "cascade", "full", "onnx"
CONTENDERS = (CASCADE, FULL, ONNX)


def runner_of(name: str, path: Path, images: np.ndarray, folder: Path) -> tuple[Runner, int]:
    """Return a contender's runner and the route of its requests."""
    if name == ONNX:
        return onnx_runner(path, images, folder), 0
    found = routes.load(gati_jax.load_bundle(path))
    runner = assemble.runner_of([r for r in found if name == CASCADE or not r.cascade.sites], CAPACITY)
    return runner, routes.default(runner.routes)


def main() -> None:
    """Serve the parent."""
    name, bundle, rows, classes = sys.argv[1:]
    answers = answers_descriptor()
    config = build_config(gati_jax.load_bundle(bundle).provenance.config)
    images = config.data.load(config.data.splits.test).images[: int(rows)]
    expected = np.load(classes)
    with tempfile.TemporaryDirectory() as folder:
        runner, route = runner_of(name, Path(bundle), images, Path(folder))
        engine = Engine(runner)
        settle()
        engine.start()
        ask = targets.in_process(engine, images, route=route, clock=time.monotonic)
        print(json.dumps("ready"), file=answers)
        for line in sys.stdin:
            load = Load(**json.loads(line))
            figures = run(measure(ask, load, images=len(images), expected=expected, cpu=time.thread_time))
            print(json.dumps(figures), file=answers)
        engine.stop(timeout=None)


if __name__ == "__main__":
    main()
