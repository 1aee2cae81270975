"""Conversion between state dicts of PyTorch networks and variables, and the files that hold them.

Names are torchvision's (``layer1.0.conv1.weight``, ``downsample.0``, ``fc``; ``features.0.weight``); the CIFAR sources'
spellings (``linear``, ``shortcut.0``, a VGG's one ``classifier``, a leading ``module.``) are read too. Layouts change
from PyTorch's [out, in, h, w] to [h, w, in, out].
"""

import collections
import contextlib
import re
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from gati_jax.errors import WeightsError, describe_mismatch, listed, printable

from .networks import Architecture, Variables, init
from .resnet import ResNet
from .vgg import VGG

Tensors = Mapping[str, np.ndarray]
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_IN_SAFETENSORS = {"F16", "BF16", "F32", "F64"}


class _Entry(NamedTuple):
    """Where one tensor of a state dict lives in the variables."""

    block: int
    path: tuple[str, ...]
    axes: tuple[int, ...]  # the transposition from PyTorch's layout to ours


_KERNEL, _MATRIX, _VECTOR = (2, 3, 1, 0), (1, 0), (0,)
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


def _entries(network: Architecture) -> dict[str, _Entry]:
    """Name every tensor of the network's state dict."""
    entries, head = (_vgg(network), "classifier") if isinstance(network, VGG) else (_resnet(network), "fc")
    entries[f"{head}.weight"] = _Entry(network.depth, ("params", "fc", "kernel"), _MATRIX)
    entries[f"{head}.bias"] = _Entry(network.depth, ("params", "fc", "bias"), _VECTOR)
    return entries


def _vgg(network: VGG) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    at = 0  # in torchvision's sequence of convolution, norm, ReLU and max-pool
    for block, (_, pool) in enumerate(network.shapes):
        entries |= _conv_norm(f"features.{at}", f"features.{at + 1}", block, ("conv",))
        at += 4 if pool else 3
    return entries


def _absorbed(network: Architecture) -> dict[str, str]:
    """Return, by the name of each convolution's bias, the running mean that it is subtracted from.

    torchvision's VGGs have biases before their batch norms, where they only move the mean.
    """
    if not isinstance(network, VGG):
        return {}
    kernels = [name for name, entry in _vgg(network).items() if entry.axes == _KERNEL]
    means = [name for name, entry in _vgg(network).items() if entry.path[-1] == "mean"]
    return {kernel.replace(".weight", ".bias"): mean for kernel, mean in zip(kernels, means, strict=True)}


def _resnet(network: ResNet) -> dict[str, _Entry]:
    entries = dict(_conv_norm("conv1", "bn1", 0, ("stem", "conv")))
    block = 0
    out = network.widths[0]
    for stage, (count, width) in enumerate(zip(network.stages, network.widths, strict=True)):
        for k in range(count):
            prefix, path = f"layer{stage + 1}.{k}.", () if block else ("block",)
            for i in range(1, 4 if network.bottleneck else 3):
                entries |= _conv_norm(f"{prefix}conv{i}", f"{prefix}bn{i}", block, (*path, f"conv{i}"))
            before, out = out, 4 * width if network.bottleneck else width
            if network.shortcut == "B" and (before != out or (stage > 0 and k == 0)):
                entries |= _conv_norm(
                    f"{prefix}downsample.0", f"{prefix}downsample.1", block, (*path, "shortcut", "projection")
                )
            block += 1
    return entries


def _standard_name(name: str) -> str:
    name = name.removeprefix("module.").replace(".shortcut.", ".downsample.")
    return f"fc.{name.removeprefix('linear.')}" if name.startswith("linear.") else name


def import_state_dict(network: Architecture, tensors: Tensors) -> Variables:
    """Return the variables of ``network`` from a state dict, in float32.

    Args:
        network: The configuration that the weights were trained for.
        tensors: Arrays by name; half-precision ones are widened, ``num_batches_tracked`` is ignored.

    Raises:
        WeightsError: Names are missing, unexpected, misshapen or given twice, a tensor is quantised, or values are not
            finite or a variance is negative.
    """
    entries = _entries(network)
    given = [name for name in tensors if not _is_counter(name)]
    found = {_standard_name(name): np.asarray(tensors[name]) for name in given}
    if len(found) < len(given):
        times = collections.Counter(map(_standard_name, given))
        twice = sorted(name for name in given if times[_standard_name(name)] > 1)
        raise WeightsError(f"weights: expected every tensor once, got {listed(twice)}")
    abstract = jax.eval_shape(lambda: init(network, jax.random.key(0)))
    expected = {name: _torch_shape(_leaf(abstract[e.block], e.path).shape, e.axes) for name, e in entries.items()}
    biases = {bias: mean for bias, mean in _absorbed(network).items() if bias in found}
    expected |= {bias: expected[mean] for bias, mean in biases.items()}
    if problems := describe_mismatch(expected, {name: str(list(v.shape)) for name, v in found.items()}):
        raise WeightsError(f"weights: these are not the network's tensors. {problems}")
    for name, v in found.items():
        if v.dtype.name not in _DTYPES:
            raise _other_dtype(name, v.dtype.name)
    with np.errstate(over="ignore"):  # a float64 beyond float32 is refused as infinity
        found = {name: np.asarray(v, np.float32) for name, v in found.items()}
    if bad := sorted(name for name, v in found.items() if not np.isfinite(v).all()):
        raise WeightsError(f"weights: expected finite values in float32, got NaN or infinity in {listed(bad)}")
    for name, entry in entries.items():
        if entry.path[-1] == "var" and found[name].min() < 0:
            raise WeightsError(f"weights: expected variances of at least 0, got {found[name].min():g} in {name}")
    for bias, mean in biases.items():
        found[mean] = found[mean] - found[bias]
    return _build(network, {name: found[name] for name in entries}, entries)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _other_dtype(name: str, dtype: str) -> WeightsError:
    """Report a quantised tensor: its codes are not weights without their scales, which no entry is for."""
    return WeightsError(
        f"weights: expected {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}, got {dtype} in {printable(name)}"
    )


def _build(network: Architecture, tensors: Tensors, entries: dict[str, _Entry]) -> Variables:
    variables: list[dict[str, Any]] = [{} for _ in range(network.depth + 1)]
    for name, entry in entries.items():
        node = variables[entry.block]
        for part in entry.path[:-1]:
            node = node.setdefault(part, {})
        node[entry.path[-1]] = np.ascontiguousarray(tensors[name].transpose(entry.axes), dtype=np.float32)
    return tuple(variables)


def _torch_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> str:
    return str([shape[i] for i in np.argsort(axes)])


def _leaf(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:  # noqa: ANN401
    for part in path:
        tree = tree[part]
    return tree


def export_state_dict(network: Architecture, variables: Variables) -> dict[str, np.ndarray]:
    """Return the state dict of ``variables`` under torchvision's names: the inverse of ``import_state_dict``."""
    tensors = {
        name: np.ascontiguousarray(np.asarray(_leaf(variables[e.block], e.path)).transpose(np.argsort(e.axes)))
        for name, e in _entries(network).items()
    }
    return tensors | {bias: np.zeros_like(tensors[mean]) for bias, mean in _absorbed(network).items()}


def read_weights(path: Path | str) -> dict[str, np.ndarray]:
    """Read a state dict from a .safetensors file, or from a .pth file if torch is installed (weights only, never code).

    Raises:
        WeightsError: The file is missing, damaged or of another kind.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in {".pth", ".pt"}:
        return _read_torch(path)
    raise WeightsError(f"weights: expected a .safetensors or .pth file, got {path.name}")


def _existing(path: Path | str) -> Path:
    if not Path(path).is_file():
        raise WeightsError(f"weights: no such file: {path}")
    return Path(path)


@contextlib.contextmanager
def _safetensors(path: Path) -> Generator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise WeightsError(f"weights: {path} is not a readable safetensors file ({printable(str(error))})") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with _safetensors(path) as file:
        names = [name for name in file.keys() if not _is_counter(name)]  # noqa: SIM118 (not a mapping)
        for name in names:
            if (dtype := file.get_slice(name).get_dtype()) not in _IN_SAFETENSORS:  # NumPy has not all of them
                raise _other_dtype(name, dtype)
        return {name: file.get_tensor(name) for name in names}


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
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(tensors, dict):
        raise WeightsError(f"{expected} a {type(tensors).__name__}")
    found = {str(name): tensor for name, tensor in tensors.items() if not _is_counter(str(name))}
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor):
            raise WeightsError(f"{expected} a {type(tensor).__name__} as {printable(name)}")
        dtype, layout = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, tensor.layout))
        if dtype not in _DTYPES or layout != "strided" or tensor.is_meta:
            raise _other_dtype(name, f"{dtype} ({'meta' if tensor.is_meta else layout})")
        if tensor.nbytes > path.stat().st_size:  # one number, repeated, may have any shape
            raise WeightsError(f"{expected} fewer bytes than {printable(name)} has")
    return {name: tensor.detach().float().numpy() for name, tensor in found.items()}
