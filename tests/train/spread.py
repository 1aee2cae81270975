"""A small fit, epochs of a small step and a small base, on simulated devices or in one of several processes.

python -m tests.train.spread WORKS FOLDER DEVICES [WHERE]   WORKS such as fit,epochs go on from checkpoints in FOLDER,
                                                            to FOLDER/fit.npz; WHERE is a place, as train.base's
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gati_jax.devices import sharing
from gati_jax.fitting import LoopState, apply_gradients
from tests.fitting import tiny
from train import cli
from train.epochs import run_epochs, scan_epoch, steps_per_epoch

CONFIG = dataclasses.replace(tiny.CONFIG, epochs=2, reuse=2)
HALF = tiny.ROWS // CONFIG.batch
N, BATCH = 50, 16
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
Learned = list[np.ndarray]


class StoppedError(Exception):
    """Stands for a process that ends."""


def fit(folder: Path, *, half: bool = False) -> Learned:
    """What a fit learns: its predictor's and its selectors' arrays."""
    module = importlib.import_module("gati_jax.fitting.predictors")
    run_loop = module.run_loop

    def run_half(step: Any, state: Any, arrays: Any, config: Any, **options: Any) -> Any:
        run_loop(step, state, arrays, dataclasses.replace(config, steps=HALF), **options)
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        if half:
            patch.setattr(module, "run_loop", run_half)
        found = tiny.fit(sites=(1,), config=CONFIG, checkpoint=folder / "fitting")
    return [np.asarray(leaf) for leaf in jax.tree.leaves([[one.params for one in found], found.fold_selectors])]


def step(state: LoopState, rows: jax.Array) -> tuple[LoopState, dict[str, jax.Array]]:
    """Learn to predict a row's sum, with noise that each step draws for all of its rows."""
    key = jax.random.fold_in(jax.random.key(1), state.step)
    x = rows + 0.1 * jax.random.normal(key, rows.shape)

    def loss(params: jax.Array) -> jax.Array:
        centred = x - x.mean(0, keepdims=True)  # of the whole batch, as batch norm
        return jnp.mean((jnp.tanh(centred @ params) - centred.sum(1)) ** 2)

    value, gradients = jax.value_and_grad(loss)(state.params)
    params, opt_state = apply_gradients(OPTIMIZER, gradients, state.opt_state, state.params)
    return LoopState(state.step + 1, params, opt_state), {"loss": value}


def epochs(folder: Path, *, half: bool = False) -> Learned:
    """What four epochs of the step learn, and their losses."""
    rows = np.random.default_rng(0).standard_normal((N, 6)).astype(np.float32)
    devices, params = sharing(BATCH), jnp.zeros(6)
    losses: Learned = []

    def report(record: Any) -> None:
        if half and record.epoch > 2:
            raise StoppedError
        losses.append(record.metrics["loss"])

    state = run_epochs(
        scan_epoch(step, n=N, batch=BATCH, seed=5, devices=devices),
        LoopState(jnp.int32(0), params, OPTIMIZER.init(params)),
        (rows,),
        steps=steps_per_epoch(N, BATCH),
        epochs=4,
        report=report,
        checkpoint=folder / "epochs",
        checkpoint_seconds=0.0,
        progress=False,
        devices=devices,
    )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)] + losses[-2:]


WORKS: dict[str, Callable[..., Learned]] = {"fit": fit, "epochs": epochs}


def main(works: str, folder: Path, where: list[str]) -> None:
    parser = cli.parser("", "python -m tests.train.spread", out=False, as_json=False)
    cli.add_process(parser)
    leads = cli.join(parser.parse_args([word for place in where for word in ("--process", place)]))
    for name in works.split(","):
        learned = WORKS[name](folder)
        if leads:
            np.savez(folder / f"{name}.npz", np.int32(jax.device_count()), *learned)


if __name__ == "__main__":
    more = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={sys.argv[3]}"
    os.environ["XLA_FLAGS"] = more  # read when the first array is made
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[4:])
