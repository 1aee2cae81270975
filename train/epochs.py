"""Whole epochs in one program: the data stays on the device, and the host hears of every epoch once."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from gati_jax.errors import InputError
from gati_jax.fitting.loop import LoopState, checkpoint_folder, open_checkpoints, progress_bar
from gati_jax.pytrees import restore_spec

_log = logging.getLogger(__name__)

Epoch = Callable[..., tuple[LoopState, PyTree]]
"""``epoch(state, *arrays[n, ...]) -> (state, what every step said, stacked)``, pure."""


class EpochRecord(NamedTuple):
    """What the host hears of an epoch."""

    epoch: int  # 1 is the first
    seconds: float  # without compilation
    said: dict[str, Float[np.ndarray, " steps"]]


def scan_epoch(step: Callable[..., tuple[LoopState, PyTree]], *, n: int, batch: int, seed: int) -> Epoch:
    """Return one epoch over ``n`` rows as a single ``lax.scan``; rows behind the last whole batch are left out.

    Args:
        step: ``step(state, *rows[batch, ...]) -> (state, metrics)``, pure, and random only through ``state.step``.
        n: Rows.
        batch: Rows in a step.
        seed: Order of the rows, another one in every epoch.

    Raises:
        InputError: Fewer rows than one batch.
    """
    steps = n // batch
    if steps == 0:
        raise InputError(f"images: expected at least one batch of {batch} rows, got {n}")

    def epoch(state: LoopState, *arrays: Array) -> tuple[LoopState, PyTree]:
        order = epoch_order(seed, state.step // steps, n)[: steps * batch].reshape(steps, batch)
        return jax.lax.scan(lambda state, rows: step(state, *(array[rows] for array in arrays)), state, order)

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
) -> LoopState:
    """Run ``epoch`` until ``epochs`` are done, from the last checkpoint on.

    Args:
        epoch: See ``scan_epoch``; compiled once, ahead of time, and the state's memory used again.
        state: Where to begin; a checkpoint of the same ``identity`` replaces it.
        arrays: What the epoch takes, put on the device once.
        steps: In an epoch.
        epochs: In all.
        report: Called behind every epoch, before it is saved: what is reported twice was not saved in between.
        checkpoint: Folder for checkpoints; None keeps none. The newest is kept, until the caller removes the folder.
        checkpoint_seconds: Least time between two checkpoints.
        identity: Whatever makes two runs the same (configuration, data): only then is a checkpoint taken up.
        description: Label of the progress bar.
        progress: Whether to draw one, if standard error is a terminal.
        options: The compiler's.

    Raises:
        InputError: The last checkpoint is damaged.
    """
    checkpointer = open_checkpoints(checkpoint, identity)
    if checkpoint and checkpointer and checkpointer.latest:
        try:
            state = checkpointer.load(abstract_state=restore_spec(state))
        except Exception as error:  # Orbax raises many kinds for a damaged checkpoint
            folder = checkpoint_folder(checkpoint, identity)
            raise InputError(
                f"checkpoint: expected one that can be read, got {type(error).__name__}; remove {folder} to begin anew"
            ) from error
        _log.info("%s: resumed at step %d of %d", description, int(state.step), steps * epochs)
    first = int(state.step) // steps
    resident = tuple(jax.device_put(array) for array in arrays)
    state = jax.tree.map(jnp.copy, state)  # the caller's stays his: ours is donated
    if first < epochs:
        began = time.monotonic()
        program = jax.jit(epoch, donate_argnums=0, compiler_options=options).lower(state, *resident).compile()
        _log.info("%s: compiled in %.0f s", description, time.monotonic() - began)
        with progress_bar(progress) as bar:
            task = bar.add_task(description, total=steps * epochs, completed=steps * first)
            saved = time.monotonic()
            for number in range(first + 1, epochs + 1):
                began = time.monotonic()
                state, said = program(state, *resident)
                said = jax.device_get(said)
                report(EpochRecord(number, time.monotonic() - began, said))
                bar.update(task, completed=steps * number)
                if checkpointer and (number == epochs or time.monotonic() - saved >= checkpoint_seconds):
                    checkpointer.save(steps * number, state)
                    saved = time.monotonic()
    if checkpointer:
        checkpointer.close()
    return state
