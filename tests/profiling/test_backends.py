"""Costs of ONNX Runtime, and which backend is the faster one, by made-up times."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gati_jax import CostTable, InputError
from gati_jax.caches import Grid, LinearSelector, SortedSelector
from gati_jax.profiling import (
    AnyBatch,
    Tuning,
    backends,
    costs,
    device_name,
    expected_ms,
    fastest,
    measure_onnx_costs,
    onnx_tuning,
    reference_tuning,
    run_by,
    stages_ms,
)
from gati_jax.profiling.costs import unsteady
from gati_jax.runtime import Cascade
from tests.export.made import CLASSES, SMALL, VGGS, parts, with_network

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    """Two caches, at sites 1 and 2 of three blocks."""
    heads = [(1, Grid(CLASSES, 2, 6), SortedSelector(4, 3)), (2, Grid(CLASSES, 1, 6), LinearSelector())]
    chain, caches, _ = parts(VGGS, heads)
    return Cascade(chain, caches, jnp.zeros(2))


def between(rows: int, batch_ms: dict[int, float]) -> float:
    """On the line between the two nearest measured batches; beyond the largest, as many rows a millisecond as in it."""
    sizes = sorted(batch_ms)
    if rows == 0:
        return 0.0
    if rows >= sizes[-1]:
        return batch_ms[sizes[-1]] * rows / sizes[-1]
    for low, high in itertools.pairwise(sizes):
        if low <= rows <= high:
            return batch_ms[low] + (batch_ms[high] - batch_ms[low]) * (rows - low) / (high - low)
    return batch_ms[sizes[0]]


@settings(deadline=None)
@given(
    rows=st.integers(0, 500),
    batch_ms=st.dictionaries(st.integers(1, 200), st.floats(0.01, 100), min_size=1, max_size=5),
)
def test_times_of_any_batch_lie_between_measured_ones(rows, batch_ms):
    assert AnyBatch(()).milliseconds(rows, batch_ms) == pytest.approx(between(rows, batch_ms))


def with_costs(cascade: Cascade, *sizes: int) -> Tuning:
    """A block takes 1 ms for one row and a half more for each further one, a lookup a tenth of a block."""
    tuning, tiles = onnx_tuning(cascade.chain, cascade.caches, sizes=sizes), []
    for tile in tuning.tiles:
        block = (1 + tile.size) / 2
        table = CostTable(
            device="test",
            batch=tile.size,
            blocks_ms=(block,) * len(cascade.chain),
            lookup_ms={cache.name: block / 10 for cache in cascade.caches},
        )
        tiles.append(dataclasses.replace(tile, milliseconds=table.full_ms, costs=table))
    return dataclasses.replace(tuning, tiles=tuple(tiles))


@settings(deadline=None, max_examples=30)
@given(exits=st.lists(st.sampled_from([1, 2, 3]), min_size=12, max_size=12), batch=st.sampled_from([1, 3, 6, 12]))
def test_expected_times_are_those_of_batches_of_the_rows_that_are_left(cascade, exits, batch):
    """Times rise by a straight line here, so that interpolated ones are exact."""
    tuned, total = run_by(with_costs(cascade, 1, 4, 16), cascade), 0.0
    for group in range(0, 12, batch):
        left = exits[group : group + batch]
        for site in (1, 2, 3):
            rows = sum(exit_ >= site for exit_ in left)
            total += (1.1 if site < 3 else 1.0) * (1 + rows) / 2 * (rows > 0)
    found = expected_ms(cascade, tuned.costs(batch), tuned.schedule(batch), np.array(exits), batch)
    assert found == pytest.approx(total / (12 / batch))


def test_the_nearest_measured_batch_comes_first(cascade):
    tuned = run_by(with_costs(cascade, 1, 4, 16), cascade)
    assert [tuned.schedule(batch).sizes for batch in (1, 3, 7, 9, 99)] == [
        (1, 4, 16), (4, 1, 16), (4, 16, 1), (16, 4, 1), (16, 4, 1),
    ]  # fmt: skip
    with pytest.raises(InputError, match="tuning: expected measured costs for every tile"):
        run_by(onnx_tuning(cascade.chain), cascade).costs(1)


@pytest.fixture
def made_up(monkeypatch):
    """Times by name, 1 ms for everything else; of a turn's calls the first does not count."""
    known = {}

    def interleaved(programs, *, rounds, **_):
        for call in programs.values():
            call()
        return {name: np.full(rounds, known.get(name, 1.0)) for name in programs}

    def turns(programs, rounds, **_):
        calls = {name: [1000.0, *[known.get(name, 1.0)] * (len(calls) - 1)] for name, calls in programs.items()}
        return {name: np.tile(ms, (rounds, 1)) for name, ms in calls.items()}

    for module in (backends, costs):
        monkeypatch.setattr(module, "time_interleaved", interleaved)
    monkeypatch.setattr(costs, "time_turns", turns)
    return known


@pytest.mark.parametrize(
    ("sites", "spans", "expected"),
    [
        (None, {"1": 2.0, "2": 4.0, "3": 6.0}, (1.0, 2.0, 3.0)),
        ((0, 2), {"2": 8.0, "3": 4.0}, (2.0, 2.0, 2.0)),  # blocks between two cuts share their time
        ((), {"3": 9.0}, (2.0, 2.0, 2.0)),
    ],
)
def test_blocks_take_together_what_the_full_network_takes(cascade, made_up, sites, spans, expected):
    """Spans take longer together, which is the caches' doing."""
    made_up |= {"full": 6.0, **spans}
    found = measure_onnx_costs(cascade.chain, (), rounds=3, batch=2, sites=sites)
    assert found.blocks_ms == pytest.approx(expected)
    assert (found.full_ms, found.batch) == (pytest.approx(6.0), 2)
    assert (found.device, found.lookup_ms, unsteady(found)) == (device_name("onnxruntime"), {}, "")


def test_lookups_take_what_a_cascade_that_misses_takes_more(cascade, made_up):
    one, two = cascade.caches
    made_up |= {"0": 4.0, "1": 5.0, one.name: 0.5, two.name: 1.5}
    found = measure_onnx_costs(cascade.chain, cascade.caches, rounds=3)
    assert found.lookup_ms == {one.name: pytest.approx(0.25), two.name: pytest.approx(0.75)}


def test_a_small_network_is_timed_with_what_prepares_its_images(made_up):
    bundle, _ = with_network()
    small, head = bundle.caches
    assert small.predictor.network == SMALL
    made_up |= {"0": 4.0, "1": 4.5, small.name: 2.5}
    assert measure_onnx_costs(bundle.chain, bundle.caches, rounds=3).lookup_ms == {small.name: 2.5, head.name: 0.5}


def test_measured_costs_are_complete(cascade):
    found = measure_onnx_costs(cascade.chain, cascade.caches, rounds=2, batch=3)
    assert len(found.blocks_ms) == len(cascade.chain)
    assert min(*found.blocks_ms, *found.lookup_ms.values(), *stages_ms(cascade, found)) > 0
    assert set(found.lookup_ms) == {cache.name for cache in cascade.caches}


def test_every_batch_of_a_tuning_is_measured(cascade, monkeypatch):
    asked = []

    def measure(chain, caches, *, rounds, batch, sites):
        asked.append((batch, tuple(cache.name for cache in caches), sites, rounds))
        lookup_ms = dict.fromkeys((cache.name for cache in caches), 0.1)
        return CostTable(device="x", batch=batch, blocks_ms=(float(batch),) * len(chain), lookup_ms=lookup_ms)

    monkeypatch.setattr(backends, "measure_onnx_costs", measure)
    tuning = run_by(onnx_tuning(cascade.chain, sizes=(4, 64)), cascade).measured(rounds=16)
    names = tuple(cache.name for cache in cascade.caches)
    assert asked == [(1, names, (1, 2), 16), (4, names, (1, 2), 11), (64, names, (1, 2), 5)]
    assert [tile.milliseconds for tile in tuning.tiles] == [3.0, 12.0, 192.0]
    assert all(tile.costs and tile.costs.batch == tile.size for tile in tuning.tiles)


@pytest.mark.parametrize(
    ("xla", "onnx", "first"),
    [((1.0, 8.0), (2.0, 4.1), "xla"), ((1.0, 8.0), (2.0, 3.9), "onnxruntime"), ((1.0, 9.0), (0.9, 9.0), "onnxruntime")],
)
def test_the_fastest_is_so_for_one_request_and_for_many(cascade, xla, onnx, first):
    """The product of both decides."""
    found = []
    for tuning, (one, many) in ((reference_tuning((1, 8)), xla), (onnx_tuning(cascade.chain, sizes=(1, 8)), onnx)):
        tiles = (dataclasses.replace(t, milliseconds=ms) for t, ms in zip(tuning.tiles, (one, many), strict=True))
        found.append(dataclasses.replace(tuning, tiles=tuple(tiles)))
    assert fastest(found)[0].backend == fastest(found[::-1])[0].backend == first


@pytest.mark.parametrize("sizes", [(0,), (4097,), range(2, 30)])
def test_sizes_that_cannot_be_are_refused(cascade, sizes):
    with pytest.raises(InputError, match=r"^sizes: expected up to 16 of 1 to 4096 rows"):
        onnx_tuning(cascade.chain, sizes=sizes)


def test_an_operation_without_an_onnx_form_is_named(sorting):
    with pytest.raises(InputError, match=r"^backend: expected functions that ONNX can .* operation sort in block 1"):
        onnx_tuning(sorting)


def test_a_user_s_own_chain_answers_as_the_reference_does(chain, digits):
    tuned = run_by(onnx_tuning(chain), Cascade(chain, (), jnp.zeros(0)))
    images = np.asarray(digits.images[800:900])
    np.testing.assert_allclose(tuned.predict(images).logits, chain(jnp.asarray(images)), rtol=1e-4, atol=1e-4)


def test_an_answer_of_one_request_is_that_of_a_batch_of_one(cascade):
    tuned = run_by(onnx_tuning(cascade.chain), cascade)
    image = np.random.default_rng(0).integers(0, 256, cascade.chain.input_spec.shape, np.uint8)
    one, batch = tuned.predict_one(image), tuned.predict(image[None])
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b[0]), one, batch))
    with pytest.raises(InputError, match="images: expected at least one"):
        tuned.predict(image[None][:0])
