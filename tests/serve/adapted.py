"""An adaptive server of a small world, and what its folder of versions has it serve.

Run as ``python -m tests.serve.adapted FOLDER BUNDLE`` it is a process to be killed: it serves bright images until all
caches are closed, prints "safe", and waits.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Generator
from pathlib import Path

import gati_jax
from gati_jax.adaptation import ControllerConfig, ExactCacheConfig, MonitorConfig, served_by
from gati_jax.bundle.record import certified_only
from serve import adaptive
from serve.adaptive import AdaptiveParts
from serve.adaptive.build import swapper
from serve.adaptive.engine import AdaptiveEngine
from serve.engine.engine import Engine
from serve.engine.records import OverloadedError
from serve.engine.runner import JaxRunner
from serve.metrics import Metrics
from serve.protocol.model import Tally
from tests.adaptation import world

DEPTH = 3
PATIENCE = 60
QUIET = ControllerConfig(
    monitor=MonitorConfig(epsilon=world.EPSILON, drift=False), exact=ExactCacheConfig(often=2), nearest=None
)
_running: dict[Path, AdaptiveParts] = {}  # by folder


def build(folder, bundle=None, *, capacity=8, **options) -> AdaptiveParts:
    """Build a server; the one before it in this folder ends as if it had been killed."""
    ended(folder)
    options = {"config": QUIET, **options}
    _running[folder] = adaptive.build(bundle or world.bundle(), folder, capacity=capacity, **options)
    return _running[folder]


def ended(folder):
    """Have the folder's server hold it no longer."""
    if folder in _running:
        _running.pop(folder).store.close()


@contextlib.contextmanager
def running(parts, *, capacity=64) -> Generator[AdaptiveEngine]:
    """Start a server's engine, without its worker."""
    runner = JaxRunner(parts.sources, capacity=capacity, buckets=(1, 4))
    engine = Engine(runner, observer=parts.adapting, shadow=parts.adapting.shadow)
    parts.adapting.report_to(Metrics().of("gati", engine.routes, Tally()))
    parts.adapting.serve(engine, swapper(runner, parts.sources[0]))
    engine.start()
    try:
        yield parts.adapting
    finally:
        finished = parts.adapting.stop(PATIENCE)
    assert finished


def bright_until(one, done):
    """Have every hit compared with the base, and ask for images that the caches get wrong, until ``done``."""
    one.read(lambda controller: controller.monitor.shadow_all(on=True))
    for seed in range(1000, 1500):
        with contextlib.suppress(OverloadedError):  # shadow jobs take places, too
            for future in one.submit(world.images(16, seed, bright=True), route=0):
                future.result(PATIENCE)
            if done():
                return
        time.sleep(0.001)
    raise AssertionError("no alarm")


def certified(*, step=None, epsilon=world.EPSILON):
    """The certified plan at an earlier step: other thresholds than those that the bundle came with."""
    bundle = certified_only(world.bundle())
    step = len(bundle.plan.path) - 2 if step is None else step
    certificate = dataclasses.replace(bundle.certificate, step=step, plan_hash=bundle.plan.hash, epsilon=epsilon)
    return dataclasses.replace(bundle, certificate=certificate)


def served(folder):
    """The thresholds that a server with this folder of versions starts with."""
    return build(folder).adapting.controller.served.thresholds.tolist()


def of(bundle):
    return served_by(bundle).thresholds.tolist()


def as_given():
    return of(certified_only(world.bundle()))


def main():
    folder, bundle = map(Path, sys.argv[1:])
    with running(build(folder, gati_jax.load_bundle(bundle, chain=world.chain()), capacity=64)) as one:
        bright_until(one, lambda: one.notes(0) == {"adaptation": "safe"})
        sys.stdout.write("safe\n")
        sys.stdout.flush()
        time.sleep(PATIENCE)


if __name__ == "__main__":
    main()
