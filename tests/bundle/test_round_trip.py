"""Bundles: round trips bit for bit."""

import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gati_jax
from gati_jax import BundleError, Chain, CostTable, InputError, Plan
from gati_jax.bundle.manifest import PlanEntry, Plans, Provenance, read_json, write_json
from tests.bundle.made import (
    COSTS,
    PIXELS,
    REQUESTS,
    answers,
    block,
    classify,
    in_memory,
    load,
    make,
    make_certificate,
    same_plan,
)


def test_own_chain_answers_bit_for_bit(saved):
    loaded, original = load(saved), in_memory(make(1))
    assert len(set(np.asarray(gati_jax.infer_batch(original, REQUESTS).exit).tolist())) == 3  # every exit is tested
    assert answers(loaded) == answers(original)
    assert answers(loaded) != answers(in_memory(make(9)))


def test_residual_network_loads_without_its_chain(residual, saved_residual):
    loaded = gati_jax.load_bundle(saved_residual)
    assert loaded.chain.normalization == residual[0].normalization
    assert loaded.chain.network == residual[0].network
    one, many = gati_jax.infer(loaded, PIXELS[3]), gati_jax.infer_batch(loaded, PIXELS)
    assert len(set(np.asarray(many.exit).tolist())) > 1
    assert answers(loaded, PIXELS) == answers(in_memory(residual), PIXELS)
    assert (int(one.exit), int(one.class_index)) == (int(many.exit[3]), int(many.class_index[3]))


def test_what_is_known_beside_the_arrays_round_trips(tmp_path):
    parts = make(1)
    provenance = Provenance(
        created="now", versions={"jax": "0"}, seed=3, data_fingerprints={"fit": "é"}, command=["a b"],
        config={"nested": {"list": [1, 2.5, None, "x"]}},
    )  # fmt: skip
    other = CostTable(device="other-device", batch=8, blocks_ms=(0.0,), lookup_ms={}, spread=0.25)
    again = CostTable(device="test", batch=8, blocks_ms=(8.0,), lookup_ms={})
    names = ("one", "<two>", "drei ß")
    gati_jax.save_bundle(tmp_path / "b", *parts, class_names=names, provenance=provenance, costs=[COSTS, other, again])
    loaded = load(tmp_path / "b")
    assert loaded.class_names == names
    assert loaded.provenance == provenance
    assert sorted(loaded.costs, key=lambda table: (table.device, table.batch)) == [other, COSTS, again]
    assert loaded.certificate == parts[3]
    assert same_plan(loaded.plan, parts[2])


thresholds = st.one_of(st.just(math.inf), st.floats(width=32, allow_nan=False, allow_infinity=False))


@settings(max_examples=60, deadline=None)
@given(
    path=hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(0, 4)), elements=thresholds),
    rows=hnp.arrays(np.uint64, st.integers(0, 5)),
    data=st.data(),
)
def test_plan_file_round_trips(path, rows, data, tmp_path_factory):
    steps, m = path.shape
    path[0] = np.inf
    seen = data.draw(hnp.arrays(np.float64, (2, steps), elements=st.floats(0, 1e9)))
    plan = Plan(
        names=tuple(f"c{i}" for i in range(m)), sites=tuple(range(m)), depth=m + 1, path=path, disagreement=seen[0],
        mean_ms=seen[1], n=len(rows), rows=rows,
    )  # fmt: skip
    file = tmp_path_factory.mktemp("plan") / "plans.json"
    write_json(file, Plans(plans=(PlanEntry.of(plan),)))
    assert same_plan(read_json(file, Plans).plans[0].plan(), plan)


@pytest.mark.parametrize("threshold", [-np.inf, np.nan, np.float64(0.1)], ids=["-inf", "nan", "float64"])
def test_no_plan_is_saved_that_cannot_be_loaded(tmp_path, threshold):
    chain, caches, plan, _ = make(1)
    path = np.array([[np.inf, np.inf], [threshold, np.inf]], np.asarray(threshold).dtype)
    try:
        plan = Plan(**{**vars(plan), "path": path, "disagreement": np.zeros(2), "mean_ms": np.zeros(2)})
        gati_jax.save_bundle(tmp_path / "b", chain, caches, plan, make_certificate(plan, step=1))
    except InputError:
        return  # refusing is fine, too
    loaded = load(tmp_path / "b").plan
    np.testing.assert_array_equal(loaded.path, path.astype(np.float32))


@pytest.mark.parametrize(("step", "names"), [(-1, []), (1, ["fc@1"]), (2, ["fc@1", "fc@2"])])
def test_only_caches_of_the_certified_step_run(tmp_path, step, names):
    chain, caches, plan, _ = make(1)
    gati_jax.save_bundle(tmp_path / "b", chain, caches, plan, make_certificate(plan, step=step))
    loaded = load(tmp_path / "b")
    assert [c.name for c in loaded.caches] == ["fc@1", "fc@2"]
    assert [c.name for c in loaded.cascade.caches] == names
    if not names:
        prediction = gati_jax.infer_batch(loaded, REQUESTS)
        assert set(np.asarray(prediction.exit).tolist()) == {3}
        np.testing.assert_array_equal(prediction.class_index, np.argmax(chain(jnp.asarray(REQUESTS)), -1))


def widen(params, x):
    return jnp.tanh(x @ params["w"].astype(x.dtype))


def test_parameters_keep_their_dtype(tmp_path):
    chain, caches, plan, certificate = make(1)
    params = [{"w": jnp.asarray(chain.params[0]["w"], dtype)} for dtype in ("bfloat16", "float16", "int8")]
    mixed = Chain((widen,) * 3, classify, [*params, chain.params[3]], chain.input_spec)
    gati_jax.save_bundle(tmp_path / "b", mixed, caches, plan, certificate)
    loaded = gati_jax.load_bundle(tmp_path / "b", chain=jax.tree.map(jnp.zeros_like, mixed))
    assert _bits(loaded.chain.params) == _bits(mixed.params)
    with pytest.raises(BundleError, match=r"3 misshapen: base/0/w .*expected float32"):
        load(tmp_path / "b")


def _bits(tree: Any) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    "params",
    [2.0, {"a": {"b": np.ones(1, np.float32)}, "a/b": np.zeros(1, np.float32)}],
    ids=["a Python number", "names that collide"],
)
def test_odd_parameters_are_kept_or_refused(tmp_path, params):
    chain, caches, plan, certificate = make(1)
    odd = Chain((lambda _, x: x, block, block), classify, (params, *chain.params[1:]), chain.input_spec)
    try:
        gati_jax.save_bundle(tmp_path / "b", odd, caches, plan, certificate)
    except InputError:
        return
    loaded = gati_jax.load_bundle(tmp_path / "b", chain=odd)
    values = [[np.asarray(leaf).item() for leaf in jax.tree.leaves(tree)] for tree in (loaded.chain.params[0], params)]
    assert values[0] == values[1]


def test_infer_is_a_function_whichever_name_is_used_first():
    """A module of the name of a function takes its place in the package as soon as anything imports it."""
    script = "import gati_jax; gati_jax.infer_batch; print(callable(gati_jax.infer))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"
