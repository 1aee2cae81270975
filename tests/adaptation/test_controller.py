"""The controller: order, coins, alarms, lost answers, pauses and events; and what may open a cache."""

import dataclasses
import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax import InputError
from gati_jax.adaptation import (
    EVENT_KINDS,
    EXACT,
    NEAREST,
    AdaptationController,
    Alarm,
    ControllerConfig,
    CostGuardConfig,
    EventKind,
    ExactCacheConfig,
    MonitorConfig,
    NearestCacheConfig,
    NearestTrialConfig,
    Observation,
    RequestLogConfig,
    TrialConfig,
)
from tests.adaptation import world

DEPTH = 3
MONITOR = MonitorConfig(epsilon=world.EPSILON, drift=False)
QUIET = ControllerConfig(monitor=MONITOR, exact=None, nearest=None, cost_guard=None)
IMAGE = np.zeros(world.SHAPE, np.uint8)


def controller(bundle=None, level=0.05, on_event=lambda _: None, on_change=lambda _: None, **config):
    config = dataclasses.replace(QUIET, seed=5, **config)
    bundle = bundle or world.bundle()
    return AdaptationController(bundle, config, level=lambda: level, on_event=on_event, on_change=on_change)


def shadowing(q):
    return dataclasses.replace(MONITOR, quiet_q=q)


def with_nearest(bundle=None, known=60, every=20, **config):
    trial = NearestTrialConfig(known=known, every=every)
    return controller(bundle, nearest=NearestCacheConfig(cells=4), nearest_trial=trial, **config)


def ask(one, image=IMAGE, now=0.0):
    (ticket,) = one.ask(image[None], now)
    return ticket


def logits(class_index):
    return np.eye(2, dtype=np.float32)[class_index]


def answer(one, ticket, *, hit=True, class_index=0):
    return one.answered(ticket, 1 if hit else DEPTH, 2.0, logits(class_index), 0.0)


def state(one) -> str:
    """The state of the nearest cache's trial; a call, for it changes."""
    return one.trial.state


def miss_while(one, wanted):
    """Ask and miss while the nearest cache is in a state."""
    while state(one) == wanted:
        answer(one, ask(one), hit=False)


@settings(max_examples=40, deadline=None)
@given(
    outcomes=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30),
    order=st.randoms(use_true_random=False),
)
def test_the_monitor_does_not_depend_on_the_order_of_answers(outcomes, order):
    """All are asked, then answered, and their shadows come, in any order: as if one after the other."""
    one, other = (controller(monitor=shadowing(0.5)) for _ in range(2))
    images = np.stack([np.full(world.SHAPE, i, np.uint8) for i in range(len(outcomes))])
    tickets, twins = one.ask(images, 0.0), [ask(other, image) for image in images]
    assert [t.shadow for t in tickets] == [t.shadow for t in twins], "a batch tosses the coins of single requests"
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
    for log in (one.request_log, other.request_log):
        np.testing.assert_array_equal(log.recent(0, len(outcomes)).images, images)


def test_a_lost_request_holds_back_none_and_a_lost_shadow_counts_as_wrong():
    one = controller(monitor=shadowing(1.0))
    first, second, third, fourth = one.ask(np.stack([IMAGE] * 4), 0.0)
    answer(one, second, hit=False)
    answer(one, third, hit=False)
    assert answer(one, fourth)
    counts = [one.request_log.count]
    for ticket in (first, fourth):
        one.lost(ticket)
        counts.append(one.request_log.count)
    assert counts == [0, 2, 3]
    report = one.monitor.report
    assert (report.shadows, report.disagreements, report.lost) == ({1: 1}, 1, 1)


@pytest.mark.parametrize("lost", [0.0, 0.5, 0.9, 1.0])
def test_stored_points_that_are_wrong_are_closed_however_many_shadows_are_lost(lost):
    """A nearest cache that answers half of the requests, wrong on a fifth of these."""
    one, rng = with_nearest(), np.random.default_rng(3)
    one.trial.state, one.trial.threshold = "open", 0.0
    for hit, wrong, loses in rng.random((20_000, 3)) < (0.5, 0.2, lost):
        ticket = ask(one)
        if not hit:
            answer(one, ticket, hit=False)
        else:
            ticket.cached = Observation(NEAREST, 1.0, 0, ticket.q, None)
            if one.from_cache(ticket):
                one.lost(ticket) if loses else one.shadowed(ticket, logits(int(wrong)), 0.0)
        if one.event_counts["alarm"]:
            break
    assert one.event_counts["alarm"] == 1
    assert state(one) != "open"
    assert one.monitor.watched < 5000
    assert ("lost" in next(event.text for event in one.events if event.kind == "alarm")) == (lost > 0)


def test_an_alarm_closes_at_once_and_older_answers_are_not_observed():
    events, changes = [], []
    one = controller(monitor=shadowing(0.5), on_event=events.append, on_change=changes.append)
    assert one.served.is_open
    late = ask(one)
    while one.closed_at is None:
        ticket = ask(one)
        if answer(one, ticket):
            one.shadowed(ticket, logits(1), 0.0)
        if one.request_log.count == 0:  # held back by the first, which is answered now
            answer(one, late, hit=False)
    assert [event.kind for event in events] == ["alarm", "closed"]
    assert "nearest cache" not in events[0].text, "there is none"
    assert len(changes) == 1
    assert not one.served.is_open
    assert one.monitor.version == 2
    watched, old = one.monitor.watched, ask(one)
    old.version = 1
    answer(one, old, hit=False)
    assert one.monitor.watched == watched


def test_a_bundle_that_promises_less_begins_closed():
    one = controller(monitor=dataclasses.replace(MONITOR, epsilon=world.EPSILON / 10))
    assert not one.served.is_open
    assert one.closed_at == 0


def test_inputs_that_are_not_pixels_are_refused():
    chain = dataclasses.replace(world.bundle().chain, normalization=None)
    with pytest.raises(InputError, match="bundle: expected a base of uint8 images"):
        controller(bundle=dataclasses.replace(world.bundle(), chain=chain))


def test_events_are_counted_for_ever_and_kept_for_a_while():
    assert get_args(EventKind) == EVENT_KINDS
    one = controller()
    for number in range(5000):
        one.emit("trial" if number % 5 else "refit", str(number))
    assert one.event_counts == {"trial": 4000, "refit": 1000}
    assert len(one.events) <= 1000
    assert one.events[-1].text == "4999"


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (MonitorConfig, {"epsilon": 0.0}), (MonitorConfig, {"epsilon": 0.6}), (MonitorConfig, {"delta": math.nan}),
        (MonitorConfig, {"quiet_q": 0.0}), (MonitorConfig, {"attention": 0}), (MonitorConfig, {"in_flight": -1}),
        (CostGuardConfig, {"requests": 0}), (CostGuardConfig, {"pause": 2, "longest": 1}),
        (ExactCacheConfig, {"capacity": 0}), (ExactCacheConfig, {"often": 0}), (ExactCacheConfig, {"seconds": 0.0}),
        (ExactCacheConfig, {"seconds": math.nan}), (NearestCacheConfig, {"capacity": 0}),
        (NearestCacheConfig, {"cells": 0}), (NearestCacheConfig, {"radius": 0.0}), (RequestLogConfig, {"recent": 0}),
        (TrialConfig, {"epsilon": 1.0}), (TrialConfig, {"epsilon": 0.1, "enough": 0.0}),
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(config, wrong):
    with pytest.raises(InputError, match=f"{list(wrong)[-1]}: expected"):
        config(**wrong)


# --- Input cache ------------------------------------------------------------------------------------------------------


def test_frequent_inputs_go_to_the_base_once_and_are_known_then():
    one = controller(exact=ExactCacheConfig(often=2))
    first = ask(one)
    assert (first.cached, first.frequent) == (None, False)
    answer(one, first)
    second = ask(one, now=1.0)
    assert (second.cached, second.frequent) == (None, True)
    answer(one, second, hit=False, class_index=1)
    for now in range(2, 12):
        third = ask(one, now=float(now))
        assert third.cached is not None
        assert (third.cached.exit, third.cached.class_index, third.cached.score) == (EXACT, 1, math.inf)
        assert not one.from_cache(third), "the base is not asked"
    assert EXACT not in one.monitor.report.shadows


def test_where_all_is_closed_the_exact_cache_does_not_answer_but_learns():
    one = controller(exact=ExactCacheConfig(often=2))
    served = one.served
    answer(one, ask(one), hit=False, class_index=1)
    assert ask(one).cached is not None
    one.on_alarm(Alarm((1,), 100.0, 1))
    assert one.is_safe
    other = IMAGE + 1
    for image in (IMAGE, other, other):
        ticket = ask(one, image)
        assert ticket.cached is None
        answer(one, ticket, hit=False)
    one.adopt(served, "certified")
    assert not one.is_safe
    assert {ask(one, image).cached is None for image in (IMAGE, other)} == {False}


def test_no_trial_of_the_nearest_cache_begins_without_a_number():
    one, levels = with_nearest(), [None, None, 0.05]
    one._level = lambda: levels.pop(0)
    miss_while(one, "watching")
    assert (state(one), levels) == ("trial", [])


def test_lost_shadows_certify_nothing():
    """A nearest cache that is always wrong, whose every base answer is lost."""
    one = with_nearest()
    for number in range(1000):
        ticket, trying = ask(one, now=float(number)), state(one) != "watching"
        if ticket.cached is not None:
            shadow = one.from_cache(ticket)
        else:
            shadow = answer(one, ticket, hit=trying, class_index=int(trying))
        if shadow:
            one.lost(ticket)
        assert state(one) != "open", "not one answer of the base came during the trial"
    assert one.event_counts["trial"] > 0


def test_two_trials_at_once_do_not_add_up_their_risks():
    """What each trial certifies, it certifies with the other closed: a swap ends the trial of the nearest cache."""
    one = with_nearest()
    served = one.served
    one.on_alarm(Alarm((1,), 100.0, 1))
    miss_while(one, "watching")
    for _ in range(60):  # with the base behind the nearest cache
        answer(one, ask(one), hit=False)
    assert state(one) == "trial"
    one.adopt(served, "certified with the nearest cache closed")
    assert state(one) == "watching"
    assert [event.kind for event in one.events][-2:] == ["swap", "inconclusive"]
    miss_while(one, "watching")
    before, needed = one.request_log.count, math.log(1 / 0.05) / -math.log(1 - world.EPSILON)
    miss_while(one, "trial")
    assert one.request_log.count - before >= needed, "from the beginning"
    ticket = ask(one)
    assert ticket.cached is not None
    assert (state(one), ticket.cached.exit) == ("open", NEAREST)
    one.on_alarm(Alarm((NEAREST,), 100.0, 1))
    assert ask(one).cached is None
    assert one.served.is_open, "the caches in the network were not named"


# --- Pauses -----------------------------------------------------------------------------------------------------------


def pause(one):
    """Hit at a loss until the caches are paused."""
    while one.event_counts["paused"] == 0:
        answer(one, ask(one))
    assert not one.served.is_open


def test_an_alarm_while_caches_are_paused_closes_them_for_good():
    one = controller(world.dear(), cost_guard=CostGuardConfig(requests=1, pause=20))
    pause(one)
    assert not one.is_safe, "a pause for the cost's sake"
    one.on_alarm(Alarm((1,), 100.0, 1))
    assert one.closed_at is not None
    assert one.is_safe
    for _ in range(50):
        answer(one, ask(one), hit=False)
    assert not one.served.is_open


def test_paused_caches_get_a_trial_where_the_nearest_cache_has_opened_meanwhile():
    """It was certified with the base behind it; without a trial of both together, neither may open beside the other."""
    guard = CostGuardConfig(requests=1, pause=1000)
    one = with_nearest(world.dear(), known=20, every=10, cost_guard=guard)
    pause(one)
    miss_while(one, "watching")
    while one.closed_at is None and one.request_log.count < 3000:
        ticket = ask(one)
        if ticket.cached is None:
            answer(one, ticket, hit=False)
        elif one.from_cache(ticket):
            one.shadowed(ticket, logits(0), 0.0)
    assert state(one) == "open"
    assert not one.served.is_open
    assert one.closed_at is not None, "so that recovery tries them"
