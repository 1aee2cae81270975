"""The training loop: epochs of shuffled batches, a progress bar, checkpoints, exact resumption, a time budget."""

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from orbax.checkpoint import v1 as ocp
from pydantic import BaseModel, Field, ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from gati_jax.data import Images, batches, read_batches
from gati_jax.display import terminal
from gati_jax.errors import InputError
from gati_jax.pytrees import restore_spec

_log = logging.getLogger(__name__)
_LOG_SECONDS = 20.0  # a line every 30 seconds even where a step takes 10
_PROBES = 5  # steps to time
_MARGIN = 0.95  # share of the time for steps; the rest is for checkpoints, and for a machine that slows down


class LoopState(NamedTuple):
    """The state of training: a run that is restored from it continues exactly."""

    step: Int[Array, ""]  # steps taken
    params: PyTree
    opt_state: PyTree


Step = Callable[..., tuple[LoopState, Float[Array, ""]]]
"""``step(state, *rows[batch, ...]) -> (state, loss)``; jitted, and random only through ``state.step``."""
Pause = Callable[[], None]
"""Called between two pieces of work in the background, which can wait there; an exception from it ends the work."""


def no_pause() -> None:
    """Continue at once."""


class ProgressLog:
    """Lines in the log, at least every 30 seconds as long as a step takes no more than 10.

    Args:
        description: What is being done.
        total: Number of steps.
        done: Steps that were done before.
        estimate: Whether steps take about equally long, so that the remaining time can be told: from the second one
            on, for the first one compiles.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        description: str,
        total: int,
        *,
        done: int = 0,
        estimate: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock."""
        self._description, self._total, self._clock = description, total, clock
        self._start, self._estimate = done, estimate
        self._second: tuple[int, float] | None = None  # steps done, and the time, when the second one began
        self._said = clock()

    def update(self, done: int, loss: Float[Array, ""] | None = None) -> None:
        """Log how much is done, the last loss, the rate and the time left, unless a line is recent enough."""
        now, began = self._clock(), self._second
        if began is None and done > self._start:
            self._second = done, now
        if now - self._said < _LOG_SECONDS:
            return
        self._said, left = now, ""
        if self._estimate and began is not None and done > began[0]:
            each = (now - began[1]) / (done - began[0])
            left = f", {each:.3g} s each, {each * (self._total - done) / 60:.1f} minutes left"
        shown = "" if loss is None else f", loss {float(loss):.4f}"
        _log.info("%s: %d of %d steps%s%s", self._description, done, self._total, shown, left)


T = TypeVar("T")


def logged(
    items: Iterable[T], total: int, description: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[T]:
    """Yield ``total`` items; log how many of them are done, see ``ProgressLog``."""
    log = ProgressLog(description, total, clock=clock)
    for done, item in enumerate(items, 1):
        yield item
        log.update(done)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The length of a run, its batches and its checkpoints.

    Args:
        epochs: Passes over the data.
        batch: Rows in a step.
        seed: Order of the rows.
        checkpoint_seconds: Least time between two checkpoints, multiplied by the seconds that one takes to write.
        steps: Total number of steps, if fewer than the epochs have.
        seconds: Time after which no further step is started.
        clock: Returns the time in seconds.
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
    arrays: tuple[Images, ...],
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
        state: The initial state; a checkpoint of the same ``identity`` replaces it.
        arrays: Rows to draw from, all of one length; those of a source are read ahead of the steps.
        config: Epochs, batch size, seed.
        checkpoint: Folder for checkpoints, of which the newest is kept; None for no checkpoints.
        identity: Describes everything that a resumed run must share with the first (configuration, data).
        description: Label of the progress bar and the log.
        progress: Whether to draw a bar, if standard error is a terminal.

    Returns:
        The state after the last step.

    Raises:
        InputError: Fewer rows than one batch, or the last checkpoint is damaged.
    """
    n = len(arrays[0])
    per_epoch = n // config.batch
    if per_epoch == 0:
        raise InputError(f"images: expected at least one batch of {config.batch} rows, got {n}")
    total = per_epoch * config.epochs if config.steps is None else min(per_epoch * config.epochs, config.steps)
    checkpointer, state = resume(checkpoint, identity, state, f"{description}: resumed at step %d of {total}")
    done = kept = int(state.step)
    began = saved = config.clock()
    took = 0.0
    losses: list[Array] = []
    log = ProgressLog(description, total, done=done, clock=config.clock)
    _log.info("%s: %d of %d steps are done", description, done, total)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress_bar(progress))
        task = bar.add_task(description, total=total, completed=done)
        order = itertools.islice(_steps(n, config, done), max(0, total - done))
        batches_read = stack.enter_context(contextlib.closing(read_batches(arrays, order)))
        for rows in batches_read:
            if _is_time_up(config, began, losses):
                break
            state, loss = step(state, *rows)
            losses.append(loss)
            done += 1
            log.update(done, loss)
            if done % per_epoch == 0:
                epoch = done // per_epoch
                if epoch % max(1, config.epochs // 5) == 0:
                    _log.info("%s: epoch %d of %d, loss %.4f", description, epoch, config.epochs, np.mean(losses))
                losses.clear()
            bar.update(task, completed=done, description=description)
            now = config.clock()
            # Heads may have gigabytes: with the default, at most a thirtieth of the time goes into writing them.
            if checkpointer and _is_due(done % per_epoch == 0, now - saved, config.checkpoint_seconds * max(1.0, took)):
                checkpointer.save(done, state)
                kept, saved = done, config.clock()
                took = saved - now
    if checkpointer:
        if kept != done:
            checkpointer.save(done, state)
        checkpointer.close()
    return state


def _is_due(is_whole: bool, seconds: float, least: float) -> bool:  # noqa: FBT001
    """Whether to write a checkpoint: by the time, or, as the clocks of several processes differ, after whole epochs."""
    return is_whole if jax.process_count() > 1 else seconds >= least


def _is_time_up(config: LoopConfig, began: float, losses: list[Array]) -> bool:
    """Wait for steps, which are dispatched asynchronously: clock and log would run ahead of them."""
    if config.seconds is None:
        jax.block_until_ready(losses[:-1])  # the host prepares the next one during the newest
        return False
    jax.block_until_ready(losses)
    return config.clock() - began >= config.seconds


def _steps(n: int, config: LoopConfig, done: int) -> Iterator[Int[np.ndarray, " batch"]]:
    """Yield the batches from step ``done`` on."""
    per_epoch = n // config.batch
    for epoch in range(done // per_epoch, config.epochs):
        rows = list(batches(n, config.batch, seed=(config.seed, epoch)))
        yield from rows[done % per_epoch if epoch == done // per_epoch else 0 :]


def checkpoint_folder(folder: Path, identity: str) -> Path:
    """Return the folder of one identity's checkpoints."""
    return folder / hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()


def resume(
    folder: Path | None, identity: str, state: LoopState, message: str
) -> tuple[Any | None, LoopState]:  # Orbax is untyped
    """Return a checkpointer of one identity that keeps the newest checkpoint, and the state to start from.

    Args:
        folder: For checkpoints; None for neither.
        identity: Describes everything that a resumed run must share with the first.
        state: The initial state, of which the newest checkpoint takes the place.
        message: For the log, with a place for the step.

    Raises:
        InputError: The newest checkpoint is damaged.
    """
    if folder is None:
        return None, state
    keep_newest: Any = ocp.training.preservation_policies.LatestN(1)
    path = checkpoint_folder(folder, identity).absolute()
    path.mkdir(parents=True, exist_ok=True)
    try:
        checkpointer = ocp.training.Checkpointer(
            str(path), preservation_policy=keep_newest, cleanup_tmp_directories=True
        )
        if checkpointer.latest:
            state = checkpointer.load(abstract_state=restore_spec(state))
            _log.info(message, int(state.step))
    except Exception as error:  # Orbax raises many kinds for a damaged checkpoint
        raise InputError(
            f"checkpoint: expected one that can be read, got {type(error).__name__}; remove {path} to begin anew"
        ) from error
    return checkpointer, state


class _Budget(BaseModel):
    """A time budget and the number of steps that were found to fit into it."""

    minutes: float
    steps: int = Field(ge=1)


def within_minutes(
    step: Step, state: LoopState, arrays: tuple[Images, ...], loop: LoopConfig, minutes: float, record: Path | None
) -> LoopConfig:
    """Return the loop shortened to as many steps as fit into the minutes, compilation and a few timed steps included.

    The file ``record`` keeps the result, so that a resumed run has the same number of steps.
    """
    began = loop.clock()
    known = _read(record)
    if known and known.minutes == minutes:
        return dataclasses.replace(loop, steps=known.steps, seconds=60 * minutes)
    n = len(arrays[0])
    per_epoch = n // loop.batch
    each = _seconds_a_step(step, state, arrays, loop)
    left = 60 * minutes - (loop.clock() - began)
    fit = max(1, int(_MARGIN * left / each)) if each > 0 else per_epoch * loop.epochs
    steps = min(per_epoch * loop.epochs, fit - fit % per_epoch or fit)
    _log.info("%.3g s a step: %d of %d steps fit into %g minutes", each, steps, per_epoch * loop.epochs, minutes)
    _write(record, minutes, steps)
    return dataclasses.replace(loop, steps=steps, seconds=max(0.0, left))


def report_budget(done: int, loop: LoopConfig, per_epoch: int, minutes: float, record: Path | None) -> None:
    """Log how much of a fit its time was enough for; record where it ended, so that the same fit ends there again."""
    if loop.steps is not None and done < loop.steps:
        _log.warning("the time was up before the schedule's end: steps have become slower since the first ones")
        _write(record, minutes, done)
    if done < per_epoch * loop.epochs:
        _log.warning("%.3g of %d epochs were done in %g minutes", done / per_epoch, loop.epochs, minutes)


def _write(record: Path | None, minutes: float, steps: int) -> None:
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(_Budget(minutes=minutes, steps=steps).model_dump_json() + "\n", encoding="utf-8")


def _read(record: Path | None) -> _Budget | None:
    if record is None or not record.is_file():
        return None
    try:
        return _Budget.model_validate_json(record.read_bytes())
    except ValidationError:
        _log.warning("%s is damaged: measuring again how many steps fit into the time", record)
        return None


def _seconds_a_step(step: Step, state: LoopState, arrays: tuple[Images, ...], loop: LoopConfig) -> float:
    rows = [array[: loop.batch] for array in arrays]
    state = jax.tree.map(jnp.copy, state)  # the step may donate its state
    state, loss = jax.block_until_ready(step(state, *rows))  # compiles
    began = loop.clock()
    for _ in range(_PROBES):
        state, loss = step(state, *rows)
    jax.block_until_ready((state, loss))
    return (loop.clock() - began) / _PROBES


class _Rate(ProgressColumn):
    """Steps in a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f} steps/s")


def progress_bar(wanted: bool, *, steady: bool = False, estimate: bool = True) -> Progress:  # noqa: FBT001
    """Return a progress bar; it is drawn if ``wanted`` and if standard error is a terminal.

    Args:
        wanted: Whether to draw it.
        steady: Draw it only when it is told to refresh, and not from a thread of its own, which would disturb a
            measurement.
        estimate: Show the rate and the remaining time: steps take about equally long, after the first.
    """
    console = terminal()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    if estimate:
        columns = *columns, _Rate(), TimeRemainingColumn()
    drawn = wanted and console.is_terminal
    return Progress(*columns, console=console, disable=not drawn, auto_refresh=not steady)
