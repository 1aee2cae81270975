"""From a bundle to routes, and from a request's limits to one of them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gati_jax.certification import CONDITIONAL, ExitRate
from serve.engine import routes
from serve.engine.records import Route

MS = 1.0


def made(name, epsilon, *stages, leave=None):
    depth = len(stages)
    return Route(
        name=name,
        sites=tuple(range(1, depth)),
        depth=depth,
        epsilon=epsilon,
        stage_ms={1: stages, 8: tuple(4 * ms for ms in stages)},
        leave=leave or (*[0.5] * (depth - 1), 1.0),
    )


# Alone: 2 + 0.5 * 4 = 4 ms; 2 + 0.2 * 4 = 2.8; 6; 0.5 + 0.5 * 1 = 1
ROUTES = (
    made("1%", 0.01, 2.0, 4.0),
    made("5%", 0.05, 2.0, 4.0, leave=(0.8, 1.0)),
    made("base", 0.0, 6.0),
    made("uncertified", None, 0.5, 1.0),
)
TIGHT, LOOSE, BASE = 0, 1, 2


def test_expected_times_by_hand():
    assert [routes.expected_ms(route) for route in ROUTES] == pytest.approx([4.0, 2.8, 6.0, 1.0])


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ({}, 7),  # what the server's default is
        ({"epsilon": 0.05}, LOOSE),
        ({"epsilon": 1.0}, LOOSE),  # the fastest certified one
        ({"epsilon": 0.049}, TIGHT),
        ({"epsilon": 0.001}, BASE),
        ({"epsilon": 0}, BASE),
        ({"deadline_ms": 100.0}, BASE),
        ({"deadline_ms": 5.9}, TIGHT),
        ({"deadline_ms": 3.9}, LOOSE),
        ({"deadline_ms": 0.1}, LOOSE),  # too late for all: the fastest
        ({"deadline_ms": 10.0, "backlog_ms": lambda: 5.0}, TIGHT),
        ({"deadline_ms": 10.0, "backlog_ms": lambda: 7.0}, LOOSE),
        ({"deadline_ms": 3.0, "epsilon": 0.01}, TIGHT),  # late, but no looser than allowed
        ({"deadline_ms": 100.0, "epsilon": 0.05}, BASE),
    ],
)
def test_choices_by_hand(limit, expected):
    assert routes.choose_route(ROUTES, default=7, **limit) == expected


@given(epsilon=st.none() | st.floats(0, 1), deadline=st.none() | st.floats(0, 20), backlog=st.floats(0, 10))
def test_a_choice_is_certified_for_the_requested_epsilon(epsilon, deadline, backlog):
    chosen = routes.choose_route(ROUTES, epsilon=epsilon, deadline_ms=deadline, default=0, backlog_ms=lambda: backlog)
    assert ROUTES[chosen].epsilon is not None
    if epsilon is not None:
        assert ROUTES[chosen].epsilon <= epsilon


@pytest.mark.parametrize(
    "limit",
    [{"epsilon": -0.1}, {"epsilon": 1.1}, {"epsilon": np.nan}, {"deadline_ms": -1.0}, {"deadline_ms": np.inf}],
    ids=str,
)
def test_impossible_limits_are_refused_by_name(limit):
    with pytest.raises(ValueError, match=f"{next(iter(limit))}: expected a number"):
        routes.choose_route(ROUTES, default=0, **limit)


def test_an_epsilon_that_nothing_is_certified_for_is_refused():
    with pytest.raises(ValueError, match=r"epsilon: expected at least 0.01, got 0.001"):
        routes.choose_route(ROUTES[:2], epsilon=0.001)


def test_the_default_is_the_tightest_certified_plan():
    assert routes.default(ROUTES) == TIGHT
    assert routes.default(ROUTES[::-1]) == 3
    assert routes.default(ROUTES[2:]) == 0  # nothing is certified: the base


def test_a_bundle_has_its_plans_and_the_base(residual):
    plan, base = routes.load(residual)
    assert (plan.name, plan.cascade.sites, plan.epsilon) == ("default", (0, 1), residual.certificate.epsilon)
    assert plan.leave == (0.5, 0.5, 1.0)  # without a count
    assert (base.name, base.cascade.sites, base.epsilon, base.leave) == ("base", (), 0.0, (1.0,))
    nothing = dataclasses.replace(residual.certificate, step=-1)
    assert routes.load(dataclasses.replace(residual, certificate=nothing))[0].epsilon is None


def test_a_plan_called_base_keeps_its_name(residual):
    named = dataclasses.replace(residual, certificate=dataclasses.replace(residual.certificate, name="base"))
    assert [route.name for route in routes.load(named)] == ["base", "base-0"]


def test_a_conditional_certificate_has_counted_who_leaves(residual):
    exits = (
        ExitRate(site=0, n=400, disagreements=0, p_value=0.0),
        ExitRate(site=1, n=700, disagreements=0, p_value=0.0),
    )
    counted = dataclasses.replace(
        residual.certificate, method=CONDITIONAL, exits=exits, n=1000, disagreements=0, p_value=0.0
    )
    plan, _ = routes.load(dataclasses.replace(residual, certificate=counted))
    assert plan.leave == pytest.approx((0.4, 300 / 600, 1.0))
