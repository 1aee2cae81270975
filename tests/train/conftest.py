"""One pass through the house, shared by the tests of the scripts."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import gati_jax
from gati_jax import data
from gati_jax.evaluation import timing
from gati_jax.planning import ReplayTable
from tests.train.one_pass import (
    DIGITS,
    SPLITS,
    TESTED,
    Run,
    caches_arguments,
    evaluate_arguments,
    json_of,
    looks_in,
    small_and_repeatable,
)
from train import base, caches, evaluate


@pytest.fixture(scope="session", autouse=True)
def only_reference_programs() -> Iterator[None]:
    """No search for the fastest full network, which compiles several programs; test_backends.py has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "contenders", lambda *_: {})
        yield


@pytest.fixture
def tiny() -> Iterator[None]:
    with small_and_repeatable():
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    """Base, caches, evaluation."""
    folder, loaded, load = tmp_path_factory.mktemp("run"), [], data.load

    def recording(name: str, split: str, data_dir: Path | None = None) -> data.Dataset:
        loaded.append(split)
        return load(name, split, data_dir)

    base_out = str(folder / "base")
    with small_and_repeatable():
        trained = json_of(base.main, *DIGITS, *SPLITS, "--out", base_out, "--base.training.epochs", "6")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data, "load", recording)
            fitted = json_of(
                caches.main, *caches_arguments(folder), *looks_in(folder / "caches"), "--out", str(folder / "caches")
            )
    evaluated = json_of(evaluate.main, *evaluate_arguments(folder, folder / "eval"), "--timed", str(TESTED))
    return Run(folder, trained, fitted, evaluated, loaded)


@pytest.fixture(scope="session")
def tested(run) -> data.Dataset:
    del run
    return data.load("digits", f"all[1497:{1497 + TESTED}]")


@pytest.fixture(scope="session")
def table(run, tested) -> ReplayTable:
    """What base and caches say to the test images, each alone."""
    return gati_jax.replay(run.bundle.chain, run.bundle.cascade.caches, tested.images, labels=tested.labels)


@pytest.fixture(scope="session")
def predictions(run, tested) -> list[gati_jax.Prediction]:
    return [gati_jax.infer(run.bundle, image) for image in tested.images]


@pytest.fixture
def quiet_logging() -> Iterator[None]:
    """Take back what ``cli.run`` does to the process's logging."""
    root, names = logging.getLogger(), ("gati_jax", "train", "absl")
    handlers, level, levels = root.handlers[:], root.level, [logging.getLogger(name).level for name in names]
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(old)
    logging.captureWarnings(capture=False)
