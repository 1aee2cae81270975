"""The training loop with a step that only writes down what it was given."""

import dataclasses
import logging

import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax.fitting import LoopConfig, LoopState, run_loop

ROWS = np.arange(23, dtype=np.float32)
CONFIG = LoopConfig(epochs=3, batch=5, seed=7, checkpoint_seconds=0.0)


class KilledError(Exception):
    """Stands for a process that ends."""


def recorder(seen, stop_before=None):
    """A step that adds up its rows, and writes them down."""

    def step(state, rows):
        if int(state.step) == stop_before:
            raise KilledError
        seen.append(rows.tolist())
        return LoopState(state.step + 1, state.params * 2 + rows.sum(), state.opt_state), jnp.asarray(rows.mean())

    return step


def start():
    return LoopState(jnp.zeros((), jnp.int32), jnp.zeros(()), ())


def run(seen, folder=None, *, config=CONFIG, stop_before=None, identity="one"):
    return run_loop(
        recorder(seen, stop_before), start(), (ROWS,), config, checkpoint=folder, identity=identity, progress=False
    )


def test_every_epoch_sees_every_row_once_but_an_incomplete_batch():
    seen = []
    assert int(run(seen).step) == len(seen) == 3 * 4
    epochs = [[row for batch in seen[i : i + 4] for row in batch] for i in (0, 4, 8)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 20
        assert set(epoch) <= set(ROWS.tolist())
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_is_the_seeds():
    one, same, other = [], [], []
    run(one)
    run(same)
    run(other, config=dataclasses.replace(CONFIG, seed=8))
    assert one == same != other


@pytest.mark.parametrize("stop_before", [1, 3, 4, 9])
def test_an_interrupted_loop_goes_on_exactly_where_it_was(tmp_path, caplog, stop_before):
    whole, before, after = [], [], []
    expected = run(whole)
    with pytest.raises(KilledError):
        run(before, tmp_path, stop_before=stop_before)
    with caplog.at_level(logging.INFO):
        resumed = run(after, tmp_path)
    assert f"resumed at step {stop_before} of 12" in caplog.text
    assert (before, after) == (whole[:stop_before], whole[stop_before:])
    assert (int(resumed.step), float(resumed.params)) == (int(expected.step), float(expected.params))


def test_a_finished_loop_is_not_run_again(tmp_path):
    one, again = [], []
    assert float(run(one, tmp_path).params) == float(run(again, tmp_path).params)
    assert again == []


def test_another_identity_begins_anew_and_leaves_the_first_alone(tmp_path):
    one, other, rest = [], [], []
    with pytest.raises(KilledError):
        run(one, tmp_path, stop_before=2)
    run(other, tmp_path, identity="other")
    assert len(other) == 12
    run(rest, tmp_path)
    assert one + rest == other


def test_fewer_rows_than_a_batch_are_refused():
    with pytest.raises(gati_jax.InputError, match="images: expected at least one batch of 24 rows, got 23"):
        run([], config=LoopConfig(epochs=1, batch=24))


def test_no_epochs_return_the_start():
    assert int(run([], config=LoopConfig(epochs=0, batch=5)).step) == 0
