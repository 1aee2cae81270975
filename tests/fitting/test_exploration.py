"""Cascaded heads, further selectors, candidates before they learn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import InputError
from gati_jax.caches import LinearSelector, ProbabilitySelector, SortedSelector, lookup, on_its_own
from gati_jax.fitting import head_sizes, replay_logits, untrained
from gati_jax.fitting.heads import Part, more_selectors
from gati_jax.pytrees import call
from gati_jax.runtime import Cascade, check_cascade
from tests.fitting import tiny
from train.reproduce import max_probability

SHORT = dataclasses.replace(tiny.CONFIG, epochs=2)


def fit(*heads, config=SHORT):
    rows, select = tiny.images()
    return gati_jax.fit(tiny.chain(), rows, select=select, heads=heads, config=config, progress=False)


def test_a_further_selector_shares_its_predictor():
    head = dataclasses.replace(tiny.head(1, 2), selectors=(("linear", LinearSelector()),))
    candidates = fit(head)
    assert [c.name for c in candidates] == ["fc@1", "fc@2", "fc+linear@1", "fc+linear@2"]
    by_name = {c.name: c for c in candidates}
    for site in (1, 2):
        one, other = by_name[f"fc@{site}"], by_name[f"fc+linear@{site}"]
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, one.params["predictor"], other.params["predictor"]))
        assert isinstance(other.selector, LinearSelector)
    plain = fit(tiny.head(1, 2))  # and does not disturb it
    for c in plain:
        jax.tree.map(np.testing.assert_array_equal, c.params, by_name[c.name].params)


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
    with pytest.raises(InputError, match="selectors: expected a name without @ and"):
        dataclasses.replace(tiny.head(1), selectors=((name, SortedSelector()),))


def test_two_further_selectors_of_one_name_would_be_one():
    twice = (("sorted", SortedSelector(hidden=8)), ("sorted", SortedSelector(hidden=32)))
    with pytest.raises(InputError, match="selectors: expected distinct names, got sorted, sorted"):
        dataclasses.replace(tiny.head(1), selectors=twice)


def test_a_selector_may_have_nothing_to_learn():
    head = dataclasses.replace(tiny.head(1), selectors=(("probability", ProbabilitySelector()),))
    candidates = fit(head)
    rows = tiny.images()[1]  # the select split: out of fold is no other than in it, where nothing is learned
    table = gati_jax.replay(tiny.chain(), candidates, rows)
    (logits,) = replay_logits(tiny.chain(), candidates.take(["fc@1"]), rows)
    scores = table.scores[table.names.index("fc+probability@1")]
    np.testing.assert_allclose(scores, max_probability(logits[None])[0], rtol=1e-4, atol=1e-5)
    alone = gati_jax.replay(tiny.chain(), candidates.take(["fc+probability@1"]), rows)
    assert alone.scores.shape == (1, len(rows))


def test_a_cascaded_head_sees_what_the_one_before_says():
    candidates = fit(dataclasses.replace(tiny.head(0, 1, 2), cascaded=True))
    first, second, third = candidates
    assert (first.previous, second.previous, third.previous) == (None, "fc@0", "fc@1")
    rows = jnp.asarray(tiny.images()[1][:20])
    logits = replay_logits(tiny.chain(), candidates, np.asarray(rows), batch=8)
    sites, _ = tiny.chain().activations(rows)
    said = call(first.predictor, first.params["predictor"], sites[0])
    np.testing.assert_allclose(logits[0], said, rtol=1e-4, atol=1e-5)
    for i, cache in enumerate((second, third), start=1):
        said = call(cache.predictor, cache.params["predictor"], sites[cache.site], said)
        np.testing.assert_allclose(logits[i], said, rtol=1e-4, atol=1e-5)
    table = gati_jax.replay(tiny.chain(), candidates, np.asarray(rows))
    assert (table.classes == logits.argmax(-1)).all()


def test_on_its_own_a_cascaded_head_is_what_it_adds_to_the_one_before():
    """Its logits are those of its own part and of the ensemble over what the one before says."""
    fitted = fit(dataclasses.replace(tiny.head(1, 2), cascaded=True))
    rows = jnp.asarray(tiny.images()[1])
    first, second = fitted
    assert on_its_own(first) is first
    alone = on_its_own(second)
    assert (alone.name, alone.site, alone.previous) == (second.name, second.site, None)
    chain = tiny.chain()
    sites, _ = chain.activations(rows)
    before = jax.nn.log_softmax(lookup(first, sites[1])[0])
    weights = second.params["predictor"]["params"]["ensemble"]["kernel"]
    expected = lookup(alone, sites[2])[0] + jnp.maximum(before, -16) @ weights
    np.testing.assert_allclose(replay_logits(chain, fitted, np.asarray(rows))[1], expected, rtol=1e-4, atol=1e-4)
    assert alone.bytes == second.bytes - weights.size * weights.dtype.itemsize
    check_cascade(Cascade(chain, (first, alone), jnp.zeros(2)))  # which a cascaded one may not be part of


def test_no_cascade_runs_one():
    first, second = fit(dataclasses.replace(tiny.head(0, 1), cascaded=True))
    cascade = Cascade(tiny.chain(), (first, second), jnp.zeros(2))
    with pytest.raises(InputError, match=r"caches: expected none that sees.*fc@1"):
        check_cascade(cascade)


def test_no_gradient_flows_from_one_head_into_the_one_before():
    alone, cascaded = fit(tiny.head(0)), fit(dataclasses.replace(tiny.head(0, 1), cascaded=True))
    # Other heads draw other first values; so compare after fits that begin alike: one step of no length.
    still = dataclasses.replace(SHORT, learning_rate=1e-12)
    begins = [fit(dataclasses.replace(tiny.head(0, 1), cascaded=c), config=still) for c in (True, False)]
    jax.tree.map(np.testing.assert_array_equal, *(b.items[0].params["predictor"] for b in begins))
    independent = fit(tiny.head(0, 1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        independent.items[0].params["predictor"],
        cascaded.items[0].params["predictor"],
    )
    assert alone.items[0].previous is None


def test_untrained_candidates_are_those_of_a_fit_but_for_their_values():
    head = dataclasses.replace(tiny.head(0, 1, 2), selectors=(("linear", LinearSelector()),), cascaded=True)
    fresh, fitted = untrained(tiny.chain(), [head]), fit(head)
    for one, other in zip(fresh, fitted, strict=True):
        assert (one.name, one.site, one.previous) == (other.name, other.site, other.previous)
        assert (one.predictor, one.selector) == (other.predictor, other.selector)
        assert jax.tree.map(np.shape, one.params) == jax.tree.map(np.shape, other.params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one.params))
    sizes = head_sizes(tiny.chain(), [dataclasses.replace(head, cascaded=False)])
    assert set(sizes) == {c.name for c in fitted}
