"""Every driver against a cascade written out by hand."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax.caches import FullyConnected, SortedSelector, lookup
from gati_jax.runtime import Cascade, check_cascade, compiled, predict_batch, predict_one, predict_stepwise
from gati_jax.runtime import cascade as drivers

INF = float("inf")
DEPTH = 5


@pytest.fixture(scope="module")
def caches(chain, candidates, splits):
    """By site: the fitted caches, and an untrained one at site 0."""
    activations, _ = chain.activations(jnp.asarray(splits["fit"][:64]))
    predictor, selector = FullyConnected(10, hidden=8), SortedSelector()
    keys = jax.random.split(jax.random.key(5))
    variables = predictor.init(keys[0], activations[0])
    params = {"predictor": variables, "selector": selector.init(keys[1], jnp.zeros((1, 10)))}
    return {0: gati_jax.Candidate("fc@0", 0, predictor, selector, params)} | {c.site: c for c in candidates}


@pytest.fixture(scope="module")
def looked_up(chain, caches, splits):
    """For all test rows at once: logits and scores of every cache by site, and the base's logits."""
    activations, base_logits = chain.activations(jnp.asarray(splits["test"]))
    outputs = {site: [np.asarray(v) for v in lookup(cache, activations[site])] for site, cache in caches.items()}
    return outputs, np.asarray(base_logits)


def between(scores, share):
    """A threshold that about ``share`` of the scores clear, in the middle of the widest gap nearby."""
    ranked = np.sort(scores)
    at = int((1 - share) * (len(ranked) - 1))
    near = np.arange(max(at - 5, 0), min(at + 5, len(ranked) - 1))
    best = near[np.argmax(ranked[near + 1] - ranked[near])]
    return float(ranked[best] + ranked[best + 1]) / 2


def make_cascade(chain, caches, looked_up, sites, shares):
    """Shares of hits, or infinities, to thresholds."""
    outputs, _ = looked_up
    thresholds = [s if np.isinf(s) else between(outputs[site][1], s) for site, s in zip(sites, shares, strict=True)]
    cascade = Cascade(chain, tuple(caches[site] for site in sites), jnp.asarray(thresholds, jnp.float32))
    check_cascade(cascade)
    return cascade


def assert_by_hand(prediction, cascade, looked_up, row):
    """Compare with one request that goes from cache to cache until one is sure."""
    outputs, base_logits = looked_up
    expected = (DEPTH, INF, base_logits[row])
    for cache, threshold in zip(reversed(cascade.caches), np.asarray(cascade.thresholds)[::-1], strict=True):
        logits, scores = outputs[cache.site]
        if scores[row] >= threshold:
            expected = (cache.site, scores[row], logits[row])
    exit_, score, logits = expected
    assert (int(prediction.class_index), int(prediction.exit)) == (int(logits.argmax()), exit_)
    assert float(prediction.score) == pytest.approx(score, rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(prediction.logits, logits, rtol=1e-4, atol=1e-4)


CASES = {
    "all caches": ((1, 2, 3, 4), (0.2, 0.3, 0.4, 0.5)),
    "all miss": ((1, 2, 3, 4), (INF, INF, INF, INF)),
    "all hit": ((1, 2, 3, 4), (-INF, -INF, -INF, -INF)),
    "one in the middle is off": ((1, 2, 3, 4), (0.3, INF, INF, 0.6)),
    "last takes the rest": ((1, 2, 3, 4), (0.3, 0.3, 0.3, -INF)),
    "cache at the input": ((0, 2), (0.3, 0.5)),
    "cache at the input takes all": ((0, 2), (-INF, 0.5)),
    "single cache": ((3,), (0.6,)),
    "no caches": ((), ()),
}


@pytest.mark.parametrize(("sites", "shares"), CASES.values(), ids=CASES.keys())
def test_every_driver_is_the_cascade_by_hand(chain, caches, looked_up, splits, sites, shares):
    cascade = make_cascade(chain, caches, looked_up, sites, shares)
    images = jnp.asarray(splits["test"])
    predictions = [predict_one(cascade, image) for image in images]
    batch = predict_batch(cascade, images)
    assert batch.logits.shape == (len(images), 10)
    for row, prediction in enumerate(predictions):
        assert_by_hand(prediction, cascade, looked_up, row)
        assert_by_hand(jax.tree.map(lambda column, row=row: column[row], batch), cascade, looked_up, row)
    if sites and not np.isinf(shares).any():
        assert {int(p.exit) for p in predictions} == {*sites, DEPTH}  # the case is no trivial one
    for row in range(6):
        assert_by_hand(predict_stepwise(cascade, images[row]), cascade, looked_up, row)


def test_a_score_at_the_threshold_is_a_hit(chain, caches, splits):
    image = jnp.asarray(splits["test"][0])
    always = Cascade(chain, (caches[2],), jnp.asarray([-jnp.inf]))
    score = jnp.asarray(predict_one(always, image).score)
    assert int(predict_one(Cascade(chain, (caches[2],), score[None]), image).exit) == 2
    above = jnp.nextafter(score, jnp.float32(1e9))[None]
    assert int(predict_one(Cascade(chain, (caches[2],), above), image).exit) == DEPTH


# A chain that tells what it does.


class Counter:
    """Counts how often a block is traced, and how often it really runs."""

    def __init__(self):
        self.traces = self.runs = 0

    def block(self, params, x):
        self.traces += 1
        jax.debug.callback(self.ran)
        return jnp.tanh(x @ params["w"] + params["b"].reshape(1, -1))

    def ran(self):
        self.runs += 1

    def count_runs(self, call):
        jax.effects_barrier()
        before = self.runs
        result = jax.block_until_ready(call())
        jax.effects_barrier()
        return self.runs - before, result


@pytest.fixture(scope="module")
def counted(chain):
    """The chain with its third block counted."""
    counter = Counter()
    blocks = [*chain.blocks]
    blocks[2] = counter.block
    return counter, gati_jax.Chain(blocks, chain.classifier, chain.params, chain.input_spec)


def test_what_lies_behind_a_hit_is_not_run(counted, caches, splits):
    counter, chain = counted
    image = jnp.asarray(splits["test"][0])

    for thresholds, expected in (
        ((-INF, INF, INF), (0, 1)),
        ((INF, -INF, INF), (0, 2)),
        ((INF, INF, -INF), (1, 4)),
        ((INF, INF, INF), (1, 5)),
    ):
        cascade = Cascade(chain, (caches[1], caches[2], caches[4]), jnp.asarray(thresholds, jnp.float32))
        count, prediction = counter.count_runs(lambda cascade=cascade: predict_one(cascade, image))
        assert (count, int(prediction.exit)) == expected


def test_rows_of_a_batch_skip_each_for_itself(counted, caches, looked_up, splits):
    counter, chain = counted
    cascade = make_cascade(chain, caches, looked_up, (1, 2, 4), (0.3, 0.5, 0.5))
    images = jnp.asarray(splits["test"][:60])
    count, prediction = counter.count_runs(lambda: predict_batch(cascade, images))
    for row in range(60):
        assert_by_hand(jax.tree.map(lambda column, row=row: column[row], prediction), cascade, looked_up, row)
    assert 0 < count == int((np.asarray(prediction.exit) > 2).sum()) < 60


def test_new_values_of_the_same_shapes_never_recompile(counted, caches, splits):
    counter, chain = counted
    images = jnp.asarray(splits["test"])
    # Two caches, unlike the tests above, so that the first call here traces.
    before = counter.traces
    cascade = Cascade(chain, (caches[1], caches[3]), jnp.asarray([1.0, 2.0]))
    predict_one(cascade, images[0])
    predict_batch(cascade, images[:20])
    jitted: tuple[Any, ...] = (compiled(drivers._predict_one, ()), drivers._predict_batch)
    traced, programs = counter.traces, [driver._cache_size() for driver in jitted]
    assert traced > before
    for i in range(1, 4):
        params = jax.tree.map(lambda v, i=i: v * (1 + i / 10), chain.params)
        new_chain = gati_jax.Chain(chain.blocks, chain.classifier, params, chain.input_spec)
        new_caches = tuple(
            dataclasses.replace(c, params=jax.tree.map(lambda v: v * 0.9, c.params)) for c in cascade.caches
        )
        other = Cascade(new_chain, new_caches, jnp.asarray([0.5 * i, -1.0 * i]))
        predict_one(other, images[i])
        predict_batch(other, images[20 * i : 20 * i + 20])
    assert counter.traces == traced
    assert [driver._cache_size() for driver in jitted] == programs


# Activations of many shapes and dtypes. All arithmetic is exact, so that equal means equal to the last bit.


def widen(_, x):  # float32[b, 4, 4, 1] -> float32[b, 4, 4, 6]
    return jnp.concatenate([x * 2.0**i for i in range(6)], axis=-1)


def halve(_, x):  # -> float16[b, 2, 2, 6], the only rounding
    return x[:, ::2, 1::2].astype(jnp.float16)


def flatten(_, x):  # -> bfloat16[b, 24]: the mantissas of the inputs are short enough
    return x.reshape(x.shape[0], -1)[:, ::-1].astype(jnp.bfloat16)


def shrink(_, x):  # -> float32[b, 5]
    return x[:, 3:8].astype(jnp.float32) / 4


def permute(_, x):
    return x[:, jnp.asarray([4, 2, 0, 1, 3])]


def shrinking_chain():
    spec = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32)
    return gati_jax.Chain((widen, halve, flatten, shrink), permute, ((),) * 5, spec)


@pytest.mark.parametrize("sites", [(0, 2), (1, 2, 3)])
def test_activations_survive_the_flat_buffer_exactly(sites):
    chain = shrinking_chain()
    rng = np.random.default_rng(0)
    images = jnp.asarray((rng.integers(-127, 128, (8, 4, 4, 1)) / 64).astype(np.float32))  # 7 bits and a sign
    assert {str(spec.dtype) for spec in chain.site_specs} == {"float32", "float16", "bfloat16"}
    predictor, selector = Mean(classes=5), First()
    caches = tuple(
        gati_jax.Candidate(f"mean@{site}", site, predictor, selector, {"predictor": {}, "selector": {}})
        for site in sites
    )
    off = Cascade(chain, caches, jnp.full(len(sites), jnp.inf))
    expected = np.asarray(chain(images))
    assert len(np.unique(expected)) > 20
    np.testing.assert_array_equal(predict_batch(off, images).logits, expected)
    np.testing.assert_array_equal(predict_one(off, images[0]).logits, expected[0])
    # The last cache sees its site's activation whole, too.
    last = Cascade(chain, caches, jnp.full(len(sites), jnp.inf).at[-1].set(-jnp.inf))
    prediction = predict_one(last, images[0])
    activation = np.asarray(chain.activations(images[:1])[0][sites[-1]], np.float64)
    assert int(prediction.exit) == sites[-1]
    assert float(prediction.score) == activation.max()
    assert float(prediction.logits[1]) == activation.min()


class Mean(FullyConnected):
    """A predictor without parameters whose logits are the activation's largest and smallest value, and zeros."""

    def __call__(self, activation):
        flat = activation.reshape(activation.shape[0], -1).astype(jnp.float32)
        ends = jnp.stack([flat.max(-1), flat.min(-1)], axis=-1)
        return jnp.concatenate([ends, jnp.zeros((flat.shape[0], self.classes - 2))], axis=-1)


class First(SortedSelector):
    """A selector whose score is the first logit."""

    def __call__(self, logits):
        return logits[:, 0]


def test_a_chain_of_whole_numbers_keeps_them():
    # float32 holds whole numbers up to 2^24 only: indices beyond it would land on a neighbour.
    def low_bits(_, x):
        return (x & 7).astype(jnp.float32)

    chain = gati_jax.Chain((low_bits,), lambda _, x: x, ((), ()), jax.ShapeDtypeStruct((3,), jnp.int32))
    tokens = jnp.asarray([2**24 + 1, 2**24 + 3, 5], jnp.int32)
    cascade = Cascade(chain, (), jnp.zeros(0))
    assert predict_one(cascade, tokens).logits.tolist() == [1, 3, 5]


def test_reference_products_are_float32_on_every_device(chain, caches, splits):
    """What an accelerator would round, a CPU does not: so look into the programs."""
    cascade = Cascade(chain, (caches[2],), jnp.zeros(1))
    image = jnp.asarray(splits["test"][0])
    for driver, rows in ((compiled(drivers._predict_one, ()), image), (drivers._predict_batch, image[None])):
        program = str(jax.make_jaxpr(driver)(cascade.packed, rows))
        products = re.findall(r"precision=(.*)", program)
        assert len(products) > 3
        assert all(precision.count("HIGHEST") == 2 for precision in products), products


def test_uint8_images_are_prepared_once():
    normalization = gati_jax.Normalization(mean=(0.5,), std=(0.25,))
    base = shrinking_chain()
    chain = gati_jax.Chain(base.blocks, base.classifier, base.params, base.input_spec, normalization)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 1)).astype(np.uint8)
    prepared = ((pixels / 255 - 0.5) / 0.25).astype(np.float32)
    cascade = Cascade(chain, (), jnp.zeros(0))
    expected = np.asarray(chain(jnp.asarray(prepared)))
    np.testing.assert_allclose(predict_batch(cascade, jnp.asarray(pixels)).logits, expected, rtol=1e-2)
    np.testing.assert_array_equal(predict_batch(cascade, jnp.asarray(prepared)).logits, expected)


@pytest.mark.parametrize(
    ("sites", "thresholds", "message"),
    [
        *(
            (sites, (0,) * len(sites), f"caches: expected rising sites in 0 .. 4, got {re.escape(str(sites))}")
            for sites in ((2, 1), (1, 1), (5,), (-1, 2))
        ),
        ((1, 2), (0,), r"thresholds: expected one for each of 2 caches, got shape \[1\]"),
        ((), (0,), r"thresholds: expected one for each of 0 caches, got shape \[1\]"),
    ],
    ids=["falling", "twice", "behind the last block", "negative", "too few thresholds", "too many"],
)
def test_check_cascade_refuses(chain, caches, sites, thresholds, message):
    items = tuple(dataclasses.replace(caches[1], site=site) for site in sites)
    with pytest.raises(gati_jax.InputError, match=message):
        check_cascade(Cascade(chain, items, jnp.asarray(thresholds, jnp.float32)))
