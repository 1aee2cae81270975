"""Conversion between state dicts of PyTorch networks and variables, and the files that hold them.

Names are those of ``spellings``, which reads other libraries' too. Layouts change from PyTorch's [out, in, h, w] to
[h, w, in, out]. Files are untrusted: nothing is unpickled, and no index leads out of its folder.
"""

import contextlib
import functools
import operator
import re
import warnings
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open

from gati_jax.errors import WeightsError, as_path, describe_mismatch, kind_of, listed, printable
from gati_jax.options import describe_error

from .architectures import VGG, AnyNetwork, ResNet
from .networks import Variables, init
from .spellings import Tensors, is_no_weight, standard_names
from .transformers import Bert, ViT

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_IN_SAFETENSORS = {"F16", "BF16", "F32", "F64"}
_TORCH = {".pth", ".pt", ".bin", ".ckpt"}
_INDEX = ".safetensors.index.json"
_MAX_JSON_BYTES, _MAX_SHARDS = 16 * 2**20, 1000
_IN_A_FOLDER = ("model.safetensors", f"model{_INDEX}", "pytorch_model.bin")
"""The files of weights that a folder may have, in the order of preference."""
_NESTED = ("state_dict", "model", "model_state_dict", "module", "ema", "model_ema", "state_dict_ema")
"""Where a checkpoint may keep its state dict; plain weights before their moving averages."""


class _Entry(NamedTuple):
    """Where one tensor of a state dict lives in the variables."""

    block: int
    path: tuple[str, ...]
    axes: tuple[int, ...]  # the transposition from PyTorch's layout to ours


_KERNEL, _MATRIX, _VECTOR = (2, 3, 1, 0), (1, 0), (0,)
_TABLE, _TOKENS = (0, 1), (0, 1, 2)  # as they are
_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def _conv_norm(conv: str, norm: str, block: int, path: tuple[str, ...]) -> Iterator[tuple[str, _Entry]]:
    yield f"{conv}.weight", _Entry(block, ("params", *path, "conv", "kernel"), _KERNEL)
    for name, (collection, leaf) in _NORM.items():
        yield f"{norm}.{name}", _Entry(block, (collection, *path, "norm", leaf), _VECTOR)


def _dense(name: str, block: int, *path: str) -> dict[str, _Entry]:
    return {
        f"{name}.weight": _Entry(block, ("params", *path, "kernel"), _MATRIX),
        f"{name}.bias": _Entry(block, ("params", *path, "bias"), _VECTOR),
    }


def _layer_norm(name: str, block: int, *path: str) -> dict[str, _Entry]:
    return {
        f"{name}.weight": _Entry(block, ("params", *path, "scale"), _VECTOR),
        f"{name}.bias": _Entry(block, ("params", *path, "bias"), _VECTOR),
    }


def _entries(network: AnyNetwork) -> dict[str, _Entry]:
    """Name every tensor of the network's state dict."""
    match network:
        case ResNet():
            return _resnet(network) | _dense("fc", network.depth, "fc")
        case VGG():
            return _vgg(network) | _dense("classifier", network.depth, "fc")
        case ViT():
            return _vit(network) | _dense("head", network.depth, "head")
        case Bert():
            return _bert(network) | _dense("classifier", network.depth, "head")


def classifier_of(network: type[AnyNetwork]) -> str:
    """Return the name of the last layer in a state dict."""
    return {ResNet: "fc", ViT: "head"}.get(network, "classifier")


def _vgg(network: VGG) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    at = 0  # in torchvision's sequence of convolution, norm, ReLU and max-pool
    for block, (_, pool) in enumerate(network.shapes):
        entries |= _conv_norm(f"features.{at}", f"features.{at + 1}", block, ("conv",))
        at += 4 if pool else 3
    return entries


def _vit(network: ViT) -> dict[str, _Entry]:
    entries = {
        "cls_token": _Entry(0, ("params", "tokens", "class_token"), _TOKENS),
        "pos_embed": _Entry(0, ("params", "tokens", "positions"), _TOKENS),
        "patch_embed.proj.weight": _Entry(0, ("params", "tokens", "patches", "kernel"), _KERNEL),
        "patch_embed.proj.bias": _Entry(0, ("params", "tokens", "patches", "bias"), _VECTOR),
    }
    for k in range(network.depth):
        prefix, path = f"blocks.{k}", ("block",) if k == 0 else ()
        entries |= _layer_norm(f"{prefix}.norm1", k, *path, "norm1") | _layer_norm(f"{prefix}.norm2", k, *path, "norm2")
        for part in ("qkv", "proj"):
            entries |= _dense(f"{prefix}.attn.{part}", k, *path, "attention", part)
        for part in ("fc1", "fc2"):
            entries |= _dense(f"{prefix}.mlp.{part}", k, *path, part)
    return entries | _layer_norm("norm", network.depth, "last_norm")


def _bert(network: Bert) -> dict[str, _Entry]:
    tables = {"word": "words", "position": "positions", "token_type": "segments"}
    entries = {
        f"bert.embeddings.{name}_embeddings.weight": _Entry(0, ("params", "tokens", leaf), _TABLE)
        for name, leaf in tables.items()
    }
    entries |= _layer_norm("bert.embeddings.LayerNorm", 0, "tokens", "norm0")
    for k in range(network.depth):
        prefix = f"bert.encoder.layer.{k}"
        entries |= _dense(f"{prefix}.attention.qkv", k, "block", "attention", "qkv")
        entries |= _dense(f"{prefix}.attention.output.dense", k, "block", "attention", "proj")
        entries |= _layer_norm(f"{prefix}.attention.output.LayerNorm", k, "block", "norm1")
        entries |= _dense(f"{prefix}.intermediate.dense", k, "block", "fc1")
        entries |= _dense(f"{prefix}.output.dense", k, "block", "fc2")
        entries |= _layer_norm(f"{prefix}.output.LayerNorm", k, "block", "norm2")
    return entries | _dense("bert.pooler.dense", network.depth, "pooler")


def _absorbed(network: AnyNetwork) -> dict[str, str]:
    """Return, by the name of each convolution's bias, the running mean that it is subtracted from.

    torchvision's VGGs have biases before their batch norms, where they only move the mean.
    """
    if not isinstance(network, VGG):
        return {}
    kernels = [name for name, entry in _vgg(network).items() if entry.axes == _KERNEL]
    means = [name for name, entry in _vgg(network).items() if entry.path[-1] == "mean"]
    return {kernel.replace(".weight", ".bias"): mean for kernel, mean in zip(kernels, means, strict=True)}


def _resnet(network: ResNet) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    prefixes = (f"layer{stage}.{k}." for stage, count in enumerate(network.stages, 1) for k in range(count))
    for block, (prefix, layers) in enumerate(zip(prefixes, network.layers(), strict=True)):
        for layer in layers:
            match layer.path:
                case ("stem", _):
                    names = "conv1", "bn1"
                case (*_, "projection"):
                    names = f"{prefix}downsample.0", f"{prefix}downsample.1"
                case _:
                    conv = layer.path[-1]
                    names = f"{prefix}{conv}", f"{prefix}{conv.replace('conv', 'bn')}"
            entries |= _conv_norm(*names, block, layer.path)
    return entries


def import_state_dict(network: AnyNetwork, tensors: Tensors) -> Variables:
    """Return the variables of ``network`` from a state dict, in float32.

    Args:
        network: The configuration that the weights were trained for.
        tensors: Arrays by name; half-precision ones are widened, ``num_batches_tracked`` is ignored. For the names, see
            ``spellings``.

    Raises:
        WeightsError: Names are missing, unexpected, misshapen or given twice, the classifier has another number of
            classes, a tensor is quantised, or values are not finite or a variance is negative.
    """
    entries, found = _entries(network), standard_names(network, tensors)
    last = found.get(f"{classifier_of(type(network))}.weight")
    if last is not None and last.ndim == 2 and len(last) != network.classes:  # noqa: PLR2004
        raise WeightsError(f"classes: expected {network.classes}, got weights with a classifier for {len(last)}")
    abstract = jax.eval_shape(lambda: init(network, jax.random.key(0)))
    expected = {name: _torch_shape(_leaf(abstract[e.block], e.path).shape, e.axes) for name, e in entries.items()}
    biases = {bias: mean for bias, mean in _absorbed(network).items() if bias in found}
    expected |= {bias: expected[mean] for bias, mean in biases.items()}
    if problems := describe_mismatch(expected, {name: str(list(v.shape)) for name, v in found.items()}):
        raise WeightsError(f"weights: these are not the network's tensors. {problems}")
    found = _float32(found, entries)
    for bias, mean in biases.items():
        found[mean] = found[mean] - found[bias]
    variables: list[dict[str, Any]] = [{} for _ in range(network.depth + 1)]
    for name, entry in entries.items():
        node = variables[entry.block]
        for part in entry.path[:-1]:
            node = node.setdefault(part, {})
        node[entry.path[-1]] = np.ascontiguousarray(found[name].transpose(entry.axes), dtype=np.float32)
    return tuple(variables)


def _float32(found: Tensors, entries: Mapping[str, _Entry]) -> dict[str, np.ndarray]:
    """Return tensors in float32 if they can be a network's weights."""
    for name, v in found.items():
        if v.dtype.name not in _DTYPES:
            raise _other_dtype(name, v.dtype.name)
    with np.errstate(over="ignore"):  # a float64 beyond float32 is refused as infinity
        values = {name: np.asarray(v, np.float32) for name, v in found.items()}
    if bad := sorted(name for name, v in values.items() if not np.isfinite(v).all()):
        raise WeightsError(f"weights: expected finite values in float32, got NaN or infinity in {listed(bad)}")
    for name, entry in entries.items():
        if entry.path[-1] == "var" and values[name].min() < 0:
            raise WeightsError(f"weights: expected variances of at least 0, got {values[name].min():g} in {name}")
    return values


def _other_dtype(name: str, dtype: str) -> WeightsError:
    """Report a quantised tensor: its codes are not weights without their scales, which no entry is for."""
    return WeightsError(
        f"weights: expected {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}, got {dtype} in {printable(name)}"
    )


def _torch_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> str:
    return str([shape[i] for i in np.argsort(axes)])


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:  # noqa: ANN401
    return functools.reduce(operator.getitem, path, tree)


def export_state_dict(network: AnyNetwork, variables: Variables) -> dict[str, np.ndarray]:
    """Return the state dict of ``variables`` under the standard names: the inverse of ``import_state_dict``."""
    tensors = {
        name: np.ascontiguousarray(np.asarray(_leaf(variables[e.block], e.path)).transpose(np.argsort(e.axes)))
        for name, e in _entries(network).items()
    }
    return tensors | {bias: np.zeros_like(tensors[mean]) for bias, mean in _absorbed(network).items()}


def read_weights(path: Path | str) -> dict[str, np.ndarray]:
    """Read a state dict from a file of weights; never code.

    Args:
        path: A .safetensors file; the index of several, model.safetensors.index.json; with torch, a .pth, .pt, .bin or
            .ckpt file, whose state dict may be nested as training scripts nest it; or a folder with one of them.

    Raises:
        WeightsError: The file is missing, damaged or of another kind, or an index names files outside of its folder.
    """
    path = _existing(path)
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _TORCH:
        return _read_torch(path)
    raise WeightsError(f"weights: expected a .safetensors or .pth file, got {path.name}")


def read_metadata(path: Path | str) -> dict[str, str]:
    """Return a safetensors file's own metadata; empty for other files.

    Raises:
        WeightsError: The file is missing or damaged.
    """
    path = _existing(path)
    if path.suffix != ".safetensors":
        return {}
    with _safetensors(path) as file:
        return dict(file.metadata() or {})


def _existing(path: Path | str) -> Path:
    path = as_path("weights", path)
    if path.is_dir():
        found = [path / name for name in _IN_A_FOLDER if (path / name).is_file()]
        if not found:
            raise WeightsError(f"weights: expected {', '.join(_IN_A_FOLDER[:-1])} or {_IN_A_FOLDER[-1]} in {path}")
        return found[0]
    if not path.is_file():
        raise WeightsError(f"weights: no such file: {path}")
    return path


@contextlib.contextmanager
def _safetensors(path: Path) -> Generator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise WeightsError(f"weights: {path} is not a readable safetensors file ({printable(str(error))})") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with _safetensors(path) as file:
        names = [name for name in file.keys() if not is_no_weight(name)]  # noqa: SIM118 (not a mapping)
        for name in names:
            if (dtype := file.get_slice(name).get_dtype()) not in _IN_SAFETENSORS:  # NumPy has not all of them
                raise _other_dtype(name, dtype)
        return {name: file.get_tensor(name) for name in names}


class _Index(BaseModel):
    """Which file holds which tensor: names of files beside the index, and no paths."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[\w-][\w.-]*\.safetensors$", max_length=200)]]


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    """Read the files that an index names, each beside it, and check that they hold what it says."""
    try:
        where = _Index.model_validate_json(read_bounded(index)).weight_map
    except ValidationError as error:
        first = describe_error(error.errors(include_url=False)[0])
        raise WeightsError(f"weights: {index} is no index of .safetensors files beside it: {first}") from error
    if len(files := sorted(set(where.values()))) > _MAX_SHARDS:
        raise WeightsError(f"weights: expected at most {_MAX_SHARDS} files in {index}, got {len(files)}")
    found: dict[str, np.ndarray] = {}
    for name in files:
        tensors = _read_safetensors(_within(index.parent, name))
        said = {tensor for tensor, file in where.items() if file == name and not is_no_weight(tensor)}
        if problems := describe_mismatch(dict.fromkeys(said, ""), dict.fromkeys(tensors, "")):
            raise WeightsError(f"weights: {name} holds other tensors than {index} says. {problems}")
        found |= tensors
    return found


def read_bounded(path: Path) -> bytes:
    """Return what a small file holds.

    Raises:
        WeightsError: It is no small one.
    """
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise WeightsError(f"weights: expected at most {_MAX_JSON_BYTES} bytes in {path}, got {size}")
    return path.read_bytes()


def _within(folder: Path, name: str) -> Path:
    """Return a file of a folder; a link may lead to the blobs that the Hugging Face cache has beside its snapshots."""
    file, here = _existing(folder / name).resolve(), folder.resolve()
    allowed = {here, here.parent.parent / "blobs"} if here.parent.name == "snapshots" else {here}
    if file.parent not in allowed:
        raise WeightsError(f"weights: expected {name} in {folder}, got a link out of it")
    return folder / name


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise WeightsError(
            f"weights: reading {path.name} needs torch (pip install 'gati-jax[torch]'), or convert it to safetensors"
        ) from error
    expected = f"weights: expected a state dict of tensors in {path}, got"
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (torch raises many kinds for a damaged file, and advises to unpickle it)
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        got = printable(foreign[1]) if foreign else "a damaged file, or one of another kind"
        raise WeightsError(f"{expected} {got}") from None
    tensors = _state_dict(loaded)
    if not isinstance(tensors, dict):
        raise WeightsError(f"{expected} {kind_of(tensors)}")
    found = {str(name): tensor for name, tensor in tensors.items() if not is_no_weight(str(name))}
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor):
            raise WeightsError(f"{expected} {kind_of(tensor)} as {printable(name)}")
        dtype, layout = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, tensor.layout))
        if dtype not in _DTYPES or layout != "strided" or tensor.is_meta:
            raise _other_dtype(name, f"{dtype} ({'meta' if tensor.is_meta else layout})")
        if tensor.nbytes > path.stat().st_size:  # one number, repeated, may have any shape
            raise WeightsError(f"{expected} fewer bytes than {printable(name)} has")
    return {name: tensor.detach().float().numpy() for name, tensor in found.items()}


def _state_dict(loaded: Any) -> Any:  # noqa: ANN401 (whatever torch found)
    """Return what a checkpoint keeps as its state dict."""
    for _ in _NESTED:  # they may be nested in each other, but not for ever
        if not isinstance(loaded, dict) or not (keys := [key for key in _NESTED if isinstance(loaded.get(key), dict)]):
            break
        if len(keys) > 1:
            warnings.warn(
                f"weights: the checkpoint holds {', '.join(keys)}, of which {keys[0]} is read; save another alone",
                stacklevel=4,
            )
        loaded = loaded[keys[0]]
    return loaded
