"""A fit within a budget of time, on a clock that only steps move."""

import dataclasses
import importlib
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import InputError
from gati_jax.fitting.heads import parts_of
from gati_jax.pytrees import call

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
def fit(tiny):
    """Train one predictor with a clock; its time passes in the jitted step."""
    predictors = importlib.import_module("gati_jax.fitting.predictors")
    rows, _ = tiny.images()
    parts = parts_of(tiny.chain(), [tiny.head(1)])
    jit = jax.jit

    def run(clock=time.monotonic, *, minutes=None, checkpoint=None, epochs=EPOCHS):
        def timed(function, **options):
            compiled = jit(function, **options)

            def step(*args, **kwargs):
                clock.tick()
                return compiled(*args, **kwargs)

            return step if "donate_argnames" in options and isinstance(clock, Clock) else compiled

        config = dataclasses.replace(tiny.CONFIG, epochs=epochs, minutes=minutes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(predictors.jax, "jit", timed)
            return predictors.train_predictors(
                tiny.chain(), parts, rows, config, checkpoint=checkpoint, identity="one", progress=False, clock=clock
            )

    return run


PROBED = 6  # one step to compile, five to measure


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.parts["fc@1"].variables, other.parts["fc@1"].variables)


def test_time_for_three_epochs_gives_exactly_what_three_epochs_give(fit, caplog):
    clock = Clock(1.0)
    with caplog.at_level(logging.WARNING):
        found = fit(clock, minutes=(36 + 3 * PER_EPOCH + 3) / 60)  # compilation and probes: 36 seconds
    assert found.epochs == 3
    assert clock.steps == PROBED + 3 * PER_EPOCH
    assert "3 of 6 epochs were done in" in caplog.text
    assert_same(found, fit(epochs=3))


def test_enough_time_changes_nothing(fit, caplog):
    with caplog.at_level(logging.WARNING):
        found = fit(Clock(1.0), minutes=60.0)
    assert (found.epochs, caplog.text) == (EPOCHS, "")
    assert_same(found, fit())


def test_less_than_an_epoch_is_taken_in_steps(fit, caplog):
    clock = Clock(1.0)
    with caplog.at_level(logging.WARNING):
        found = fit(clock, minutes=(36 + 5.5) / 60)
    assert (clock.steps, found.epochs) == (PROBED + 5, 5 / PER_EPOCH)
    assert "0.625 of 6 epochs" in caplog.text


def test_no_time_trains_nothing_and_says_so(fit, caplog):
    found = fit(Clock(1.0), minutes=0.001)
    assert found.epochs == 0
    assert "0 of 6 epochs" in caplog.text


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


def test_more_time_goes_on_from_there(tiny, fit, tmp_path):
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


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_minutes_that_are_none_are_refused(minutes):
    with pytest.raises(InputError, match="minutes: expected a "):
        gati_jax.FitConfig(minutes=minutes)


def test_candidates_say_how_many_epochs_their_predictors_had(tiny, fitted):
    assert fitted.epochs == tiny.CONFIG.epochs
    assert fitted.take(["fc@1"]).epochs == fitted.epochs


def test_time_makes_no_other_fit():
    """A fit is told from others by its configuration: more time must find the checkpoints of less."""
    assert str(gati_jax.FitConfig(minutes=1.0)) == str(gati_jax.FitConfig())
