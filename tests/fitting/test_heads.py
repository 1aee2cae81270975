"""Cascaded heads, further selectors, candidates before they are trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import InputError
from gati_jax.caches import LinearSelector, ProbabilitySelector, SortedSelector, lookup, on_its_own
from gati_jax.caches.candidate import Part
from gati_jax.fitting import head_sizes, replay_logits, untrained
from gati_jax.fitting.heads import more_selectors
from gati_jax.pytrees import call
from gati_jax.runtime import Cascade, check_cascade
from tests.fitting import tiny
from train.reproduce import max_probability

SHORT = dataclasses.replace(tiny.CONFIG, epochs=2)


def fit(*heads):
    rows, select = tiny.images()
    return gati_jax.fit(tiny.chain(), rows, select=select, heads=heads, config=SHORT, progress=False)


@pytest.fixture(scope="module")
def independent():
    return fit(tiny.head(0, 1, 2))


CASCADED = dataclasses.replace(tiny.head(0, 1, 2), selectors=(("linear", LinearSelector()),), cascaded=True)


@pytest.fixture(scope="module")
def cascaded():
    return fit(CASCADED)


def test_further_selectors_share_a_predictor_and_do_not_disturb_it(independent):
    further = (("linear", LinearSelector()), ("probability", ProbabilitySelector()))
    candidates = fit(dataclasses.replace(tiny.head(0, 1, 2), selectors=further))
    assert [c.name for c in candidates] == [
        *("fc@0", "fc@1", "fc@2"),
        *(f"fc+{name}@{site}" for site in range(3) for name in ("linear", "probability")),
    ]
    by_name = {c.name: c for c in candidates}
    for plain in independent:
        jax.tree.map(np.testing.assert_array_equal, plain.params, by_name[plain.name].params)
        for name, selector in further:
            other = by_name[f"fc+{name}@{plain.site}"]
            mine = by_name[plain.name].params["predictor"]
            assert jax.tree.all(jax.tree.map(lambda a, b: a is b, mine, other.params["predictor"]))
            assert other.selector == selector
    # Out of fold is no different from in it, for a selector without parameters.
    rows = tiny.images()[1]
    table = gati_jax.replay(tiny.chain(), candidates, rows)
    logits = replay_logits(tiny.chain(), independent, rows)
    scores = table.scores[[table.names.index(f"fc+probability@{site}") for site in range(3)]]
    np.testing.assert_allclose(scores, max_probability(logits), rtol=1e-4, atol=1e-5)
    alone = gati_jax.replay(tiny.chain(), candidates.take(["fc+probability@1"]), rows)
    assert alone.scores.shape == (1, len(rows))


def test_heads_of_one_name_at_different_sites_keep_their_own_selectors():
    near, far = SortedSelector(hidden=8), SortedSelector(hidden=32)
    heads = [
        dataclasses.replace(tiny.head(site), name="grid", selectors=selectors)
        for site, selectors in ((1, (("sorted", near),)), (2, (("sorted", far),)), (3, ()))
    ]
    parts = {f"grid@{site}": Part(site, head.predictor(4), head.selector) for site, head in enumerate(heads, 1)}
    found = more_selectors(parts, heads)
    assert {name: part.selector for name, part in found.items() if name not in parts} == {
        "grid+sorted@1": near,
        "grid+sorted@2": far,
    }


@pytest.mark.parametrize("name", ["", "grid+linear", "grid@1", "@", "+"])
def test_names_that_candidates_names_are_made_of_are_plain(name):
    with pytest.raises(InputError, match="name: expected a name without @ and"):
        dataclasses.replace(tiny.head(1), name=name)
    with pytest.raises(InputError, match=r"selectors\.0\.0: expected a name without @ and"):
        dataclasses.replace(tiny.head(1), selectors=((name, SortedSelector()),))


def test_two_further_selectors_of_one_name_would_be_one():
    twice = (("sorted", SortedSelector(hidden=8)), ("sorted", SortedSelector(hidden=32)))
    with pytest.raises(InputError, match="selectors: expected distinct names, got sorted, sorted"):
        dataclasses.replace(tiny.head(1), selectors=twice)


def test_a_cascaded_head_reads_the_logits_of_the_one_before(cascaded):
    candidates = cascaded.take(["fc@0", "fc@1", "fc@2"])
    first, second, third = candidates
    assert (first.previous, second.previous, third.previous) == (None, "fc@0", "fc@1")
    rows = jnp.asarray(tiny.images()[1][:20])
    logits = replay_logits(tiny.chain(), candidates, np.asarray(rows), batch=8)
    sites, _ = tiny.chain().activations(rows)
    before = call(first.predictor, first.params["predictor"], sites[0])
    np.testing.assert_allclose(logits[0], before, rtol=1e-4, atol=1e-5)
    for i, cache in enumerate((second, third), start=1):
        before = call(cache.predictor, cache.params["predictor"], sites[cache.site], before)
        np.testing.assert_allclose(logits[i], before, rtol=1e-4, atol=1e-5)
    table = gati_jax.replay(tiny.chain(), candidates, np.asarray(rows))
    assert (table.classes == logits.argmax(-1)).all()


def test_on_its_own_a_cascaded_head_is_what_it_adds_to_the_one_before(cascaded):
    """Its logits are those of its own part and of the ensemble over the logits of the one before."""
    candidates = cascaded.take(["fc@0", "fc@1"])
    rows = jnp.asarray(tiny.images()[1])
    first, second = candidates
    assert on_its_own(first) is first
    alone = on_its_own(second)
    assert (alone.name, alone.site, alone.previous) == (second.name, second.site, None)
    chain = tiny.chain()
    sites, _ = chain.activations(rows)
    before = jax.nn.log_softmax(lookup(first, sites[0])[0])
    weights = second.params["predictor"]["params"]["ensemble"]["kernel"]
    expected = lookup(alone, sites[1])[0] + jnp.maximum(before, -16) @ weights
    np.testing.assert_allclose(replay_logits(chain, candidates, np.asarray(rows))[1], expected, rtol=1e-4, atol=1e-4)
    assert alone.bytes == second.bytes - weights.size * weights.dtype.itemsize
    check_cascade(Cascade(chain, (first, alone), jnp.zeros(2)))
    with pytest.raises(InputError, match=r"caches: expected none that .*fc@1"):
        check_cascade(Cascade(chain, (first, second), jnp.zeros(2)))


def test_no_gradient_flows_from_one_head_into_the_one_before(cascaded, independent):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        independent.items[0].params["predictor"],
        cascaded.items[0].params["predictor"],
    )


def test_untrained_candidates_are_those_of_a_fit_but_for_their_values(cascaded):
    for one, other in zip(untrained(tiny.chain(), [CASCADED]), cascaded, strict=True):
        assert (one.name, one.site, one.previous) == (other.name, other.site, other.previous)
        assert (one.predictor, one.selector) == (other.predictor, other.selector)
        assert jax.tree.map(np.shape, one.params) == jax.tree.map(np.shape, other.params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one.params))
    sizes = head_sizes(tiny.chain(), [dataclasses.replace(CASCADED, cascaded=False)])
    assert set(sizes) == {c.name for c in cascaded}
