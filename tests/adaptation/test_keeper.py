"""The keeper against one that hears of everything at once: order, coins, alarms, what is lost."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax import InputError
from gati_jax.adaptation import AdaptationController, ControllerConfig, ExactCacheConfig, MonitorConfig
from tests.adaptation import world

DEPTH = 3
CONFIG = ControllerConfig(
    monitor=MonitorConfig(epsilon=world.EPSILON, quiet_q=0.5, stir=False), repeats=None, points=None, seed=5
)
IMAGE = np.zeros(world.SHAPE, np.uint8)


def keeper(config=CONFIG, **callbacks):
    return AdaptationController(world.bundle(), config, level=lambda: 0.01, **callbacks)


def logits(class_index):
    return np.eye(2, dtype=np.float32)[class_index]


def answer(one, ticket, *, hit=True, class_index=0):
    return one.answered(ticket, 1 if hit else DEPTH, 2.0, logits(class_index), 0.0)


@settings(max_examples=40, deadline=None)
@given(
    outcomes=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30),
    order=st.randoms(use_true_random=False),
)
def test_what_is_watched_does_not_depend_on_who_is_ready_first(outcomes, order):
    """All are asked, then answered, and their shadows come, in any order: as if one after the other."""
    one, other = keeper(), keeper()
    tickets = [one.ask(IMAGE, 0.0) for _ in outcomes]
    twins = [other.ask(IMAGE, 0.0) for _ in outcomes]
    assert [t.look for t in tickets] == [t.look for t in twins]
    for ticket, (hit, agrees) in zip(twins, outcomes, strict=True):
        if answer(other, ticket, hit=hit):
            other.shadowed(ticket, logits(0 if agrees else 1), 0.0)
    to_do = [("answer", i) for i in range(len(outcomes))]
    while to_do:
        what, i = to_do.pop(order.randrange(len(to_do)))
        hit, agrees = outcomes[i]
        if what == "answer":
            if answer(one, tickets[i], hit=hit):
                to_do.append(("shadow", i))
        else:
            one.shadowed(tickets[i], logits(0 if agrees else 1), 0.0)
    assert one.monitor.report == other.monitor.report
    assert one.window.count == other.window.count == len(outcomes)
    np.testing.assert_array_equal(
        one.window.recent(0, len(outcomes)).answers, other.window.recent(0, len(outcomes)).answers
    )


def test_who_is_lost_holds_nobody_back():
    one = keeper()
    first, second, third = (one.ask(IMAGE, 0.0) for _ in range(3))
    answer(one, second, hit=False)
    answer(one, third, hit=False)
    assert one.window.count == 0
    one.lost(first)
    assert one.window.count == 2


def test_a_lost_shadow_counts_as_not_looked_at():
    one = keeper(dataclasses.replace(CONFIG, monitor=dataclasses.replace(CONFIG.monitor, quiet_q=1.0)))
    ticket = one.ask(IMAGE, 0.0)
    assert answer(one, ticket)
    assert one.window.count == 0
    one.lost(ticket)
    assert one.window.count == 1
    assert one.monitor.report.shadows == {}


def test_an_alarm_closes_at_once_and_older_answers_are_not_watched():
    told, changed = [], []
    one = keeper(told=told.append, changed=changed.append)
    assert np.isfinite(one.served.thresholds).any()
    late = one.ask(IMAGE, 0.0)
    while one.closed_at is None:
        ticket = one.ask(IMAGE, 0.0)
        if answer(one, ticket):
            one.shadowed(ticket, logits(1), 0.0)
        if one.window.count == 0:  # held back by the first, which is answered now
            answer(one, late, hit=False)
    assert [event.kind for event in told] == ["alarm", "closed"]
    assert len(changed) == 1
    assert not np.isfinite(one.served.thresholds[[c.site == 1 for c in one.served.caches]]).any()
    assert one.monitor.version == 2
    watched = one.monitor.watched
    old = dataclasses.replace(one.ask(IMAGE, 0.0), version=1)
    answer(one, old, hit=False)
    assert one.monitor.watched == watched


def test_a_bundle_that_promises_less_begins_closed():
    strict = dataclasses.replace(CONFIG, monitor=dataclasses.replace(CONFIG.monitor, epsilon=world.EPSILON / 10))
    one = keeper(strict)
    assert not np.isfinite(one.served.thresholds).any()
    assert one.closed_at == 0


def test_popular_inputs_go_to_the_base_once_and_are_known_then():
    one = keeper(dataclasses.replace(CONFIG, repeats=ExactCacheConfig(often=2)))
    first = one.ask(IMAGE, 0.0)
    assert (first.early, first.often) == (None, False)
    answer(one, first)
    second = one.ask(IMAGE, 1.0)
    assert (second.early, second.often) == (None, True)
    answer(one, second, hit=False, class_index=1)
    third = one.ask(IMAGE, 2.0)
    assert third.early is not None
    assert (third.early.class_index, third.early.score) == (1, math.inf)
    assert not one.early(third)


def test_inputs_that_are_not_pixels_are_refused(served_dense):
    with pytest.raises(InputError, match="bundle: expected a base of uint8 images"):
        AdaptationController(served_dense, CONFIG, level=lambda: 0.01)


@pytest.fixture
def served_dense():
    chain = dataclasses.replace(world.bundle().chain, normalization=None)
    return dataclasses.replace(world.bundle(), chain=chain)
