"""Whole epochs in one program: the data stay on the device, and the host reads metrics once an epoch."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from gati_jax.devices import ONE, Devices
from gati_jax.errors import InputError
from gati_jax.fitting.loop import LoopState, progress_bar, resume

_log = logging.getLogger("train.epochs")

Epoch = Callable[..., tuple[LoopState, PyTree]]
"""``epoch(state, *arrays[n, ...]) -> (state, metrics[steps])``, pure."""


class EpochRecord(NamedTuple):
    """What an epoch reports to the host."""

    epoch: int  # 1 is the first
    seconds: float  # without compilation
    metrics: dict[str, Float[np.ndarray, " steps"]]


def steps_per_epoch(n: int, batch: int) -> int:
    """Return the number of whole batches among ``n`` rows, of which there must be one."""
    if n < batch:
        raise InputError(f"images: expected at least one batch of {batch} rows, got {n}")
    return n // batch


def scan_epoch(
    step: Callable[..., tuple[LoopState, PyTree]], *, n: int, batch: int, seed: int, devices: Devices = ONE
) -> Epoch:
    """Return one epoch over ``n`` rows as a single ``lax.scan``; rows after the last whole batch are left out.

    Args:
        step: ``step(state, *rows[batch, ...]) -> (state, metrics)``, pure, and random only through ``state.step``.
        n: Rows.
        batch: Rows in a step.
        seed: Order of the rows, another one in every epoch.
        devices: They share the rows of a batch.

    Raises:
        InputError: Fewer rows than one batch.
    """
    steps = steps_per_epoch(n, batch)

    def epoch(state: LoopState, *arrays: Array) -> tuple[LoopState, PyTree]:
        order = epoch_order(seed, state.step // steps, n)[: steps * batch].reshape(steps, batch)

        def learn(state: LoopState, rows: Array) -> tuple[LoopState, PyTree]:
            return devices.as_copies(step(state, *(devices.as_rows(array[rows]) for array in arrays)))

        return jax.lax.scan(learn, state, order)

    return epoch


def epoch_order(seed: int, epoch: Int[Array, ""] | int, n: int) -> Int[Array, " n"]:
    """Return the order of the rows in an epoch, 0 the first."""
    return jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), n)


def run_epochs(
    epoch: Epoch,
    state: LoopState,
    arrays: tuple[Array | np.ndarray, ...],
    *,
    steps: int,
    epochs: int,
    report: Callable[[EpochRecord], None] = lambda _: None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    identity: str = "",
    description: str = "training",
    progress: bool = True,
    options: dict[str, Any] | None = None,
    devices: Devices = ONE,
) -> LoopState:
    """Run ``epoch`` until ``epochs`` are done, from the last checkpoint on.

    Args:
        epoch: See ``scan_epoch``; compiled once, ahead of time, and the state's memory used again.
        state: Where to begin; a checkpoint of the same ``identity`` replaces it.
        arrays: The data that the epoch takes, put on every device once.
        steps: Steps of an epoch.
        epochs: Epochs in all.
        report: Called after every epoch, before it is saved; so an epoch that was not saved is reported again.
        checkpoint: Folder for checkpoints; None keeps none. The newest is kept, until the caller removes the folder.
        checkpoint_seconds: Least time between two checkpoints.
        identity: Configuration and data: a checkpoint of another identity is not resumed.
        description: Label of the progress bar.
        progress: Whether to draw one, if standard error is a terminal.
        options: Compiler options.
        devices: As the epoch was made for.

    Raises:
        InputError: The last checkpoint is damaged.
    """
    message = f"{description}: resumed at step %d of {steps * epochs}"
    checkpointer, state = resume(checkpoint, identity, devices.copy(state), message)
    first = int(state.step) // steps
    resident = tuple(devices.copy(array) if devices.count > 1 else jax.device_put(array) for array in arrays)
    state = jax.tree.map(jnp.copy, state)  # donated, and the caller keeps his own
    if first < epochs:
        began = time.monotonic()
        _log.info("%s: compiling", description)
        program = jax.jit(epoch, donate_argnums=0, compiler_options=options).lower(state, *resident).compile()
        _log.info("%s: compiled in %.0f s", description, time.monotonic() - began)
        with progress_bar(progress) as bar:
            task = bar.add_task(description, total=steps * epochs, completed=steps * first)
            saved = time.monotonic()
            for number in range(first + 1, epochs + 1):
                began = time.monotonic()
                state, metrics = program(state, *resident)
                metrics = jax.device_get(metrics)
                report(EpochRecord(number, time.monotonic() - began, metrics))
                bar.update(task, completed=steps * number)
                due = jax.process_count() > 1 or time.monotonic() - saved >= checkpoint_seconds  # clocks may differ
                if checkpointer and (number == epochs or due):
                    checkpointer.save(steps * number, state)
                    saved = time.monotonic()
    if checkpointer:
        checkpointer.close()
    return devices.collect(state)
