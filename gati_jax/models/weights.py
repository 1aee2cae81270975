"""Conversion between state dicts of PyTorch networks and variables, and the files that hold them.

Names are torchvision's (``layer1.0.conv1.weight``, ``downsample.0``, ``fc``; ``features.0.weight``); the CIFAR sources'
spellings (``linear``, ``shortcut.0``, a VGG's one ``classifier``, a leading ``module.``) are read too. Layouts change
from PyTorch's [out, in, h, w] to [h, w, in, out].
"""

import contextlib
import functools
import operator
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from gati_jax.errors import WeightsError, describe_mismatch

from .architectures import VGG, Architecture, ResNet
from .networks import Variables, init

Tensors = Mapping[str, np.ndarray]


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


def _standard_name(name: str) -> str:
    name = name.removeprefix("module.").replace(".shortcut.", ".downsample.")
    return f"fc.{name.removeprefix('linear.')}" if name.startswith("linear.") else name


def import_state_dict(network: Architecture, tensors: Tensors) -> Variables:
    """Return the variables of ``network`` from a state dict, in float32.

    Args:
        network: The configuration that the weights were trained for.
        tensors: Arrays by name; half-precision ones are widened, ``num_batches_tracked`` is ignored.

    Raises:
        WeightsError: Names are missing, unexpected, misshapen or given twice, or values are not finite.
    """
    entries = _entries(network)
    given = {name: _standard_name(name) for name in tensors if not name.endswith("num_batches_tracked")}
    found = {standard: np.asarray(tensors[name]) for name, standard in given.items()}
    if len(found) < len(given):
        times = Counter(given.values())
        twice = sorted(name for name, standard in given.items() if times[standard] > 1)
        raise WeightsError(f"weights: expected every tensor once, got {', '.join(twice)}")
    abstract = jax.eval_shape(lambda: init(network, jax.random.key(0)))
    expected = {name: _torch_shape(_leaf(abstract[e.block], e.path).shape, e.axes) for name, e in entries.items()}
    biases = {bias: mean for bias, mean in _absorbed(network).items() if bias in found}
    expected |= {bias: expected[mean] for bias, mean in biases.items()}
    if problems := describe_mismatch(expected, {name: str(list(v.shape)) for name, v in found.items()}):
        raise WeightsError(f"weights: these are not the network's tensors. {problems}")
    if bad := sorted(name for name, v in found.items() if not np.isfinite(np.asarray(v, np.float32)).all()):
        raise WeightsError(f"weights: expected finite values, got NaN or infinity in {', '.join(bad)}")
    for bias, mean in biases.items():
        found[mean] = np.asarray(found[mean], np.float32) - np.asarray(found[bias], np.float32)
    variables: list[dict[str, Any]] = [{} for _ in range(network.depth + 1)]
    for name, entry in entries.items():
        node = variables[entry.block]
        for part in entry.path[:-1]:
            node = node.setdefault(part, {})
        node[entry.path[-1]] = np.ascontiguousarray(found[name].transpose(entry.axes), dtype=np.float32)
    return tuple(variables)


def _torch_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> str:
    return str([shape[i] for i in np.argsort(axes)])


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:  # noqa: ANN401
    return functools.reduce(operator.getitem, path, tree)


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
        with _safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if path.suffix in {".pth", ".pt"}:
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
    if not Path(path).is_file():
        raise WeightsError(f"weights: no such file: {path}")
    return Path(path)


@contextlib.contextmanager
def _safetensors(path: Path) -> Generator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        raise WeightsError(f"weights: {path} is not a readable safetensors file ({error})") from error


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise WeightsError(
            f"weights: reading {path.name} needs torch (pip install 'gati-jax[torch]'), or convert it to safetensors"
        ) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise WeightsError(f"weights: {path} could not be read as weights only ({error})") from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise WeightsError(f"weights: {path} does not hold a state dict of tensors")
    return {str(name): tensor.detach().float().numpy() for name, tensor in tensors.items()}
