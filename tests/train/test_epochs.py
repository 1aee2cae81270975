"""Whole epochs in one program: the rows they see, and what is left of a run that was cut off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gati_jax.fitting import LoopState
from train import epoch_order, run_epochs, scan_epoch

N, BATCH, STEPS = 11, 3, 3


def step(state, x):
    """Fold a batch into a number that depends on the order of everything."""
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), state.step))
    params = 0.5 * state.params + x.sum() * noise
    return LoopState(state.step + 1, params, state.opt_state), {"seen": x, "params": params}


def start():
    return LoopState(jnp.int32(0), jnp.float32(0), ())


EPOCH = scan_epoch(step, n=N, batch=BATCH, seed=7)
ROWS = np.arange(N, dtype=np.float32)


def run(epochs, **options):
    records = []
    options = {"steps": STEPS, "progress": False, "report": records.append} | options
    return run_epochs(EPOCH, start(), (ROWS,), epochs=epochs, **options), records


def test_every_epoch_sees_its_own_order_and_no_row_twice():
    _, records = run(3)
    seen = [record.metrics["seen"].reshape(-1) for record in records]
    for epoch, rows in enumerate(seen):
        np.testing.assert_array_equal(rows, np.asarray(epoch_order(7, epoch, N))[: STEPS * BATCH])
        assert len(set(rows.tolist())) == STEPS * BATCH
    assert len({rows.tobytes() for rows in seen}) == 3
    assert [record.epoch for record in records] == [1, 2, 3]


def test_it_is_the_plain_loop():
    state, expected = run(2)[0], start()
    for number in range(2 * STEPS):
        order = np.asarray(epoch_order(7, number // STEPS, N))
        rows = order[number % STEPS * BATCH :][:BATCH]
        expected, _ = jax.jit(step)(expected, jnp.asarray(ROWS[rows]))
    np.testing.assert_allclose(state.params, expected.params, rtol=1e-6)
    assert int(state.step) == 2 * STEPS


class KilledError(Exception):
    """What a kill is to a test."""


def test_a_run_that_is_cut_off_goes_on_to_the_same_bits(tmp_path):
    def die(record):
        if record.epoch == 3:
            raise KilledError

    saved = {"checkpoint": tmp_path, "checkpoint_seconds": 0.0, "identity": "one"}
    with pytest.raises(KilledError):
        run(4, report=die, **saved)
    state, records = run(4, **saved)
    assert [record.epoch for record in records] == [3, 4]  # the third was reported, but not saved
    assert np.asarray(state.params).tobytes() == np.asarray(run(4)[0].params).tobytes()
    assert run(4, **saved)[1] == []
    assert len(run(4, **(saved | {"identity": "other"}))[1]) == 4


def test_the_caller_s_state_is_not_used_up():
    state = start()
    run_epochs(EPOCH, state, (ROWS,), steps=STEPS, epochs=1, progress=False)
    assert float(state.params) == 0
