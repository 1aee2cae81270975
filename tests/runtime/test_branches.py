"""Drivers of two-way branches, and those that the host takes, against the per-sample loop."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax.runtime import Cascade, predict_one
from gati_jax.runtime.branches import answer_nested, answer_one_nested, levels, predict_nested
from gati_jax.runtime.hosted import predict_hosted

pytestmark = pytest.mark.gpu
INF = float("inf")
DRIVERS = {"nest": predict_nested, "host": predict_hosted}


@pytest.fixture(scope="module")
def caches(candidates):
    return tuple(sorted(candidates, key=lambda c: c.site))[:2]


@pytest.fixture(scope="module")
def halves(chain, caches, splits):
    """By share of hits at each cache, the cascade; and the answers of single requests."""

    @functools.cache
    def build(shares):
        scores = gati_jax.replay(chain, caches, splits["test"]).scores
        thresholds = [s if np.isinf(s) else np.quantile(row, 1 - s) for row, s in zip(scores, shares, strict=True)]
        cascade = Cascade(chain, caches, jnp.asarray(thresholds, jnp.float32))
        return cascade, [predict_one(cascade, image) for image in splits["test"][:16]]

    return build


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(("length", "count"), [(1, 1), (2, 2), (16, 16), (16, 11)])
@pytest.mark.parametrize("shares", [(0.3, 0.9), (INF, INF), (-INF, INF), (INF, -INF)], ids=str)
def test_every_row_leaves_as_it_would_alone(halves, splits, driver, length, count, shares):
    cascade, alone = halves(shares)
    found = DRIVERS[driver](cascade, splits["test"][:length], count)
    for row, expected in enumerate(alone[:count]):
        assert int(found.exit[row]) == int(expected.exit)
        assert int(found.class_index[row]) == int(expected.class_index)
        np.testing.assert_allclose(found.logits[row], expected.logits, atol=1e-4)
        np.testing.assert_allclose(found.score[row], expected.score, atol=1e-4)
    if shares == (0.3, 0.9) and count == 16:
        assert len({int(one.exit) for one in alone}) == 3  # not a trivial case


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_stage_runs_on_the_smallest_level_that_holds_the_rows_left(caches, splits, chain, driver):
    """Blocks tell how many rows they ran."""
    ran: list[tuple[int, int]] = []

    def counting(index: int):
        def block(params, x):
            jax.debug.callback(functools.partial(ran.append, (index, len(x))))
            return chain.blocks[index](params, x)

        return block

    blocks = tuple(counting(i) for i in range(len(chain)))
    watched = gati_jax.Chain(blocks, chain.classifier, chain.params, chain.input_spec)
    images, site = splits["test"][:16], caches[0].site
    scores = gati_jax.replay(chain, caches[:1], images).scores[0]
    for left, threshold in ((13, np.sort(scores)[12:14].mean()), (3, np.sort(scores)[2:4].mean()), (0, -INF)):
        ran.clear()
        cascade = Cascade(watched, caches[:1], jnp.asarray([threshold], jnp.float32))
        jax.block_until_ready(DRIVERS[driver](cascade, images, 16).logits)
        jax.effects_barrier()
        expected = next((level for level in levels(16) if level >= left), 0) if left else 0
        rows = {index: sum(n for i, n in ran if i == index) for index in range(len(chain))}
        assert rows == {index: 16 if index < site else expected for index in range(len(chain))}


def test_no_loop_is_in_programs_of_branches(chain, caches, splits):
    """What a GPU could not capture: a loop. (The host's programs are single stages.)"""
    cascade = Cascade(chain, caches, jnp.zeros(2))
    leaves, tree = jax.tree.flatten(cascade.packed)
    one = jax.jit(lambda leaves, x: answer_one_nested(tree.unflatten(leaves), x)).lower(leaves, splits["test"][:1])
    many = jax.jit(lambda leaves, *rows: answer_nested(tree.unflatten(leaves), *rows))
    many = many.lower(leaves, splits["test"][:8], np.int32(8))
    for lowered, branches in ((one, len(caches)), (many, len(caches) + 1)):
        text = lowered.as_text()
        assert "stablehlo.while" not in text
        assert len(re.findall(r"stablehlo\.(case|if)", text)) >= branches
