"""Chains from modules of Linen, NNX and Equinox: the module's own logits and activations, and cuts that are sound."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gati_jax
from gati_jax import Chain, InputError, from_equinox, from_linen, from_nnx
from gati_jax.caches import Grid, SortedSelector
from gati_jax.fitting import untrained
from gati_jax.models.chain import reference
from tests.models.users_modules import EQUINOX, LINEN, NNX, PICTURES, RANDOM, STATE, VARIABLES, Block, Linen, X, varied

HEAD = gati_jax.Head(name="grid", predictor=lambda n: Grid(n, cells=1, hidden=8), selector=SortedSelector())


@dataclasses.dataclass(frozen=True)
class Case:
    """A module, its chain, and its own logits and activations by the framework's own means."""

    chain: Callable[..., Chain]
    logits: Callable[[Any], Any]
    activations: Callable[[Any], list[Any]]
    x: np.ndarray
    sites: list[Any]
    inner: str
    """A submodule that a shortcut goes around."""


def linen_activations(x):
    _, found = LINEN.apply(VARIABLES, x, capture_intermediates=True, mutable=["intermediates"])
    return [found["intermediates"][name]["__call__"][0] for name in ("stem", "blocks_0", "blocks_1")]


def nnx_evaluated():
    module = nnx.merge(*nnx.split(NNX))
    module.eval()
    return module


def nnx_activations(x):
    module, found = nnx_evaluated(), []
    y = module.stem(x)
    found.append(y)
    y = jnp.tanh(y)
    for block in module.blocks:
        found.append(block(y))
        y = 0.5 * found[-1]
    return found


def equinox_logits(x):
    module = eqx.nn.inference_mode(EQUINOX)
    return jax.vmap(lambda one: module(one, STATE)[0])(jnp.moveaxis(x, -1, 1))


def equinox_activations(x):
    module = eqx.nn.inference_mode(EQUINOX)

    def one(x):
        found, state = [module.stem(x)], STATE
        y = jnp.tanh(found[0])
        for block in module.blocks:
            y, state = block(y, state)
            found.append(y)
        return found

    return [jnp.moveaxis(y, 1, -1) for y in jax.vmap(one)(jnp.moveaxis(x, -1, 1))]


CASES = {
    "linen": Case(
        lambda **options: from_linen(LINEN, VARIABLES, **options),
        lambda x: LINEN.apply(VARIABLES, x),
        linen_activations,
        X,
        ["stem", "blocks_0", "blocks_1"],
        "blocks_0/norm",
    ),
    "nnx": Case(
        lambda **options: from_nnx(NNX, **options),
        lambda x: nnx_evaluated()(x),  # noqa: PLW0108 (a fresh one each time)
        nnx_activations,
        X,
        ["stem", "blocks[0]", NNX.blocks[1]],
        "blocks.0.norm",
    ),
    "equinox": Case(
        lambda **options: from_equinox(EQUINOX, STATE, channel_axis=0, **options),
        equinox_logits,
        equinox_activations,
        PICTURES,
        ["stem", "blocks.0", EQUINOX.blocks[1]],
        "blocks.0.norm",
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def made(case) -> Chain:
    return case.chain(sites=case.sites, sample=case.x)


def test_logits_and_sites_are_the_modules_own_for_other_inputs_and_batches(case, made):
    assert len(made) == 4
    for n in (1, 3):
        x = jnp.asarray(RANDOM.normal(size=(n, *case.x.shape[1:])).astype(np.float32))
        sites, logits = made.activations(x)
        np.testing.assert_allclose(logits, case.logits(x), rtol=1e-5, atol=1e-5)
        for site, expected in zip(sites, [x, *case.activations(x)], strict=True):
            np.testing.assert_allclose(site, expected, rtol=1e-5, atol=1e-5)
    assert [spec.shape for spec in made.site_specs] == [site.shape[1:] for site in sites]


def test_a_block_has_the_parameters_that_it_reads_and_no_others(made):
    names = [name for params in made.params for name in params]
    assert len(names) == len(set(names))
    for k, block in enumerate(made.params[1:3]):
        assert sum("norm" in name or "/" in name for name in block) == len(block) == 6, block
        assert all("stem" not in name and "head" not in name for name in block), k
    assert not made.params[-1]
    assert {leaf.dtype for leaf in jax.tree.leaves(made.params)} == {jnp.dtype("float32")}  # no keys, no counters


def test_equal_modules_make_equal_blocks_and_new_parameters_compile_nothing(case, made):
    again = case.chain(sites=case.sites, sample=case.x)
    assert again.blocks == made.blocks
    assert hash(again.blocks) == hash(made.blocks)
    traces = []
    run = jax.jit(lambda chain, x: traces.append(0) or chain(x))
    run(made, case.x)
    other = dataclasses.replace(again, params=varied(again.params))
    assert not np.allclose(run(other, case.x), run(made, case.x))
    assert len(traces) == 1
    fewer = case.chain(sites=case.sites[:2], sample=case.x)
    assert fewer.blocks[0] != made.blocks[0]


def test_products_are_exact_where_the_reference_asks_for_it(case, made):
    plain = str(jax.make_jaxpr(Chain.__call__)(made, jnp.asarray(case.x)))
    exact = str(jax.make_jaxpr(reference(Chain.__call__))(made, jnp.asarray(case.x)))
    assert "HIGHEST" in exact
    assert "HIGHEST" not in plain


def test_a_cut_that_a_shortcut_goes_around_is_refused_and_named(case):
    with pytest.raises(InputError, match=f"behind {case.inner} to be computed from its output alone, got float32") as e:
        case.chain(sites=[case.sites[0], case.inner], sample=case.x)
    assert "\n" not in str(e.value)


@pytest.mark.slow  # the docs' pages save and load one each
def test_a_bundle_holds_it_and_gives_it_back(case, made, tmp_path):
    images = RANDOM.normal(size=(120, *case.x.shape[1:])).astype(np.float32)
    caches = untrained(made, (HEAD,))
    costs = gati_jax.CostTable(device="test", batch=1, blocks_ms=(1.0,) * 4, lookup_ms={c.name: 0.1 for c in caches})
    plan = gati_jax.plan(gati_jax.replay(made, caches, images[:60]), costs, epsilon=0.3)
    certificate = gati_jax.certify(plan, gati_jax.replay(made, caches, images[60:]), epsilon=0.3, ledger=None)
    gati_jax.save_bundle(tmp_path / "bundle", made, caches, plan, certificate)
    structure = dataclasses.replace(made, params=varied(made.params))
    bundle = gati_jax.load_bundle(tmp_path / "bundle", chain=structure)
    jax.tree.map(np.testing.assert_array_equal, bundle.chain.params, made.params)
    np.testing.assert_allclose(
        bundle.chain(jnp.asarray(case.x)), case.logits(jnp.asarray(case.x)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "params",
    [nnx.state(nnx.Linear(6, 3, rngs=nnx.Rngs(0))), eqx.nn.Linear(6, 3, key=jax.random.key(0))],
    ids=["nnx.State", "equinox.Module"],
)
def test_parameter_trees_of_other_libraries_are_saved_as_they_are(params, tmp_path):
    def classifier(params, x):
        held: Any = params
        if isinstance(params, nnx.State):
            return x @ held["kernel"][...] + held["bias"][...].reshape(1, -1)
        return jax.vmap(held)(x)

    chain = Chain.from_layers([jnp.tanh, (classifier, params)], (6,))
    images = RANDOM.normal(size=(40, 6)).astype(np.float32)
    costs = gati_jax.CostTable(device="test", batch=1, blocks_ms=(1.0,), lookup_ms={})
    plan = gati_jax.plan(gati_jax.replay(chain, (), images[:20]), costs, epsilon=0.3)
    certificate = gati_jax.certify(plan, gati_jax.replay(chain, (), images[20:]), epsilon=0.3, ledger=None)
    gati_jax.save_bundle(tmp_path / "bundle", chain, (), plan, certificate)
    bundle = gati_jax.load_bundle(tmp_path / "bundle", chain=dataclasses.replace(chain, params=varied(chain.params)))
    assert jax.tree.structure(bundle.chain.params) == jax.tree.structure(chain.params)
    np.testing.assert_array_equal(bundle.chain(jnp.asarray(X)), chain(jnp.asarray(X)))


def test_submodules_inside_of_remat_are_found():
    module = Linen(kind=nn.remat(Block, static_argnums=(2,)))
    chain = from_linen(module, VARIABLES, sites=["stem", "blocks_0", "blocks_1"], sample=X)
    expected: Any = linen_activations(X)[2]
    np.testing.assert_allclose(chain.activations(jnp.asarray(X))[0][3], expected, rtol=1e-5, atol=1e-5)


class Mapped(eqx.Module):
    """Maps a layer over positions, behind an operation that puts the batch last."""

    mix: eqx.nn.Linear
    each: eqx.nn.Linear
    head: eqx.nn.Linear

    def __call__(self, x):
        y = self.mix(x)
        tokens = jax.vmap(self.each)(jnp.stack([y, 2 * y]))
        return self.head(tokens.mean(0))


def test_batches_come_first_whatever_vmap_does_inside():
    keys = jax.random.split(jax.random.key(0), 3)
    module = Mapped(*(eqx.nn.Linear(n, m, key=key) for n, m, key in zip((6, 5, 5), (5, 5, 3), keys, strict=True)))
    chain = from_equinox(module, sites=["mix", "each"], sample=X)
    sites, logits = chain.activations(jnp.asarray(X))
    mixed = jax.vmap(module.mix)(jnp.asarray(X))
    np.testing.assert_allclose(sites[1], mixed, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sites[2], jax.vmap(jax.vmap(module.each))(jnp.stack([mixed, 2 * mixed], 1)), rtol=1e-5)
    np.testing.assert_allclose(logits, jax.vmap(module)(jnp.asarray(X)), rtol=1e-5, atol=1e-6)


def test_a_program_is_traced_once_for_all_of_its_blocks():
    traced = []

    class Noting(nn.Module):
        @nn.compact
        def __call__(self, x):
            traced.append(len(x))
            return nn.Dense(3)(nn.Dense(4, name="b")(nn.Dense(4, name="a")(x)))

    chain = from_linen(Noting(), Noting().init(jax.random.key(0), X), sites=["a", "b"], sample=X)
    traced.clear()
    jax.block_until_ready(jax.jit(Chain.__call__)(chain, X[[0] * 7]))
    assert traced == [7]


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(20, 4, name="embed")(tokens)
        x = x + self.param("position", nn.initializers.ones, x.shape[1:])[None]
        x = nn.Dense(4, name="mix")(x)
        return nn.Dense(3)(x[:, 0])


def test_tokens_and_constants_on_the_way():
    tokens = np.array([[1, 2, 3], [4, 5, 6]])
    module = Tokens()
    variables = module.init(jax.random.key(0), tokens)
    chain = from_linen(module, variables, sites=["embed", "mix"], sample=tokens)
    assert chain.input_spec == jax.ShapeDtypeStruct((3,), jnp.int32)
    assert list(chain.params[1]) == ["params/mix/bias", "params/mix/kernel", "params/position"]
    assert list(chain.params[2]) == ["params/Dense_0/bias", "params/Dense_0/kernel"]
    expected: Any = module.apply(variables, tokens)
    np.testing.assert_allclose(chain(jnp.int32(tokens)), expected, rtol=1e-5)


def test_pixels_are_normalised_before_channels_are_moved():
    pixels = RANDOM.integers(0, 256, PICTURES.shape, dtype=np.uint8)
    normalization = gati_jax.Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    chain = CASES["equinox"].chain(sites=["stem"], sample=pixels, normalization=normalization)
    x = chain.prepare(pixels)
    np.testing.assert_allclose(chain(x), equinox_logits(normalization(pixels)), rtol=1e-5, atol=1e-6)


def test_layers_make_a_chain():
    def dense(params, x):
        return x @ params["w"]

    w, v = {"w": jnp.ones((6, 4))}, {"w": jnp.full((4, 3), 2.0)}
    chain = Chain.from_layers([(dense, w), jnp.tanh, (dense, v)], (6,))
    np.testing.assert_array_equal(chain(jnp.asarray(X)), jnp.tanh(X @ w["w"]) @ v["w"])
    assert len(chain) == 2
    assert Chain.from_layers([(dense, w), jnp.tanh, (dense, v)], (6,)).blocks == chain.blocks
