"""The training loop with a step that only records its rows; a fit within a budget of time, on a clock of steps."""

import dataclasses
import functools
import importlib
import logging
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax.fitting import LoopConfig, LoopState, run_loop
from gati_jax.fitting.heads import parts_of
from gati_jax.fitting.loop import ProgressLog, logged
from gati_jax.pytrees import call
from tests.fitting import tiny

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


def test_a_checkpoint_of_which_any_file_is_cut_to_nothing_is_one_line(tmp_path):
    run([], tmp_path / "whole")
    files = [path for path in (tmp_path / "whole").rglob("*") if path.is_file() and path.stat().st_size]
    steps, refused = set(), {}
    for i, file in enumerate(files):
        folder, seen = tmp_path / str(i), []
        shutil.copytree(tmp_path / "whole", folder)
        (folder / file.relative_to(tmp_path / "whole")).write_bytes(b"")
        try:
            run(seen, folder)
            steps.add(len(seen))
        except gati_jax.InputError as error:
            refused[str(folder)] = str(error)
    assert refused
    for folder, message in refused.items():
        assert message.startswith("checkpoint: expected one that can be read, got ")
        assert folder in message
        assert "\n" not in message
    assert steps <= {0, 12}  # it was not needed, or said whether there is a checkpoint


def test_every_epoch_sees_every_row_once_but_an_incomplete_batch_in_the_seeds_order():
    seen, same, other = [], [], []
    assert int(run(seen).step) == len(seen) == 3 * 4
    epochs = [[row for batch in seen[i : i + 4] for row in batch] for i in (0, 4, 8)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 20
        assert set(epoch) <= set(ROWS.tolist())
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    run(same)
    run(other, config=dataclasses.replace(CONFIG, seed=8))
    assert seen == same != other


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


def test_fewer_rows_than_a_batch_are_refused_and_no_epochs_return_the_start():
    with pytest.raises(gati_jax.InputError, match="images: expected at least one batch of 24 rows, got 23"):
        run([], config=LoopConfig(epochs=1, batch=24))
    assert int(run([], config=LoopConfig(epochs=0, batch=5)).step) == 0


def test_the_log_has_a_line_every_30_seconds(caplog):
    """On a clock that a step moves by 7 seconds; each line says how far the run is and when it ends."""
    now, said = [0.0], [0.0]
    take = recorder([])

    def step(state, rows):
        now[0] += 7.0
        return take(state, rows)

    class Times(logging.Handler):
        def emit(self, record):
            del record
            said.append(now[0])

    logger, times = logging.getLogger("gati_jax.fitting.loop"), Times()
    config = LoopConfig(epochs=5, batch=5, clock=lambda: now[0])
    with caplog.at_level(logging.INFO):
        logger.addHandler(times)
        run_loop(step, start(), (ROWS,), config, description="fitting", progress=False)
        logger.removeHandler(times)
    assert now[0] == 20 * 7
    assert max(np.diff([*said, now[0]])) <= 30
    # 12 of 20 steps took 84 seconds; the last of them saw these rows.
    (line,) = [record.message for record in caplog.records if "12 of 20 steps" in record.message]
    assert line.startswith("fitting: 12 of 20 steps, loss ")
    assert line.endswith(", 7 s each, 0.9 minutes left")


def test_the_first_step_which_compiles_says_nothing_of_the_remaining_time(caplog):
    now = [0.0]
    with caplog.at_level(logging.INFO):
        for i, _ in enumerate(logged(range(10), 10, "measuring", lambda: now[0])):
            now[0] += 600.0 if i == 0 else 12.0
        log = ProgressLog("compiling", 4, estimate=False, clock=lambda: now[0])
        for i in range(1, 5):
            now[0] += 30
            log.update(i)
    assert caplog.messages[:2] == [
        "measuring: 1 of 10 steps",
        "measuring: 3 of 10 steps, 12 s each, 1.4 minutes left",
    ]
    assert caplog.messages[-4:] == [f"compiling: {i} of 4 steps" for i in range(1, 5)]


def test_a_pass_is_logged_as_well_and_a_short_one_is_silent(caplog):
    now = [0.0]

    def work(seconds):
        for _ in logged(range(10), 10, "replaying", lambda: now[0]):
            now[0] += seconds

    with caplog.at_level(logging.INFO):
        work(1.9)
        assert caplog.messages == []
        work(9.0)
    assert caplog.messages == [
        f"replaying: {done} of 10 steps, 9 s each, {left} minutes left" for done, left in [(3, 1.1), (6, 0.6), (9, 0.1)]
    ]


PER_EPOCH = 8  # 256 rows, 32 a step
EPOCHS = 6


class Clock:
    """A step takes ``seconds``, or, from the given step on, ``slower``. Compilation takes 30: the first call's."""

    def __init__(self, seconds: float, *, slower: float | None = None, after: int = 0) -> None:
        self.now, self.seconds, self.slower, self.after, self.steps = 0.0, seconds, slower, after, 0

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.steps += 1
        slow = self.slower is not None and self.steps > self.after
        self.now += (self.slower if slow and self.slower else self.seconds) + (30.0 if self.steps == 1 else 0.0)


@pytest.fixture
def fit(monkeypatch):
    """Train one predictor; time passes in its step, on a clock if there is one."""
    predictors = importlib.import_module("gati_jax.fitting.predictors")
    rows, _ = tiny.images()
    parts = parts_of(tiny.chain(), [tiny.head(1)])
    step = predictors._step

    def run(clock=time.monotonic, *, minutes=None, checkpoint=None, epochs=EPOCHS, reuse=1, killed_after=None):
        def timed(*args, **kwargs):
            if killed_after is not None and kwargs["state"].step == killed_after:
                raise KilledError
            if isinstance(clock, Clock):
                clock.tick()
            return step(*args, **kwargs)

        monkeypatch.setattr(predictors, "_step", timed)
        config = dataclasses.replace(tiny.CONFIG, epochs=epochs, minutes=minutes, reuse=reuse)
        return predictors.train_predictors(
            tiny.chain(), parts, rows, config, checkpoint=checkpoint, identity="one", progress=False, clock=clock
        )

    return run


PROBED = 6  # one step to compile, five to measure


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.parts["fc@1"].variables, other.parts["fc@1"].variables)


@pytest.mark.parametrize(
    ("seconds", "steps", "logged"),
    [
        (36 + 3 * PER_EPOCH + 3, 3 * PER_EPOCH, "3 of 6 epochs were done in"),  # compilation and probes: 36 seconds
        (3600, EPOCHS * PER_EPOCH, ""),
        (36 + 5.5, 5, "0.625 of 6 epochs"),
        (0.06, 0, "0 of 6 epochs"),
    ],
    ids=["three epochs", "enough", "less than an epoch", "none"],
)
def test_a_fit_takes_as_many_steps_as_its_time_is_enough_for(fit, caplog, seconds, steps, logged):
    """And says so if it is not; whole epochs give exactly what as many epochs without a budget give."""
    clock = Clock(1.0)
    with caplog.at_level(logging.WARNING):
        found = fit(clock, minutes=seconds / 60)
    assert (clock.steps, found.epochs) == (PROBED + steps, steps / PER_EPOCH)
    assert logged in caplog.text if logged else not caplog.text
    if steps >= PER_EPOCH:
        assert_same(found, fit(epochs=steps // PER_EPOCH))


def test_a_machine_that_gets_slower_does_not_overrun_the_time(fit, caplog):
    budget = 36 + 4 * PER_EPOCH + 4
    clock = Clock(1.0, slower=3.0, after=PROBED)
    with caplog.at_level(logging.WARNING):
        found = fit(clock, minutes=budget / 60)
    assert budget <= clock.now < budget + 3.0  # the last step was begun in time
    assert found.epochs == 12 / PER_EPOCH
    assert "before the schedule's end" in caplog.text


@pytest.mark.parametrize("slower", [None, 3.0])
def test_the_same_again_trains_no_more(fit, tmp_path, slower):
    minutes = (36 + 3 * PER_EPOCH + 3) / 60
    first = fit(Clock(1.0, slower=slower, after=PROBED), minutes=minutes, checkpoint=tmp_path)
    clock = Clock(0.001)  # not even where the machine has become faster
    again = fit(clock, minutes=minutes, checkpoint=tmp_path)
    assert (clock.steps, again.epochs) == (0, first.epochs)
    assert_same(first, again)


def test_more_time_goes_on_from_there(fit, tmp_path):
    short = (36 + 2 * PER_EPOCH + 2) / 60
    first = fit(Clock(1.0), minutes=short, checkpoint=tmp_path)
    clock = Clock(1.0)
    second = fit(clock, minutes=(36 + 4 * PER_EPOCH + 4) / 60, checkpoint=tmp_path)
    assert (first.epochs, second.epochs) == (2, 4)
    assert clock.steps == PROBED + 2 * PER_EPOCH
    clock = Clock(1.0)
    last = fit(clock, checkpoint=tmp_path)  # unlimited
    assert (last.epochs, clock.steps) == (EPOCHS, 2 * PER_EPOCH)
    clock = Clock(1.0)
    less = fit(clock, minutes=short, checkpoint=tmp_path)
    assert clock.steps == PROBED  # nothing that was learned is lost
    assert_same(last, less)
    sites, logits = tiny.chain().activations(jnp.asarray(tiny.images()[1]))

    def agreement(trained):
        part = trained.parts["fc@1"]
        return float((call(part.predictor, part.variables, sites[1]).argmax(-1) == logits.argmax(-1)).mean())

    # Other steps than those of a fit in one go, but no worse for that.
    assert agreement(last) >= max(agreement(first), agreement(fit())) - 0.1


def test_a_damaged_record_is_measured_anew(fit, tmp_path, caplog):
    minutes = (36 + 3 * PER_EPOCH + 3) / 60
    fit(Clock(1.0), minutes=minutes, checkpoint=tmp_path)
    (record,) = tmp_path.glob("*.budget.json")
    record.write_text("{")
    found = fit(Clock(1.0), minutes=minutes, checkpoint=tmp_path)
    assert "is damaged" in caplog.text
    assert found.epochs == 3


@pytest.mark.parametrize("killed_after", [3, 11])
def test_what_is_kept_for_reuse_survives_an_interruption(fit, tmp_path, monkeypatch, killed_after):
    """Room for 4 batches: it is being filled at step 3, and goes round at step 11."""
    predictors = importlib.import_module("gati_jax.fitting.predictors")
    monkeypatch.setattr(predictors, "_RECENT_BATCHES", 4)
    often = functools.partial(predictors.LoopConfig, checkpoint_seconds=0.0)
    monkeypatch.setattr(predictors, "LoopConfig", often)
    with pytest.raises(KilledError):
        fit(reuse=3, epochs=2, checkpoint=tmp_path, killed_after=killed_after)
    clock = Clock(1.0)
    assert_same(fit(clock, reuse=3, epochs=2, checkpoint=tmp_path), fit(reuse=3, epochs=2))
    assert clock.steps == 2 * PER_EPOCH - killed_after
