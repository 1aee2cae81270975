"""The batched driver against the per-sample one, and schedules against brute force."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gati_jax
from gati_jax.runtime import Cascade, predict_one
from gati_jax.runtime.batched import BatchedCascade, Schedule, answer_tiled, predict_tiled

INF = float("inf")
EIGHT_TWO = Schedule.of({8: 4.0, 2: 1.5})


@pytest.fixture(scope="module")
def caches(candidates):
    return tuple(sorted(candidates, key=lambda c: c.site))[:2]


def scores_of(chain, cache, images):
    return gati_jax.replay(chain, (cache,), np.asarray(images)).scores[0]


@pytest.mark.parametrize("schedule", [EIGHT_TWO, Schedule.of({4: 1.0}), Schedule.of({1: 1.0})], ids=["8+2", "4", "1"])
@pytest.mark.parametrize("batch", [1, 2, 7, 8, 13])
@pytest.mark.parametrize("shares", [(INF, INF), (-INF, INF), (INF, -INF), (0.5, 0.5), (0.1, INF)], ids=str)
def test_every_row_leaves_as_it_would_alone(chain, caches, splits, schedule, batch, shares):
    images = jnp.asarray(splits["test"][:batch])
    thresholds = [
        share if np.isinf(share) else float(np.quantile(scores_of(chain, c, splits["test"]), 1 - share))
        for c, share in zip(caches, shares, strict=True)
    ]
    cascade = Cascade(chain, caches, jnp.asarray(thresholds, jnp.float32))
    found = predict_tiled(BatchedCascade.of(cascade, schedule), images)
    for row, image in enumerate(images):
        alone = predict_one(cascade, image)
        assert int(found.exit[row]) == int(alone.exit)
        assert int(found.class_index[row]) == int(alone.class_index)
        np.testing.assert_allclose(found.logits[row], alone.logits, atol=1e-4)
        np.testing.assert_allclose(found.score[row], alone.score, atol=1e-4)


@pytest.mark.parametrize("schedule", [EIGHT_TWO, Schedule.of({8: 1.0})], ids=["8+2", "8"])
def test_a_tile_as_large_as_the_batch_is_not_computed_where_it_is_not_run(chain, caches, splits, schedule):
    """The compiler moves out of a loop what it takes for a constant, and then runs it even if the loop does not."""
    images = jnp.asarray(splits["test"][:8])
    batched = BatchedCascade.of(Cascade(chain, caches, jnp.full(len(caches), INF)), schedule)
    leaves, tree = jax.tree.flatten(batched.packed)
    run = jax.jit(lambda leaves, *rows: answer_tiled(tree.unflatten(leaves), *rows))
    program = run.lower(leaves, images, np.int32(0)).compile().as_text() or ""
    outside = program[program.index("\nENTRY") :]
    assert " while(" in outside
    assert not re.search(r" (dot|convolution|custom-call)\(|kind=kCustom", outside)


def test_padding_is_not_answered_and_changes_nothing(chain, caches, splits):
    cascade = BatchedCascade.of(Cascade(chain, caches, jnp.zeros(2)), EIGHT_TWO)
    images = np.asarray(splits["test"][:16])
    whole, part = predict_tiled(cascade, jnp.asarray(images)), predict_tiled(cascade, jnp.asarray(images), 11)
    garbage = predict_tiled(cascade, jnp.asarray(np.concatenate([images[:11], 0 * images[:5]])), 11)
    for full, some, other in zip(whole, part, garbage, strict=True):
        np.testing.assert_array_equal(some[:11], other[:11])
        np.testing.assert_allclose(full[:11], some[:11], atol=1e-4)


@pytest.mark.parametrize(("rows", "count"), [(0, None), (3, 0), (3, 4), (3, -1)])
def test_a_count_that_cannot_be_is_refused(chain, caches, splits, rows, count):
    cascade = BatchedCascade.of(Cascade(chain, caches, jnp.zeros(2)), EIGHT_TWO)
    got = 0 if count is None else count
    with pytest.raises(gati_jax.InputError, match=rf"count: expected 1 to {rows}, the length of images, got {got}"):
        predict_tiled(cascade, splits["test"][:rows], count)


def test_work_behind_an_exit_is_not_done_and_nothing_recompiles(caches, splits, chain):
    """Blocks tell how many rows they ran: whole tiles, of the survivors only."""
    ran: list[tuple[int, int]] = []
    traced: list[int] = []

    def counting(index: int):
        def block(params, x):
            traced.append(index)
            jax.debug.callback(functools.partial(ran.append, (index, len(x))))
            return chain.blocks[index](params, x)

        return block

    blocks = tuple(counting(i) for i in range(len(chain)))
    watched = gati_jax.Chain(blocks, chain.classifier, chain.params, chain.input_spec)
    images = jnp.asarray(splits["test"][:13])
    scores = scores_of(chain, caches[0], images)
    threshold = np.sort(scores)[4:6].mean()  # eight hit, five go on
    cascade = BatchedCascade.of(Cascade(watched, caches[:1], jnp.asarray([threshold], jnp.float32)), EIGHT_TWO)
    jax.block_until_ready(predict_tiled(cascade, images).exit)
    jax.effects_barrier()
    rows = {index: sum(n for i, n in ran if i == index) for index in range(len(chain))}
    site = caches[0].site
    # 13 rows: a tile of 8, and 5 more as another 8 (4.0 ms) rather than three times 2 (4.5 ms); then these 5 again
    assert rows == {index: 16 if index < site else 8 for index in range(len(chain))}
    before = len(traced)
    other = Cascade(watched, caches[:1], jnp.asarray([INF], jnp.float32))
    jax.block_until_ready(predict_tiled(BatchedCascade.of(other, EIGHT_TWO), images + 0).exit)
    jax.block_until_ready(predict_tiled(BatchedCascade.of(other, EIGHT_TWO), images, 3).exit)
    assert len(traced) == before


@settings(max_examples=60, deadline=None)
@given(ms=st.dictionaries(st.integers(1, 9), st.floats(0.1, 10), min_size=1, max_size=3), rows=st.integers(0, 30))
def test_schedules_are_as_good_as_brute_force(ms, rows):
    schedule = Schedule.of(ms)
    full, rest = divmod(rows, schedule.sizes[0])
    sizes = schedule.sizes
    options = [
        sum(ms[s] * c for s, c in zip(sizes, counts, strict=True))
        for counts in itertools.product(range(10), repeat=len(sizes))
        if sum(s * c for s, c in zip(sizes, counts, strict=True)) >= rest
    ]
    assert schedule.milliseconds(rows, ms) == pytest.approx(full * ms[sizes[0]] + min(options))
    assert schedule.sizes[0] == max(s for s in ms if ms[s] / s == min(ms[t] / t for t in ms))
    assert all(schedule.covered(rows) >= schedule.covered(r) >= r for r in range(rows))


@pytest.mark.parametrize(
    ("sizes", "rest", "message"),
    [((), (), "falling"), ((2, 4), ((0, 0), (1, 0)), "falling"), ((2,), ((0,),), "cover"), ((1,), ((-1,),), "cover")],
)
def test_schedules_that_leave_rows_out_are_refused(sizes, rest, message):
    with pytest.raises(gati_jax.InputError, match=message):
        Schedule(sizes=sizes, rest=rest)


def test_a_batch_smaller_than_every_tile_is_refused():
    with pytest.raises(gati_jax.InputError, match="at most 1 rows"):
        Schedule.of({2: 1.0}, batch=1)
