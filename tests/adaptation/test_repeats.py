"""The exact-repeat layer against a plain record of everything that was ever stored."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gati_jax import InputError
from gati_jax.adaptation import ExactCache, ExactCacheConfig

ACTIONS = st.lists(
    st.tuples(st.sampled_from(["ask", "store", "late", "swap"]), st.integers(0, 5), st.integers(0, 4)), max_size=80
)


@given(actions=ACTIONS, capacity=st.integers(1, 4), often=st.integers(1, 3))
def test_it_knows_what_the_latest_few_were_answered(actions, capacity, often):
    """The model is a list, least recent first: [input, class or None, when that was stored, how often it was asked]."""
    layer = ExactCache("base 0", ExactCacheConfig(capacity=capacity, seconds=10.0, often=often))
    base, model, now = 0, [], 0.0
    for action, number, passed in actions:
        now += passed
        key = layer.key(np.array([number], np.uint8))
        mine = next((row for row in model if row[0] == number), [number, None, 0.0, 0])
        if action in {"ask", "store"}:
            model = ([row for row in model if row is not mine] + [mine])[-capacity:]
        if action == "ask":
            mine[3] += 1
            known = mine[1] if mine[1] is not None and now < mine[2] + 10 else None
            assert layer.ask(key, now) == (known, known is None and mine[3] >= often)
        elif action == "store":
            mine[1:3] = number + 100 * base, now
            layer.store(key, number + 100 * base, now, base=f"base {base}")
        elif action == "late":
            layer.store(key, -7, now, base=f"base {base - 1}")  # by the base that was served before
        else:
            base, model = base + 1, []
            layer.serve(f"base {base}")
        assert len(layer) == len(model) <= capacity


def test_inputs_are_told_apart_by_bytes_shape_and_dtype():
    layer = ExactCache("b")
    flat = np.arange(12, dtype=np.uint8)
    like = [flat, flat.reshape(3, 4), flat.reshape(4, 3), flat.view(np.int8), flat.view(np.uint16), flat[::-1]]
    assert len({layer.key(image) for image in like}) == len(like)
    assert layer.key(flat.reshape(3, 4).T) == layer.key(
        np.ascontiguousarray(flat.reshape(3, 4).T)
    )  # values, not strides
    assert layer.key(flat) != ExactCache("b").key(flat)  # nobody outside can prepare a collision


def test_the_same_base_under_other_caches_stays_known():
    layer = ExactCache("b")
    layer.store(layer.key(np.zeros(1)), 3, 0.0, base="b")
    layer.serve("b")
    assert layer.ask(layer.key(np.zeros(1)), 1.0) == (3, False)
    assert (layer.hits, layer.asked) == (1, 1)


@pytest.mark.parametrize("wrong", [{"capacity": 0}, {"often": 0}, {"seconds": 0.0}, {"seconds": float("nan")}])
def test_settings_out_of_bounds_are_named(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}.*: expected"):
        ExactCacheConfig(**wrong)
