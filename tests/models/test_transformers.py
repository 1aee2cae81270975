"""ViT and BERT as chains: PyTorch's logits, padding that changes nothing, and bundles that load by themselves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

import gati_jax
from gati_jax import InputError, models
from gati_jax.models import AnyNetwork, Bert, Chain, ViT, bert, vit
from gati_jax.pytrees import call

SMALL_VIT = ViT(patch=4, width=12, depth=3, heads=3, hidden=20, classes=5, input_shape=(8, 12, 3))
SMALL_BERT = Bert(vocabulary=60, length=9, positions=16, width=12, depth=3, heads=2, hidden=20, classes=3)
run = jax.jit(Chain.__call__)


def random_chain(network: AnyNetwork, seed: int = 0) -> Chain:
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: models.fold(models.init(network, jax.random.key(0))))
    params = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape, scale=0.4), jnp.float32), shapes)
    return models.to_chain(network, params)


def texts(n: int, length: int = SMALL_BERT.length, seed: int = 1) -> np.ndarray:
    """Ids of texts of one token or more, padded with 0."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, SMALL_BERT.vocabulary, (n, length)).astype(np.int32)
    ids[np.arange(length) >= rng.integers(1, length + 1, (n, 1))] = 0
    return ids


# --- PyTorch ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm(torchvision):
    del torchvision  # which it imports
    return pytest.importorskip("timm")


def stirred(torch, model):
    """Move every tensor away from its initial value: norms start as the identity, and biases as nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return model.eval()


def images(side: int) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(2, side, side, 3)).astype(np.float32)


def logits(torch, model, x, **more):
    with torch.no_grad():
        found = model(torch.from_numpy(np.moveaxis(x, -1, 1) if x.ndim == 4 else x.astype(np.int64)), **more)
    return np.asarray(getattr(found, "logits", found))


def assert_close(chain: Chain, x: np.ndarray, expected: np.ndarray) -> None:
    assert np.ptp(expected, axis=0).max() > 1e-2 * np.abs(expected).max()  # they depend on the input
    np.testing.assert_allclose(run(chain, x), expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))


def state_of(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def test_vit_tiny_of_timm_at_32_pixels(torch, timm, tmp_path):
    """By one call: the patch, the classes and the side are those of the tensors."""
    model = stirred(torch, timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, num_classes=7))
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "vit.pth")
    chain = gati_jax.load_network("vit_tiny", weights=tmp_path / "vit.pth")
    assert chain.network == vit("vit_tiny", classes=7)
    assert_close(chain, images(32), logits(torch, model, images(32)))


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_vit_of_timm_at_224_pixels(torch, timm, size):
    model = stirred(torch, timm.create_model(f"vit_{size}_patch16_224", depth=2, num_classes=7))
    whole = vit(f"vit_{size}", classes=7, input_shape=(224, 224, 3))
    assert (whole.depth, whole.patch) == (12, 16)
    network = ViT(**{**vars(whole), "depth": 2})
    chain = models.to_chain(network, models.fold(models.import_state_dict(network, state_of(model))))
    assert_close(chain, images(224), logits(torch, model, images(224)))


def test_vit_of_torchvision(torch, torchvision):
    model = torchvision.models.VisionTransformer(16, 4, 2, 3, 12, 20, num_classes=5)
    torch.nn.init.normal_(model.heads.head.weight)
    network = ViT(patch=4, width=12, depth=2, heads=3, hidden=20, classes=5, input_shape=(16, 16, 3))
    tensors = state_of(stirred(torch, model))
    chain = models.to_chain(network, models.fold(models.import_state_dict(network, tensors)))
    assert_close(chain, images(16), logits(torch, model, images(16)))


def test_networks_of_hugging_face_from_their_folders(torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    encoder: dict[str, Any] = {
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "num_labels": 5,
    }
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=4, **encoder))
    stirred(torch, model).save_pretrained(tmp_path / "vit")
    chain = gati_jax.from_pretrained(tmp_path / "vit")
    assert_close(chain, images(16), logits(torch, model, images(16)))
    assert isinstance(chain.network, ViT)
    as_in_memory = models.import_state_dict(chain.network, state_of(model))  # transformers has other names there
    assert jax.tree.all(jax.tree.map(np.array_equal, models.fold(as_in_memory), tuple(chain.params)))

    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=16, **encoder)
    model = stirred(torch, transformers.BertForSequenceClassification(config))
    model.save_pretrained(tmp_path / "bert")
    ids = texts(6)
    expected = logits(torch, model, ids, attention_mask=torch.from_numpy((ids != 0).astype(np.int64)))
    assert_close(gati_jax.from_pretrained(tmp_path / "bert", input_shape=(9,)), ids, expected)

    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[16, 24], depths=[2, 1], num_labels=5)
    model = stirred(torch, transformers.ResNetForImageClassification(config))
    model.save_pretrained(tmp_path / "resnet")
    chain = gati_jax.from_pretrained(tmp_path / "resnet", input_shape=(32, 32, 3))
    assert_close(chain, images(32), logits(torch, model, images(32)))


# --- By themselves ----------------------------------------------------------------------------------------------------


def test_padding_changes_nothing_and_is_zero_at_every_site():
    """A text in a chain of its own length has the logits, and at every site the tokens, that it has padded."""
    chain, ids = random_chain(SMALL_BERT), texts(5)
    for row, whole in zip(ids, run(chain, ids), strict=True):
        n = int((row != 0).sum())
        network = Bert(**{**vars(SMALL_BERT), "length": n})
        alone = models.to_chain(network, tuple(chain.params))
        np.testing.assert_allclose(alone(jnp.asarray(row[None, :n]))[0], whole, rtol=0, atol=1e-5)
        for padded, site in zip(
            chain.activations(jnp.asarray(row[None]))[0][1:],
            alone.activations(jnp.asarray(row[None, :n]))[0][1:],
            strict=True,
        ):
            np.testing.assert_allclose(padded[0, :n], site[0], rtol=0, atol=1e-5)
            np.testing.assert_array_equal(padded[0, n:], 0)
            np.testing.assert_array_equal(padded[0, :n, -1], 1)
    assert np.isfinite(run(chain, np.zeros((1, 9), np.int32))).all()


@pytest.mark.parametrize(("token", "ok"), [(-1, False), (0, True), (59, True), (60, False)])
def test_ids_that_the_vocabulary_has_not_are_refused(token, ok):
    """XLA answers for them, with the row of another token."""
    ids = texts(3)
    ids[1, 2] = token
    if ok:
        assert models.check_images(random_chain(SMALL_BERT), ids) is ids
    else:
        with pytest.raises(InputError, match="images: expected token ids from 0 to 59, got "):
            models.check_images(random_chain(SMALL_BERT), ids)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vit("vit_tiny", input_shape=(30, 32, 3)), r"input_shape: expected .* whole patches of 4, got"),
        (lambda: vit("vit_huge"), "name: expected one of vit_tiny, vit_small, vit_base, got 'vit_huge'"),
        (lambda: bert("bert_tiny", length=513), "length: expected at most the 512 positions, got 513"),
        (lambda: models.architecture("vit_tiny", shortcut="A"), "shortcut: expected none, for vit_tiny has no"),
        (lambda: models.architecture("resnet20", patch=8), "patch: expected none, for resnet20 is no ViT, got 8"),
        (lambda: models.architecture("vgg16", depth=6), "depth: expected none, for vgg16 is no ViT, got 6"),
    ],
)
def test_configurations_that_cannot_be_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()


@pytest.mark.parametrize("network", [SMALL_VIT, SMALL_BERT], ids=["vit", "bert"])
def test_a_manifest_holds_the_configuration(network):
    adapter: TypeAdapter[Any] = TypeAdapter(AnyNetwork)
    text = adapter.dump_json(network)
    assert adapter.validate_json(text) == network
    for field in ("depth", "heads", "width", "hidden"):
        for bad in (0, 10**9):
            with pytest.raises(ValidationError):
                adapter.validate_python({**adapter.dump_python(network), field: bad})


@pytest.mark.parametrize("network", [SMALL_VIT, SMALL_BERT], ids=["vit", "bert"])
def test_state_dict_round_trip(network):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: models.init(network, jax.random.key(0)))
    variables = jax.tree.map(lambda v: rng.normal(size=v.shape).astype(np.float32), shapes)
    again = models.import_state_dict(network, models.export_state_dict(network, variables))
    assert jax.tree.all(jax.tree.map(np.array_equal, again, variables))


@pytest.mark.parametrize("network", [SMALL_VIT, SMALL_BERT], ids=["vit", "bert"])
def test_from_fit_to_a_bundle_that_loads_by_itself(network, tmp_path):
    chain, rng = random_chain(network), np.random.default_rng(4)
    rows = texts(240) if isinstance(network, Bert) else rng.normal(size=(240, *network.input_shape)).astype(np.float32)
    rows = np.unique(rows, axis=0)
    mean = np.asarray(run(chain, rows)).mean(0)
    *blocks, last = chain.params
    last = {**last, "head": {**last["head"], "bias": last["head"]["bias"] - mean}}  # so that each class is an answer
    chain = models.to_chain(network, (*blocks, last))
    parts = {"fit": rows[:100], "select": rows[100:160], "certify": rows[160:]}
    config = gati_jax.FitConfig(epochs=1, batch=32, folds=2)
    candidates = gati_jax.fit(chain, parts["fit"], select=parts["select"], config=config, progress=False)
    assert [c.name for c in candidates] == ["grid@1", "grid@2", "token@1", "token@2"]
    costs = gati_jax.CostTable(
        device="test", batch=1, blocks_ms=(1.0,) * 3, lookup_ms={c.name: 0.01 for c in candidates}
    )
    plan = gati_jax.plan(gati_jax.replay(chain, candidates, parts["select"]), costs, epsilon=0.5)
    assert plan.names
    certificate = gati_jax.certify(plan, gati_jax.replay(chain, candidates, parts["certify"]), epsilon=0.5, ledger=None)
    gati_jax.save_bundle(tmp_path / "bundle", chain, candidates, plan, certificate)
    bundle = gati_jax.load_bundle(tmp_path / "bundle")
    assert bundle.chain.network == network
    found, own = gati_jax.infer_batch(bundle, rows[:20]), np.asarray(run(chain, rows[:20])).argmax(-1)
    at_the_end = np.asarray(found.exit) == 3
    np.testing.assert_array_equal(np.asarray(found.class_index)[at_the_end], own[at_the_end])
    alone = gati_jax.infer(bundle, rows[3])
    assert (int(alone.class_index), int(alone.exit)) == (int(found.class_index[3]), int(found.exit[3]))


def test_a_cache_at_token_ids_is_refused_before_training():
    head = gati_jax.Head(
        name="grid", predictor=gati_jax.caches.Grid, selector=gati_jax.caches.SortedSelector(), sites=(0,)
    )
    with pytest.raises(InputError, match="heads: expected sites of floating-point numbers for grid, got int32 at 0"):
        gati_jax.fit(random_chain(SMALL_BERT), texts(40), select=texts(20, seed=9), heads=(head,), progress=False)


def test_bfloat16_computes_in_bfloat16():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12, 3)), jnp.bfloat16)
    variables = models.init(SMALL_VIT, jax.random.key(0))
    block, *_ = SMALL_VIT.modules()
    assert call(block, variables[0], x).dtype == jnp.bfloat16
    assert models.apply_train(SMALL_VIT, variables, x)[0].dtype == jnp.float32
