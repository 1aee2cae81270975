"""The one training loop: epochs of shuffled batches, a progress bar, checkpoints, exact resumption."""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from gati_jax._checkpoint import open_checkpoints, restore_spec
from gati_jax._errors import InputError
from gati_jax.data import batches

from ._progress import progress_bar

_log = logging.getLogger(__name__)


class LoopState(NamedTuple):
    """All that an interrupted run needs to go on exactly where it was."""

    step: Int[Array, ""]  # steps taken
    params: PyTree
    opt_state: PyTree


Step = Callable[..., tuple[LoopState, Float[Array, ""]]]
"""``step(state, *rows[batch, ...]) -> (state, loss)``; jitted, and random only through ``state.step``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and from what.

    Args:
        epochs: Passes over the data.
        batch: Rows in a step.
        seed: Order of the rows.
        checkpoint_seconds: Least time between two checkpoints; as many times more as one takes seconds to write.
        steps: Where to end, if that is before the last epoch's end.
        seconds: Time after which no further step is begun.
        clock: Tells the time in seconds.
    """

    epochs: int
    batch: int
    seed: int = 0
    checkpoint_seconds: float = 30.0
    steps: int | None = None
    seconds: float | None = None
    clock: Callable[[], float] = time.monotonic


def run_loop(
    step: Step,
    state: LoopState,
    arrays: tuple[np.ndarray, ...],
    config: LoopConfig,
    *,
    checkpoint: Path | None = None,
    identity: str = "",
    description: str = "training",
    progress: bool = True,
) -> LoopState:
    """Run ``step`` over shuffled batches of ``arrays``.

    Args:
        step: See ``Step``.
        state: Where to begin; a checkpoint of the same ``identity`` replaces it.
        arrays: Rows to draw from, all of one length.
        config: Epochs, batch size, seed.
        checkpoint: Folder for checkpoints; None keeps none. The newest is kept, until the caller removes the folder.
        identity: Whatever makes two runs the same (configuration, data): only then is a checkpoint taken up.
        description: Label of the progress bar.
        progress: Whether to draw one, if standard error is a terminal.

    Raises:
        InputError: Fewer rows than one batch.
    """
    n = len(arrays[0])
    per_epoch = n // config.batch
    if per_epoch == 0:
        msg = f"images: expected at least one batch of {config.batch} rows, got {n}"
        raise InputError(msg)
    total = min(per_epoch * config.epochs, per_epoch * config.epochs if config.steps is None else config.steps)
    checkpointer = open_checkpoints(checkpoint, identity)
    if checkpointer and checkpointer.latest:
        state = checkpointer.load(abstract_state=restore_spec(state))
        _log.info("%s: resumed at step %d of %d", description, int(state.step), total)
    done = kept = int(state.step)
    began = saved = config.clock()
    took = 0.0
    losses: list[Array] = []
    with progress_bar(progress) as bar:
        task = bar.add_task(description, total=total, completed=done)
        for rows in itertools.islice(_steps(n, config, done), max(0, total - done)):
            if _time_is_spent(config, began, losses):
                break
            state, loss = step(state, *(array[rows] for array in arrays))
            losses.append(loss)
            done += 1
            if done % per_epoch == 0:
                epoch = done // per_epoch
                if epoch % max(1, config.epochs // 5) == 0:
                    _log.info("%s: epoch %d of %d, loss %.4f", description, epoch, config.epochs, np.mean(losses))
                losses.clear()
            bar.update(task, completed=done, description=description)
            now = config.clock()
            # Heads of gigabytes take a while to write: no more than a thirtieth of the time goes into it.
            if checkpointer and now - saved >= config.checkpoint_seconds * max(1.0, took):
                checkpointer.save(done, state)
                kept, saved = done, config.clock()
                took = saved - now
    if checkpointer:
        if kept != done:
            checkpointer.save(done, state)
        checkpointer.close()
    return state


def _time_is_spent(config: LoopConfig, began: float, losses: list[Array]) -> bool:
    if config.seconds is None:
        return False
    jax.block_until_ready(losses)  # or steps would only be queued while there is time
    return config.clock() - began >= config.seconds


def _steps(n: int, config: LoopConfig, done: int) -> Iterator[Int[np.ndarray, " batch"]]:
    """Yield the batches from step ``done`` on."""
    per_epoch = n // config.batch
    for epoch in range(done // per_epoch, config.epochs):
        rows = list(batches(n, config.batch, seed=(config.seed, epoch)))
        yield from rows[done % per_epoch if epoch == done // per_epoch else 0 :]
