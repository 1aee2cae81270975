"""One call from a file to a chain: wrappers, nesting, precisions, shards, folders; what does not belong is named."""

import json
import re
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import gati_jax
from gati_jax import InputError, Normalization, WeightsError, models
from gati_jax.models import ResNet, fold, init, resnet, to_chain

R20 = resnet("resnet20", classes=7, input_shape=(28, 28, 1))
PIXELS = Normalization(mean=(0.3,), std=(0.4,))


def random_variables(network):
    """Variables of the shapes that ``init`` gives, in numbers that half precision has, too."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: init(network, jax.random.key(0)))
    return jax.tree.map(lambda leaf: rng.integers(1, 9, leaf.shape).astype(np.float32) / 8, abstract)


VARIABLES = random_variables(R20)
TENSORS = models.export_state_dict(R20, VARIABLES)


@pytest.fixture(scope="module")
def expected():
    return to_chain(R20, fold(VARIABLES))


def same(one: gati_jax.Chain, other: gati_jax.Chain) -> bool:
    return one.network == other.network and jax.tree.all(jax.tree.map(np.array_equal, one.params, other.params))


def write(tmp_path, tensors, **more):
    path = tmp_path / "net.safetensors"
    save_file(tensors, path, **more)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "model._orig_mod.module."])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=["float32", "float16", "bfloat16"])
def test_wrappers_and_precisions(tmp_path, expected, prefix, dtype):
    """Classes, channels and the shortcut are those of the tensors."""
    path = write(tmp_path, {f"{prefix}{name}": tensor.astype(dtype) for name, tensor in TENSORS.items()})
    chain = gati_jax.load_network("resnet20", weights=path, input_shape=(28, 28, 1), normalization=PIXELS)
    assert same(chain, expected)
    assert (chain.classes, chain.normalization) == (7, PIXELS)


NESTINGS = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "ema": lambda state: {"ema": {"module": state, "decay": 0.999}},
    "twice": lambda state: {"model": {"state_dict": state}},
}


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".bin"])
def test_nested_checkpoints(tmp_path, expected, nesting, suffix):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(tensor) for name, tensor in TENSORS.items()}
    torch.save(NESTINGS[nesting](state), tmp_path / f"net{suffix}")
    assert same(gati_jax.load_network("resnet20", weights=tmp_path / f"net{suffix}", input_shape=(28, 28, 1)), expected)


def test_weights_and_their_average_are_told_apart_aloud(tmp_path, expected):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(tensor) for name, tensor in TENSORS.items()}
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"ema": other, "model": state}, tmp_path / "net.pth")
    with pytest.warns(UserWarning, match="weights: the checkpoint holds model, ema, of which model is read"):
        assert same(gati_jax.load_network("resnet20", weights=tmp_path / "net.pth", input_shape=(28, 28, 1)), expected)


def sharded(folder):
    names = sorted(TENSORS)
    where = {name: f"model-{1 + i % 3:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: TENSORS[name] for name in names if where[name] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index, where


def test_shards(tmp_path, expected):
    index, _ = sharded(tmp_path)
    for weights in (index, tmp_path):
        assert same(gati_jax.load_network("resnet20", weights=weights, input_shape=(28, 28, 1)), expected)


def test_an_index_leads_out_of_no_folder(tmp_path):
    """By a path, or by a link; a link into the cache's own blobs is how the hub's client stores a file."""
    folder = tmp_path / "cache" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    index, where = sharded(folder)
    first = next(iter(where))
    outside = tmp_path / "outside.safetensors"
    save_file({first: TENSORS[first]}, outside)
    for name in (str(outside), "../../../outside.safetensors", "..\\outside.safetensors", "a/../x.safetensors", ".", 3):
        index.write_text(json.dumps({"weight_map": where | {first: name}}))
        with pytest.raises(WeightsError, match=r"is no index of \.safetensors files beside it: weight_map"):
            models.read_weights(index)
    index.write_text(json.dumps({"weight_map": where}))
    file = folder / where[first]
    for target, ok in ((tmp_path / "cache" / "blobs" / "0f", True), (tmp_path / "moved", False)):
        target.parent.mkdir(exist_ok=True)
        file.resolve().rename(target)
        file.unlink(missing_ok=True)
        file.symlink_to(target)
        if ok:
            assert models.read_weights(index).keys() == TENSORS.keys()
        else:
            with pytest.raises(WeightsError, match=f"expected {where[first]} in .*, got a link out of it"):
                models.read_weights(index)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000, "\ud800"], ids=range(6))
def test_a_damaged_index_is_refused_in_a_line(tmp_path, content):
    index, _ = sharded(tmp_path)
    index.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(WeightsError, match="is no index of") as caught:
        models.read_weights(index)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_an_index_that_does_not_say_what_its_files_hold_is_refused(tmp_path):
    index, where = sharded(tmp_path)
    first = next(iter(where))
    fewer = {name: file for name, file in where.items() if name != first}
    for said, found in ((where | {"x": where[first]}, "missing: x"), (fewer, f"unexpected: {first}")):
        index.write_text(json.dumps({"weight_map": said}))
        with pytest.raises(WeightsError, match=f"holds other tensors than .* says.*{re.escape(found)}"):
            models.read_weights(index)
    index.write_text(json.dumps({"weight_map": where | {"x": "model-9.safetensors"}}))
    with pytest.raises(WeightsError, match=r"no such file: .*model-9\.safetensors"):
        models.read_weights(index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 10}, "classes: expected 10, got weights with a classifier for 7"),
        ({"name": "resnet21"}, "name: expected one of resnet20, .*bert_base, got 'resnet21'"),
        ({"name": "resnet32"}, r"missing: layer1\.3\."),
        ({"name": "vit_tiny"}, r"missing: blocks\.0\.attn"),
        ({"name": "vgg11", "classes": 7}, r"missing: classifier\.bias"),
        ({"name": "bert_tiny"}, r"missing: bert\.embeddings\.LayerNorm\.bias"),
        ({"input_shape": (28, 28)}, r"input_shape: expected height, width and channels, got \(28, 28\)"),
        ({"input_shape": (28, 28, 3)}, r"conv1\.weight \(expected \[16, 3, 3, 3\], got \[16, 1, 3, 3\]\)"),
    ],
)
def test_what_does_not_belong_is_named(tmp_path, arguments, message):
    path = write(tmp_path, TENSORS)
    with pytest.raises(InputError, match=message):
        gati_jax.load_network(**{"name": "resnet20", "weights": path, **arguments})


def test_own_files_say_everything_themselves(tmp_path, expected):
    said = {
        "gati_jax": "1",
        "network": "resnet20",
        "classes": "7",
        "input_shape": "[28, 28, 1]",
        "seed": "0",
        "normalization": '{"mean": [0.3], "std": [0.4], "scale": 1}',
    }
    path = write(tmp_path, TENSORS, metadata=said)
    chain = gati_jax.load_network("resnet20", weights=path)
    assert same(chain, expected)
    assert chain.normalization == Normalization(mean=(0.3,), std=(0.4,), scale=1.0)
    with pytest.raises(WeightsError, match=r"name: expected resnet20, as the metadata of .* say, got resnet32"):
        gati_jax.load_network("resnet32", weights=path)
    path = write(tmp_path, TENSORS, metadata=said | {"classes": "many"})
    with pytest.raises(WeightsError, match=r"the metadata of .*net\.safetensors are damaged: classes"):
        gati_jax.load_network("resnet20", weights=path)


SHAPES = {
    "stem": ResNet(stages=(1, 1), widths=(4, 6), stem=7, bottleneck=True, classes=3, input_shape=(32, 32, 3)),
    "padded": ResNet(stages=(1, 1), widths=(4, 6), shortcut="A", classes=3, input_shape=(8, 8, 3)),
    "vgg": models.VGG(convolutions=(1, 1), channels=(4, 6), classes=3, input_shape=(8, 8, 3)),
    "vit": models.ViT(patch=4, width=8, depth=2, heads=2, hidden=12, classes=3, input_shape=(8, 8, 3)),
    "bert": models.Bert(vocabulary=9, length=5, width=8, depth=2, heads=2, hidden=12, positions=6, classes=3),
}


@pytest.mark.parametrize("network", SHAPES.values(), ids=SHAPES)
def test_what_is_saved_is_loaded_to_the_bit(tmp_path, network):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: fold(init(network, jax.random.key(0))))
    params = jax.tree.map(lambda v: rng.normal(size=v.shape).astype(np.float32), shapes)
    normalization = None if isinstance(network, models.Bert) else PIXELS
    chain = to_chain(network, params, normalization)
    gati_jax.save_pretrained(chain, tmp_path / "net")
    again = gati_jax.from_pretrained(tmp_path / "net")
    assert same(again, chain)
    assert again.normalization == normalization


def test_chains_that_would_not_come_back_are_not_saved(chain, expected, tmp_path):
    with pytest.raises(InputError, match="chain: expected a network of this library"):
        gati_jax.save_pretrained(chain, tmp_path / "net")
    with pytest.raises(InputError, match="chain: expected the blocks of its network, got others"):
        gati_jax.save_pretrained(models.with_algorithms(expected, models.winograd_where_wide(R20)), tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_a_folder_of_timm(tmp_path, expected):
    save_file(TENSORS, tmp_path / "model.safetensors")
    data = {"input_size": [1, 28, 28], "mean": [0.3], "std": [0.4]}
    config = {"architecture": "resnet20.a1_in1k", "num_classes": 7, "pretrained_cfg": data}
    (tmp_path / "config.json").write_text(json.dumps(config))
    chain = gati_jax.from_pretrained(tmp_path)
    assert same(chain, expected)
    assert chain.normalization == PIXELS


def test_a_preprocessor_says_how_pixels_are_normalised(tmp_path):
    network = SHAPES["vit"]
    tensors = models.export_state_dict(network, random_variables(network))
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    config = {
        "model_type": "vit",
        "image_size": 8,
        "patch_size": 4,
        "id2label": {"0": "a", "1": "b", "2": "c"},
        **sizes,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    chain = gati_jax.from_pretrained(tmp_path)
    assert chain.network == models.ViT(**{**vars(network), "epsilon": 1e-12})
    assert chain.normalization == Normalization(mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "llama"}', "expected a config of a resnet, vit, bert, got model_type 'llama'"),
        ("{}", "got model_type None"),
        ("[]", "expected an object in .*config.json, got a list"),
        ("{", "config.json is damaged"),
        ('{"model_type": "vit", "hidden_act": "quick_gelu"}', "hidden_act 'gelu', got 'quick_gelu'"),
        ('{"model_type": "vit", "num_hidden_layers": 100000}', "config.json is damaged: depth"),
        ('{"model_type": "vit", "hidden_size": "x"}', "config.json is damaged"),
        ('{"model_type": "vit", "image_size": {}}', "config.json is damaged"),
        ('{"model_type": "resnet", "downsample_in_bottleneck": true}', "downsample_in_bottleneck False, got True"),
        ('{"gati_jax": 1, "network": {"patch": 4}, "normalization": null}', "config.json is damaged"),
        ('{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": 3}', "config.json is damaged"),
        ('{"architecture": "vit_tiny", "pretrained_cfg": {"input_size": "x"}}', "config.json is damaged"),
    ],
)
def test_configs_that_cannot_be_built_are_refused_in_a_line(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message) as caught:
        gati_jax.from_pretrained(tmp_path)
    assert str(caught.value).isprintable()


def test_names_of_the_hub(tmp_path, monkeypatch):
    for name in ("no/such/folder", "nofolder", "../x/y", "a/b c"):
        with pytest.raises(InputError, match="source: expected a folder, or owner/name of the Hugging Face hub, got"):
            gati_jax.from_pretrained(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"needs huggingface_hub: pip install 'gati-jax\[hub\]'"):
        gati_jax.from_pretrained("owner/name")


def test_a_repository_is_fetched_with_its_weights_and_no_code(tmp_path, monkeypatch, expected):
    gati_jax.save_pretrained(expected, tmp_path / "snapshot")
    asked = {}

    class Hub:
        @staticmethod
        def snapshot_download(name, **options):
            asked.update(options, name=name)
            return str(tmp_path / "snapshot")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert same(gati_jax.from_pretrained("owner/name", revision="abc"), expected)
    assert (asked["name"], asked["revision"]) == ("owner/name", "abc")
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith((".py", "*"))]
