"""Heads of one's own in bundles: named by their import paths, found only where the program has registered them."""

import dataclasses
import json
import sys
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gati_jax
from gati_jax import BundleError, InputError, caches
from gati_jax.caches import specs
from gati_jax.fitting import untrained
from gati_jax.pytrees import call


class Deep(nn.Module):
    """Two layers."""

    classes: int
    hidden: int = 8

    @nn.compact
    def __call__(self, activation):
        x = activation.reshape(activation.shape[0], -1)
        return nn.Dense(self.classes)(nn.relu(nn.Dense(self.hidden)(x)))


class Margin(nn.Module):
    """The gap between the two largest logits."""

    scale: float = 1.0

    @nn.compact
    def __call__(self, logits):
        first, second = jnp.moveaxis(jax.lax.top_k(logits, 2)[0], -1, 0)
        return self.scale * (first - second)


class Odd(nn.Module):
    classes: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes)(self.activation(x))


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """Register for one test only."""
    for name in ("_OWN", "_PREDICTOR_SPECS", "_SELECTOR_SPECS"):
        monkeypatch.setattr(specs, name, dict(getattr(specs, name)))


HEADS = (gati_jax.Head(name="deep", predictor=Deep, selector=Margin(0.5), sites=(1, 2)),)


def test_a_head_that_is_not_registered_is_refused_before_training(chain, splits):
    with pytest.raises(InputError, match=r"a bundle can hold .*, got Deep: register it by gati_jax\.register_head"):
        gati_jax.fit(chain, splits["fit"], select=splits["select"], heads=HEADS, progress=False)
    gati_jax.register_head(Deep)
    with pytest.raises(InputError, match=r"a bundle can hold .*, got Margin: register it"):
        gati_jax.fit(chain, splits["fit"], select=splits["select"], heads=HEADS, progress=False)


def saved(folder, chain, splits, predictor: Callable[[int], nn.Module] = Deep):
    heads = (dataclasses.replace(HEADS[0], predictor=predictor),)
    candidates = untrained(chain, heads)
    costs = gati_jax.CostTable(
        device="test", batch=1, blocks_ms=(1.0,) * 5, lookup_ms={c.name: 0.01 for c in candidates}
    )
    plan = gati_jax.plan(gati_jax.replay(chain, candidates, splits["select"]), costs, epsilon=0.9)
    assert plan.names
    certificate = gati_jax.certify(
        plan, gati_jax.replay(chain, candidates, splits["certify"]), epsilon=0.9, ledger=None
    )
    gati_jax.save_bundle(folder, chain, candidates, plan, certificate)
    return candidates


def test_a_registered_head_is_saved_and_loaded(chain, splits, tmp_path):
    assert gati_jax.register_head(Deep) is Deep
    gati_jax.register_head(Margin)
    candidates = saved(tmp_path / "bundle", chain, splits, lambda n: Deep(n, hidden=5))
    entry = json.loads((tmp_path / "bundle/manifest.json").read_text())["caches"][0]
    assert entry["predictor"] == {"kind": f"{__name__}:Deep", "hidden": 5}
    assert entry["selector"] == {"kind": f"{__name__}:Margin", "scale": 0.5}
    bundle = gati_jax.load_bundle(tmp_path / "bundle", chain=chain)
    assert bundle.caches[0].predictor == candidates[0].predictor
    assert bundle.caches[0].selector == candidates[0].selector
    found = gati_jax.infer_batch(bundle, splits["test"][:9])
    assert found.logits.shape == (9, 10)


def test_a_program_that_has_not_registered_it_is_told_so(chain, splits, tmp_path):
    for module in (Deep, Margin):
        gati_jax.register_head(module)
    saved(tmp_path / "bundle", chain, splits)
    specs._PREDICTOR_SPECS.pop(Deep)
    specs._OWN.pop(f"{__name__}:Deep")
    with pytest.raises(BundleError, match=rf"cannot be loaded: it has a head {__name__}:Deep of your own: import that"):
        gati_jax.load_bundle(tmp_path / "bundle", chain=chain)


def test_a_bundle_never_imports_what_it_names(chain, splits, tmp_path, monkeypatch):
    """Nor does it reach a module that is imported, but not registered, or a selector as a predictor."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "sprung_trap.py").write_text("raise SystemExit('imported')")
    for module in (Deep, Margin):
        gati_jax.register_head(module)
    saved(tmp_path / "bundle", chain, splits)
    text = (tmp_path / "bundle/manifest.json").read_text()
    for kind in ("sprung_trap:Deep", "os:system", "flax.linen:Dense", f"{__name__}:Margin", ":", "a:b\x1b[2J"):
        (tmp_path / "bundle/manifest.json").write_text(text.replace(f"{__name__}:Deep", json.dumps(kind)[1:-1]))
        with pytest.raises(BundleError, match="cannot be loaded: it has a head ") as caught:
            gati_jax.load_bundle(tmp_path / "bundle", chain=chain)
        assert str(caught.value).isprintable()
    assert "sprung_trap" not in sys.modules


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Odd, "expected fields that JSON can hold, got others in .*:Odd"),
        (Deep(3), "expected a class"),
        (int, "expected a class"),
    ],
)
def test_what_cannot_be_saved_is_not_registered(module, message):
    with pytest.raises(InputError, match=f"module: {message}"):
        gati_jax.register_head(module)


def test_options_of_the_wrong_type_are_refused(chain, splits, tmp_path):
    for module in (Deep, Margin):
        gati_jax.register_head(module)
    saved(tmp_path / "bundle", chain, splits)
    manifest = tmp_path / "bundle/manifest.json"
    text = manifest.read_text()
    for other in ('"hidden": "x"', '"hidden": 8, "x": 1', '"hidden": [8]'):
        manifest.write_text(text.replace('"hidden": 8', other))
        with pytest.raises(BundleError, match=r"manifest\.json is damaged: caches"):
            gati_jax.load_bundle(tmp_path / "bundle", chain=chain)


def test_the_class_token_head_reads_the_first_token_only():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 4, 5)), jnp.float32)
    head = caches.ClassToken(classes=3, hidden=4)
    variables = head.init(jax.random.key(0), x)
    other = jnp.concatenate([x[:, :1], x[::-1, 1:]], axis=1)
    expected = call(head, variables, x)
    np.testing.assert_array_equal(call(head, variables, other), expected)
    np.testing.assert_array_equal(call(head, variables, caches.summary_for(head)(x)), expected)
    folded, without = caches.fold_standardize(head, variables)
    np.testing.assert_allclose(call(folded, without, x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"token: expected a site of \[tokens, features\], got \[5\]"):
        head.init(jax.random.key(0), jnp.asarray(x[:, 0]))


def test_a_sequence_is_convolved_along_its_time():
    """As a loop over windows does, with the parameters of the same head."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 11, 3)).astype(np.float32)
    head = caches.Convolutional(classes=2, channels=(5,), kernel=3, stride=2, cells=2, hidden=4, standardize=False)
    params = jax.tree.map(np.asarray, head.init(jax.random.key(1), jnp.asarray(x))["params"])
    kernel, bias = (params["conv_0"][name] for name in ("kernel", "bias"))
    assert kernel.shape == (3, 1, 3, 5)
    windows = np.stack([x[:, i : i + 3] for i in range(0, 9, 2)], 1)  # [batch, 5, 3, 3]
    y = np.maximum(np.einsum("btkc,kcf->btf", windows, kernel[:, 0]) + bias, 0)
    pooled = np.concatenate([y[:, :3].mean(1), y[:, 2:].mean(1)], -1)  # bins 0 .. 3 and 2 .. 5 of five
    hidden = np.maximum(pooled @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
    expected = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(call(head, {"params": params}, jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"conv2d: expected a site of \[height, width, channels\] or \[time"):
        head.init(jax.random.key(0), jnp.asarray(x[:, 0]))
