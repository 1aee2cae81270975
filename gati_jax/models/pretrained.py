"""Chains from files: weights of known networks, and folders with a config.json, here or on the Hugging Face hub.

What a call leaves open is taken from the shapes of the tensors, or from what the files say of themselves.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError
from safetensors.numpy import save

from gati_jax.errors import InputError, WeightsError, as_path, check_kind, kind_of, printable
from gati_jax.files import write_atomically
from gati_jax.options import Strict, describe_error

from .architectures import BERTS, NAMES, RESNETS, VGG, VITS, AnyNetwork, ResNet, bert, resnet, vgg, vit
from .chain import Chain, Normalization, check_is_chain, check_normalization
from .hugging_face import EPSILON, network_of_config
from .networks import fold, to_chain, unfold
from .spellings import Tensors, is_hugging_face, standard_names
from .transformers import Bert, ViT
from .weights import (
    classifier_of,
    export_state_dict,
    import_state_dict,
    read_bounded,
    read_metadata,
    read_weights,
)

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_HUB_FILES = (_CONFIG, _PREPROCESSOR, "model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_MOST_SIDE = 4096


def load_network(
    name: str,
    *,
    weights: Path | str,
    classes: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    normalization: Normalization | None = None,
) -> Chain:
    """Return a published network with weights from a file, as a chain.

    Args:
        name: Such as "resnet50", "vgg16", "vit_tiny" or "bert_base".
        weights: A .safetensors file, an index of several, or, with torch, a .pth file. Names may be torchvision's,
            timm's, Hugging Face's or those of ``python -m train.base``, also within DataParallel, torch.compile or
            Lightning.
        classes: How many the classifier should have; by default as many as it has.
        input_shape: Height, width and channels of images, or the number of tokens of texts; by default what the weights
            were made for, as far as they show it: 224 pixels for residual networks with a 7x7 stem, and 32 without.
        normalization: How uint8 pixels become inputs; by default what the file's metadata say, and without them the
            chain takes prepared inputs only.

    Raises:
        InputError: The name is not known, or the network cannot have this ``input_shape``.
        WeightsError: The file is damaged, or does not hold this network's weights.
    """
    kind = next((kind for kind, names in _NAMES.items() if name in names), None)
    if kind is None:
        raise InputError(f"name: expected one of {', '.join((*NAMES, *BERTS))}, got {name!r}")
    check_kind("classes", classes, (int, NoneType), "2 or more")
    if classes is not None and classes < 2:  # noqa: PLR2004
        raise InputError(f"classes: expected 2 or more, got int {classes}")
    check_normalization(normalization)
    shape, said = _check_shape(input_shape), _metadata(weights)
    if said is not None and said.network != name:
        raise WeightsError(f"name: expected {printable(said.network)}, as the metadata of {weights} say, got {name}")
    tensors = read_weights(weights)
    found = standard_names(kind, tensors)
    classes = classes or (said and said.classes) or _length(found, classifier_of(kind)) or 2
    shape = shape or (said and said.input_shape)
    epsilon = EPSILON if is_hugging_face(tensors) else 1e-6
    network = _FITTING[kind](name, found, classes, shape, epsilon)
    return _chain(network, tensors, normalization or (said and said.normalization))


def _chain(network: AnyNetwork, tensors: Tensors, normalization: Normalization | None) -> Chain:
    return to_chain(network, fold(import_state_dict(network, tensors)), normalization)


# --- What tensors show ------------------------------------------------------------------------------------------------


def _shape(tensors: Tensors, name: str, ndim: int) -> tuple[int, ...] | None:
    """Return a tensor's shape if it has that many axes; what is missing is reported where tensors are imported."""
    array = tensors.get(name)
    return array.shape if array is not None and array.ndim == ndim and array.size else None


def _length(tensors: Tensors, layer: str) -> int | None:
    shape = _shape(tensors, f"{layer}.weight", 2)
    return shape[0] if shape else None


def _images(shape: tuple[int, ...] | None, default: tuple[int, int, int]) -> tuple[int, int, int]:
    if shape is None:
        return default
    if len(shape) != 3:  # noqa: PLR2004
        raise InputError(f"input_shape: expected height, width and channels, got {shape}")
    return shape[0], shape[1], shape[2]


def _check_shape(shape: Any) -> tuple[int, ...] | None:  # noqa: ANN401 (checked here)
    """Return a shape that was given, or None; its length depends on the network."""
    if shape is None:
        return None
    if not isinstance(shape, tuple | list) or not all(isinstance(n, int) and 1 <= n <= _MOST_SIDE for n in shape):
        expected = f"height, width and channels, or the number of tokens, each 1 to {_MOST_SIDE}"
        raise InputError(f"input_shape: expected {expected}, got {kind_of(shape)}")
    return tuple(shape)


def _tokens(shape: tuple[int, ...]) -> int:
    if len(shape) != 1:
        raise InputError(f"input_shape: expected the number of tokens, such as (128,), got {shape}")
    return shape[0]


def _resnet(name: str, tensors: Tensors, classes: int, shape: tuple[int, ...] | None, _: float) -> ResNet:
    channels, kernel = (_shape(tensors, "conv1.weight", 4) or (0, 3, 3, 3))[1:3]
    side = 32 if kernel == 3 else 224  # noqa: PLR2004
    network = resnet(name, classes=classes, input_shape=_images(shape, (side, side, channels)))
    projected = any(".downsample.0." in each for each in tensors)
    return dataclasses.replace(
        network,
        stem=3 if kernel == 3 else 7,  # noqa: PLR2004
        shortcut="B" if projected or network.bottleneck else "A",
    )


def _vgg(name: str, tensors: Tensors, classes: int, shape: tuple[int, ...] | None, _: float) -> VGG:
    channels = (_shape(tensors, "features.0.weight", 4) or (0, 3))[1]
    return vgg(name, classes=classes, input_shape=_images(shape, (32, 32, channels)))


def _vit(name: str, tensors: Tensors, classes: int, shape: tuple[int, ...] | None, epsilon: float) -> ViT:
    _, channels, patch, _ = _shape(tensors, "patch_embed.proj.weight", 4) or (0, 3, 16, 16)
    _, tokens, _ = _shape(tensors, "pos_embed", 3) or (0, 197, 0)
    side = max(1, math.isqrt(tokens - 1)) * patch
    network = vit(name, classes=classes, input_shape=_images(shape, (side, side, channels)), patch=patch)
    return dataclasses.replace(network, epsilon=epsilon)


def _bert(name: str, tensors: Tensors, classes: int, shape: tuple[int, ...] | None, _: float) -> Bert:
    tables = [_shape(tensors, f"bert.embeddings.{n}_embeddings.weight", 2) for n in ("word", "position", "token_type")]
    (vocabulary, _), (positions, _), (segments, _) = (table or (2, 0) for table in tables)
    length = positions if shape is None else _tokens(shape)
    network = bert(name, classes=classes, length=1, vocabulary=vocabulary)
    return dataclasses.replace(network, length=length, positions=positions, segments=segments)


_NAMES = {ResNet: RESNETS, VGG: tuple(n for n in NAMES if n.startswith("vgg")), ViT: VITS, Bert: BERTS}
_FITTING = {ResNet: _resnet, VGG: _vgg, ViT: _vit, Bert: _bert}


class _Metadata(BaseModel):
    """What ``python -m train.base`` writes into a file of weights, as far as it matters here."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    gati_jax: Literal["1"]
    network: str
    classes: Json[Annotated[int, Field(ge=2, le=100_000)]]
    input_shape: Json[tuple[int, int, int]]
    normalization: Json[Normalization]


def _metadata(path: Path | str) -> _Metadata | None:
    metadata = read_metadata(path)
    if "gati_jax" not in metadata:
        return None
    try:
        return _Metadata.model_validate(metadata)
    except ValidationError as error:
        first = describe_error(error.errors(include_url=False)[0])
        raise WeightsError(f"weights: the metadata of {path} are damaged: {first}") from error


# --- Folders ----------------------------------------------------------------------------------------------------------


class _Saved(Strict):
    """``config.json`` as ``save_pretrained`` writes it."""

    gati_jax: Literal[1] = 1
    network: AnyNetwork
    normalization: Normalization | None


def save_pretrained(chain: Chain, folder: Path | str) -> None:
    """Write a network of this library as model.safetensors and config.json, for ``from_pretrained``.

    Args:
        chain: As ``load_network`` or ``to_chain`` makes it.
        folder: Is created if need be; files of these names are replaced.

    Raises:
        InputError: The chain is of a user's own functions, or its convolutions were given other algorithms.
    """
    check_is_chain(chain)
    network, folder = chain.network, as_path("folder", folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"folder: expected a folder, got the file {folder}")
    if not isinstance(network, AnyNetwork):
        raise InputError("chain: expected a network of this library, got a chain of other functions")
    plain = to_chain(network, tuple(chain.params))
    if (plain.blocks, plain.classifier) != (chain.blocks, chain.classifier):
        raise InputError("chain: expected the blocks of its network, got others: was it given other algorithms?")
    saved = _Saved(network=network, normalization=chain.normalization)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "model.safetensors", save(export_state_dict(network, unfold(network, chain.params))))
    write_atomically(folder / _CONFIG, saved.model_dump_json(indent=2).encode() + b"\n")


def from_pretrained(
    source: Path | str,
    *,
    input_shape: tuple[int, ...] | None = None,
    normalization: Normalization | None = None,
    revision: str | None = None,
) -> Chain:
    """Return the network of a folder, or of a repository on the Hugging Face hub, as a chain.

    Args:
        source: A folder with a config.json and weights, as ``save_pretrained``, transformers (ResNet, ViT and BERT for
            classification) and timm write it; or the hub's name of one, "owner/name", which takes the extra ``hub``.
        input_shape: By default what the config says. Texts are as long as there are positions.
        normalization: By default what config.json or preprocessor_config.json say.
        revision: Of a repository: a branch, a tag or a commit. A name can be given to other weights later, a commit
            cannot.

    Raises:
        InputError: There is no such folder, or its network is of another kind.
        WeightsError: The files are damaged, or do not belong together.
    """
    check_normalization(normalization)
    folder, input_shape = _folder(as_path("source", source), revision), _check_shape(input_shape)
    config = _read_json(folder / _CONFIG)
    try:
        network, shape, own = _described(config, folder)
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"source: {folder / _CONFIG} is damaged: {_first(error)}") from error
    shape, own = input_shape or shape, normalization or own
    if isinstance(network, str):
        return load_network(network, weights=folder, input_shape=shape, normalization=own)
    return _chain(network if shape is None else _resized(network, shape), read_weights(folder), own)


def _described(
    config: Mapping[str, Any], folder: Path
) -> tuple[AnyNetwork | str, tuple[int, ...] | None, Normalization | None]:
    """Return the network of a config, or its name and the shape of its inputs; and how pixels are normalised."""
    if "gati_jax" in config:
        saved = _Saved.model_validate(config)
        return saved.network, None, saved.normalization
    if "architecture" in config:  # timm's: vit_tiny_patch16_224.augreg_in21k
        name = re.sub(r"(_patch\d+_\d+)?(\..*)?$", "", config["architecture"], count=1)
        data = config.get("pretrained_cfg", {})
        channels, height, width = data.get("input_size", (0, 0, 0))
        shape = (height, width, channels) if channels else None
        return name, shape, _normalization(data, "mean", "std", 1 / 255)
    images = _read_json(folder / _PREPROCESSOR) if (folder / _PREPROCESSOR).is_file() else {}
    network, own = network_of_config(config, images), None
    if images.get("do_normalize", True):
        scale = images.get("rescale_factor", 1 / 255) if images.get("do_rescale", True) else 1.0
        own = _normalization(images, "image_mean", "image_std", scale)
    return network, None, own


def _folder(source: Path, revision: str | None) -> Path:
    if source.is_dir():
        return source
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", str(source)):
        raise InputError(f"source: expected a folder, or owner/name of the Hugging Face hub, got {source}")
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise InputError(
            f"source: there is no folder {source}, and the hub needs huggingface_hub: pip install 'gati-jax[hub]'"
        ) from error
    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(_HUB_FILES)))
    except Exception as error:
        raise InputError(
            f"source: there is no folder {source}, and the hub does not give it: {printable(str(error))}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"source: expected a {path.name} in {path.parent}, got none")
    try:
        found = json.loads(read_bounded(path))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"source: {path} is damaged: {printable(str(error))}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"source: expected an object in {path}, got a {type(found).__name__}")
    return found


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return describe_error(error.errors(include_url=False)[0])
    return printable(f"{type(error).__name__}: {error}")


def _resized(network: AnyNetwork, shape: tuple[int, ...]) -> AnyNetwork:
    if isinstance(network, Bert):
        return dataclasses.replace(network, length=_tokens(shape))
    return dataclasses.replace(network, input_shape=_images(shape, network.input_shape))


def _normalization(data: Mapping[str, Any], mean: str, std: str, scale: float) -> Normalization | None:
    if mean not in data or std not in data:
        return None
    return Normalization(mean=tuple(data[mean]), std=tuple(data[std]), scale=scale)
