"""A budget of time for a fit: how many steps it pays for is measured once, and written down beside the checkpoints.

The schedule of the learning rate is laid over these steps, for one that has not come to its end gives worse
predictors. Whole epochs are taken where one fits: the fit is then, bit for bit, that of a configuration with as many
epochs and no budget.
"""

import dataclasses
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import BaseModel, Field, ValidationError

from .loop import LoopConfig, LoopState, Step

_log = logging.getLogger(__name__)
_PROBES = 5
_MARGIN = 0.95  # the rest is for checkpoints, and for a machine that gets slower


class _Laid(BaseModel):
    """What a budget was found to pay for."""

    minutes: float
    steps: int = Field(ge=1)


def within_minutes(
    step: Step, state: LoopState, arrays: tuple[np.ndarray, ...], loop: LoopConfig, minutes: float, record: Path | None
) -> LoopConfig:
    """Return the loop with as many of its steps as fit into the time.

    Args:
        step: As for ``run_loop``; a few are taken, compilation aside, with a copy of the state.
        state: Where the loop would begin.
        arrays: Its rows.
        loop: The loop without a budget; its clock measures.
        minutes: For compilation, these steps and the loop.
        record: A file: the same budget is not measured twice, so that a run that is resumed ends where it would have.
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
    """Say how much of a fit its time has paid for, and write down where it ended: there it ends if it is run again."""
    if loop.steps is not None and done < loop.steps:
        _log.warning(
            "the time was spent before the schedule's end: the machine has become slower since the first steps"
        )
        _write(record, minutes, done)
    if done < per_epoch * loop.epochs:
        _log.warning("%.3g of %d epochs were done in %g minutes", done / per_epoch, loop.epochs, minutes)


def _write(record: Path | None, minutes: float, steps: int) -> None:
    if record is not None:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(_Laid(minutes=minutes, steps=steps).model_dump_json() + "\n", encoding="utf-8")


def _read(record: Path | None) -> _Laid | None:
    if record is None or not record.is_file():
        return None
    try:
        return _Laid.model_validate_json(record.read_bytes())
    except ValidationError:
        _log.warning("%s is damaged: it is measured anew how many steps fit into the time", record)
        return None


def _seconds_a_step(step: Step, state: LoopState, arrays: tuple[np.ndarray, ...], loop: LoopConfig) -> float:
    rows = [array[: loop.batch] for array in arrays]
    state = jax.tree.map(jnp.copy, state)  # for the step may donate it
    state, loss = jax.block_until_ready(step(state, *rows))  # compiles
    began = loop.clock()
    for _ in range(_PROBES):
        state, loss = step(state, *rows)
    jax.block_until_ready((state, loss))
    return (loop.clock() - began) / _PROBES
