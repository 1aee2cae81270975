"""State dicts in and out, from files that may be damaged or hostile."""

import json
import math
import os
import pickle
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from gati_jax import data, models
from gati_jax.errors import WeightsError
from gati_jax.models import Normalization, ResNet, resnet

BASIC = ResNet(stages=(1, 1), widths=(2, 4), classes=3, input_shape=(8, 8, 3))
BOTTLENECK = ResNet(stages=(1, 2), widths=(2, 3), bottleneck=True, classes=3, input_shape=(8, 8, 3))
PADDED = ResNet(stages=(2, 1), widths=(2, 4), shortcut="A", classes=3, input_shape=(8, 8, 3))
IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CIFAR = Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


def random_variables(network):
    """Variables of the shapes that ``init`` gives, without compiling it."""
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: models.init(network, jax.random.key(0)))
    return jax.tree.map(lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(np.float32), abstract)


TENSORS = models.export_state_dict(BASIC, random_variables(BASIC))


def same_tensors(one, other):
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and np.array_equal(one[k], other[k]) for k in one
    )


def same_tree(one, other):
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), one, other)
    )


@pytest.mark.parametrize("network", [BASIC, BOTTLENECK, PADDED], ids=["basic", "bottleneck", "padded"])
def test_round_trip_is_bit_identical(network):
    variables = random_variables(network)
    tensors = models.export_state_dict(network, variables)
    assert same_tree(models.import_state_dict(network, tensors), variables)
    assert same_tensors(models.export_state_dict(network, models.import_state_dict(network, tensors)), tensors)


def rename(tensors, old, new):
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


def in_module(tensors):
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


SPELLINGS = {
    "linear": rename(TENSORS, "fc.", "linear."),
    "module": in_module(TENSORS),
    "shortcut": rename(TENSORS, ".downsample.", ".shortcut."),
    "all": in_module(rename(rename(TENSORS, "fc.", "linear."), ".downsample.", ".shortcut.")),
    "counters": TENSORS | {"bn1.num_batches_tracked": np.asarray(7), "layer1.0.bn1.num_batches_tracked": np.asarray(7)},
}


@pytest.mark.parametrize("tensors", SPELLINGS.values(), ids=SPELLINGS)
def test_other_spellings_are_accepted(tensors):
    assert any(name not in TENSORS for name in tensors)
    assert same_tree(models.import_state_dict(BASIC, tensors), models.import_state_dict(BASIC, TENSORS))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=["half", "bfloat16", "double"])
def test_other_precisions_become_float32(dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in TENSORS.items()}
    variables = models.import_state_dict(BASIC, tensors)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    widened = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    assert same_tensors(models.export_state_dict(BASIC, variables), widened)


def expected_lists(deleted, renamed, reshaped):
    lists = {
        "missing": sorted(deleted | renamed),
        "unexpected": sorted(f"x.{name}" for name in renamed),
        "misshapen": [
            f"{name} (expected {list(TENSORS[name].shape)}, got {[*TENSORS[name].shape, 1]})"
            for name in sorted(reshaped)
        ],
    }
    return "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in lists.items() if names)


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(TENSORS)), st.sampled_from(["delete", "rename", "reshape"]), min_size=1))
def test_mismatch_lists_every_wrong_name(damage):
    deleted, renamed, reshaped = (
        {name for name, kind in damage.items() if kind == wanted} for wanted in ("delete", "rename", "reshape")
    )
    tensors = {name: tensor for name, tensor in TENSORS.items() if name not in deleted | renamed | reshaped}
    tensors |= {f"x.{name}": TENSORS[name] for name in renamed} | {name: TENSORS[name][..., None] for name in reshaped}
    with pytest.raises(WeightsError) as caught:
        models.import_state_dict(BASIC, tensors)
    assert str(caught.value).endswith(f". {expected_lists(deleted, renamed, reshaped)}")


@pytest.mark.parametrize(
    ("network", "changed", "message"),
    [
        # Which of the two would count? Silently the later one, else.
        (BASIC, {"linear.bias": TENSORS["fc.bias"] + 1}, "every tensor once, got fc.bias, linear.bias"),
        (BOTTLENECK, {}, r"missing: layer1\.0\.bn3\.bias"),
        (BASIC, {"fc.bias": np.full(3, np.nan)}, "got NaN or infinity in fc.bias"),
        (BASIC, {"fc.bias": np.array([1, 2, np.inf])}, "got NaN or infinity in fc.bias"),
    ],
    ids=["two spellings", "another network", "nan", "inf"],
)
def test_weights_that_are_not_the_networks_are_refused(network, changed, message):
    with pytest.raises(WeightsError, match=message):
        models.import_state_dict(network, TENSORS | changed)


def test_a_negative_running_variance_is_refused():
    """Its square root would be NaN, or, if it is small, too large a scale."""
    damaged = TENSORS | {"layer1.0.bn2.running_var": TENSORS["layer1.0.bn2.running_var"] - 2}
    with pytest.raises(WeightsError, match=r"variances of at least 0, got -[0-9.]+ in layer1\.0\.bn2\.running_var"):
        models.import_state_dict(BASIC, damaged)


FLOAT8 = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
COUNTER = {"bn1.num_batches_tracked": np.asarray(7)}


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, bool, np.complex64, *FLOAT8], ids=lambda d: d.__name__)
def test_quantised_weights_are_refused(dtype):
    """Codes without their scales are other weights, of the right shape."""
    with pytest.raises(WeightsError, match=f"float64, got {np.dtype(dtype).name} in fc.weight"):
        models.import_state_dict(BASIC, TENSORS | {"fc.weight": np.ones(TENSORS["fc.weight"].shape, dtype)})


@pytest.mark.parametrize(("code", "size"), [("I8", 1), ("U8", 1), ("F8_E4M3", 1), ("F8_E5M2", 1), ("I64", 8)])
def test_a_file_with_quantised_weights_is_refused(tmp_path, code, size):
    path, shape = tmp_path / "net.safetensors", TENSORS["fc.weight"].shape
    save_file({name: tensor for name, tensor in (TENSORS | COUNTER).items() if name != "fc.weight"}, path)
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    end = len(data) + size * math.prod(shape)
    header["fc.weight"] = {"dtype": code, "shape": shape, "data_offsets": [len(data), end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data + bytes(end - len(data)))
    with pytest.raises(WeightsError, match=r"expected float16, bfloat16, float32 or float64, got \w+ in fc\.weight"):
        models.import_state_dict(BASIC, models.read_weights(path))


@pytest.mark.parametrize(
    "name", ["a\n\x1b[2Jerror: all is well", "\u202egnp.exe", "x" * 10**6], ids=["line", "bidi", "long"]
)
def test_a_hostile_name_stays_within_one_line(name):
    for damaged in (TENSORS | {name: TENSORS["fc.bias"]}, {f"{name}{i}": TENSORS["fc.bias"] for i in range(500)}):
        with pytest.raises(WeightsError) as caught:
            models.import_state_dict(BASIC, damaged)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 10_000


def test_a_hostile_header_stays_within_one_line(tmp_path):
    path, text = tmp_path / "net.safetensors", json.dumps({"a\n\x1b[2J" * 1000: {"dtype": "\x1b[2J"}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(WeightsError) as caught:
        models.read_weights(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_safetensors_file_and_its_metadata(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file(TENSORS, path, metadata={"source": "here"})
    assert same_tensors(models.read_weights(path), TENSORS)
    assert same_tensors(models.read_weights(str(path)), TENSORS)
    assert models.read_metadata(path) == {"source": "here"}


def test_bfloat16_safetensors_file_can_be_read(tmp_path):
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in TENSORS.items()}
    save_file(tensors, tmp_path / "net.safetensors")
    variables = models.import_state_dict(BASIC, models.read_weights(tmp_path / "net.safetensors"))
    assert same_tree(variables, models.import_state_dict(BASIC, tensors))


DAMAGED = {
    **{f"first {keep} bytes": (lambda whole, keep=keep: whole[:keep]) for keep in (0, 4, 8, 100)},
    "first half": lambda whole: whole[: len(whole) // 2],
    "all but one byte": lambda whole: whole[:-1],
    "garbage": lambda _: b"garbage" * 50,
    "no length": lambda _: b"\xff" * 64,
    "a list": lambda _: b"\x02" + b"\0" * 7 + b"[]",
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_safetensors_is_refused(tmp_path, damage):
    path = tmp_path / "net.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(damage(path.read_bytes()))
    for read in (models.read_weights, models.read_metadata):
        with pytest.raises(WeightsError, match=r"net\.safetensors"):
            read(path)


def test_missing_and_unknown_files_are_named(tmp_path):
    for read in (models.read_weights, models.read_metadata):
        with pytest.raises(WeightsError, match=r"weights: no such file: .*none\.safetensors"):
            read(tmp_path / "none.safetensors")
    (tmp_path / "net.onnx").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"expected a \.safetensors or \.pth file, got net\.onnx"):
        models.read_weights(tmp_path / "net.onnx")


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def pth(tmp_path):
    return tmp_path / "net.pth"


WRITTEN = {
    "a state dict": lambda _, state: state,
    "a checkpoint": lambda _, state: {"state_dict": state, "epoch": 3},
    "half precision": lambda _, state: {name: tensor.half() for name, tensor in state.items()},
    # ``torch.save(dict(model.named_parameters()), path)``; weights-only loading allows it
    "parameters": lambda torch, state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
}


@pytest.mark.parametrize("what", WRITTEN)
def test_pth_file_is_read(torch, pth, what):
    torch.save(WRITTEN[what](torch, {name: torch.from_numpy(tensor) for name, tensor in TENSORS.items()}), pth)
    half = {name: tensor.astype(np.float16).astype(np.float32) for name, tensor in TENSORS.items()}
    assert same_tensors(models.read_weights(pth), half if what == "half precision" else TENSORS)


class Creator:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(("save", "got"), [("torch", r"\w+\.mkdir$"), ("pickle", "a damaged file, or one of another")])
def test_code_in_a_pth_file_never_runs(torch, pth, tmp_path, save, got):
    proof, created = tmp_path / "proof", tmp_path / "created"
    pickle.loads(pickle.dumps(Creator(proof)))
    assert proof.exists()  # the trap works where it is sprung
    if save == "torch":
        torch.save({"fc.bias": Creator(created)}, pth)
    else:
        pth.write_bytes(pickle.dumps({"fc.bias": Creator(created)}))
    with pytest.raises(WeightsError, match=rf"expected a state dict of tensors in .*, got {got}") as caught:
        models.read_weights(pth)
    assert "weights_only" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert not created.exists()


OTHER_TENSORS = {
    "int8": lambda torch, shape: torch.ones(shape, dtype=torch.int8),
    "qint8": lambda torch, shape: torch.quantize_per_tensor(torch.ones(shape), 0.1, 0, torch.qint8),
    "float8_e4m3fn": lambda torch, shape: torch.ones(shape).to(torch.float8_e4m3fn),
    "complex64": lambda torch, shape: torch.ones(shape, dtype=torch.complex64),
    "sparse": lambda torch, shape: torch.ones(shape).to_sparse(),
    "meta": lambda torch, shape: torch.ones(shape, device="meta"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch deprecates quantised tensors; files with them remain
@pytest.mark.parametrize("what", OTHER_TENSORS)
def test_a_pth_file_with_other_tensors_is_refused(torch, pth, what):
    state = {name: torch.from_numpy(tensor) for name, tensor in (TENSORS | COUNTER).items()}
    torch.save(state | {"fc.weight": OTHER_TENSORS[what](torch, state["fc.weight"].shape)}, pth)
    with pytest.raises(WeightsError, match=rf"expected float16, .*, got .*{what}.* in fc\.weight"):
        models.import_state_dict(BASIC, models.read_weights(pth))


def test_a_small_pth_file_does_not_become_a_large_array(torch, pth):
    one = torch.ones(1, dtype=torch.bfloat16)
    torch.save({"fc.bias": one.expand(2**20, 2**20)}, pth)
    with pytest.raises(WeightsError, match=r"fc\.bias"):
        models.read_weights(pth)


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, b"PK\x03\x04", [1, 2], {"fc.bias": 1.0}, {"state_dict": 5}])
def test_damaged_pth_file_or_one_without_tensors_is_refused(torch, pth, content):
    if isinstance(content, bytes):
        pth.write_bytes(content)
    else:
        torch.save(content, pth)
    got = (
        "a damaged file"
        if isinstance(content, bytes)
        else r"(list \[1, 2\]|float 1\.0 as fc\.bias|int 5 as state_dict)"
    )
    with pytest.raises(WeightsError, match=rf"expected a state dict of tensors in .*net\.pth, got {got}"):
        models.read_weights(pth)


def test_pth_file_without_torch_says_what_to_install(pth, monkeypatch):
    pth.write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightsError, match=r"reading net\.pth needs torch \(pip install 'gati-jax\[torch\]'\)"):
        models.read_weights(pth)


def test_trained_resnet20_gives_the_logits_of_torch(shared):
    pytest.importorskip("torch")
    from tests.models import torch_reference  # noqa: PLC0415 (needs torch)

    network = resnet("resnet20")
    path = shared / "weights" / "resnet20-cifar10.safetensors"
    reference = torch_reference.build(network).eval()
    tensors = {k: torch_reference.torch.from_numpy(v) for k, v in rename(load_file(path), "linear.", "fc.").items()}
    problems = reference.load_state_dict(tensors, strict=False)
    assert all(name.endswith("num_batches_tracked") for name in problems.missing_keys)
    assert not problems.unexpected_keys
    images = np.asarray(data.load("cifar10", "test[:16]", shared / "tfds").images)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = torch_reference.logits(reference, (images / 255 - mean) / std)
    variables = models.import_state_dict(network, models.read_weights(path))
    chain = models.to_chain(network, models.fold(variables), IMAGENET)
    plain = jax.jit(lambda v, x: models.apply(network, v, IMAGENET(x)))(variables, images)
    folded = jax.jit(lambda chain, x: chain(chain.prepare(x)))(chain, images)
    for logits in (plain, folded):
        np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


# As the sources of the weights state them, see ../shared/data/README.md; a tie in float32 may fall either way.
STATED = {
    "resnet56": (9339, IMAGENET),
    "resnet44": (9310, IMAGENET),
    "resnet32": (9263, IMAGENET),
    "resnet20": (9173, IMAGENET),
    "resnet18": (9265, CIFAR),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STATED)
def test_trained_networks_classify_cifar10_as_their_sources_state(shared, name):
    right, normalization = STATED[name]
    network = resnet(name)
    weights = models.read_weights(shared / "weights" / f"{name}-cifar10.safetensors")
    chain = models.to_chain(network, models.fold(models.import_state_dict(network, weights)), normalization)
    answer = jax.jit(lambda chain, images: chain(chain.prepare(images)).argmax(-1))
    test = data.load("cifar10", "test", shared / "tfds")
    found = [np.asarray(answer(chain, images)) for images in np.split(test.images, 40)]
    assert abs(int((np.concatenate(found) == test.labels).sum()) - right) <= 1
