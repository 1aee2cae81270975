"""Spellings of state dicts: what wrappers put before a name, and other libraries' names for the same tensors.

The standard names are torchvision's for ResNets and VGGs, timm's for ViTs and Hugging Face's for BERTs, whose queries,
keys and values are joined as timm joins them.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from gati_jax.errors import WeightsError, listed

from .architectures import AnyNetwork, ResNet
from .transformers import Bert, ViT

Tensors = Mapping[str, np.ndarray]
_Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]

WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Of DataParallel, torch.compile and Lightning."""
_NOT_WEIGHTS = re.compile(r"(num_batches_tracked|embeddings\.(position_ids|token_type_ids|mask_token))$")
"""Counters, constants, and a token that only pretraining uses."""


def _convolution(found: re.Match[str]) -> str:
    stage, block, kind, part = int(found[1]) + 1, found[2], found[3], found[4]
    if kind == "shortcut":
        return f"layer{stage}.{block}.downsample.{0 if part == 'convolution' else 1}."
    name = "conv" if part == "convolution" else "bn"
    return f"layer{stage}.{block}.{name}{int(kind.rpartition('.')[2]) + 1}."


_RESNET: _Rules = (
    (r"^resnet\.embedder\.embedder\.convolution\.", "conv1."),  # Hugging Face's
    (r"^resnet\.embedder\.embedder\.normalization\.", "bn1."),
    (
        r"^resnet\.encoder\.stages\.(\d{1,3})\.layers\.(\d{1,3})\.(shortcut|layer\.\d)\.(convolution|normalization)\.",
        _convolution,
    ),
    (r"^classifier\.1\.", "fc."),
    (r"\.shortcut\.", ".downsample."),  # the CIFAR sources'
    (r"^linear\.", "fc."),
)
_VIT: _Rules = (
    (r"^vit\.embeddings\.cls_token$|^class_token$", "cls_token"),  # Hugging Face's, torchvision's
    (r"^vit\.embeddings\.position_embeddings$|^encoder\.pos_embedding$", "pos_embed"),
    (r"^vit\.embeddings\.patch_embeddings\.projection\.|^conv_proj\.", "patch_embed.proj."),
    (r"^vit\.(encoder\.layer|layers)\.|^encoder\.layers\.encoder_layer_", "blocks."),
    (r"^vit\.layernorm\.|^encoder\.ln\.", "norm."),
    (r"^classifier\.|^heads\.head\.", "head."),
    (r"\.(layernorm_before|ln_1)\.", ".norm1."),
    (r"\.(layernorm_after|ln_2)\.", ".norm2."),
    (r"\.attention\.(attention\.)?(query|key|value)\.", r".attn.\2."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.attention\.(output\.dense|o_proj)\.|\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.0|mlp\.linear_1)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.3|mlp\.linear_2)\.", ".mlp.fc2."),
)
_BERT: _Rules = (
    (r"\.LayerNorm\.gamma$", ".LayerNorm.weight"),  # of files that were converted from TensorFlow
    (r"\.LayerNorm\.beta$", ".LayerNorm.bias"),
    (r"\.attention\.self\.(query|key|value)\.", r".attention.\1."),
)
_JOINED = re.compile(r"\.(query|key|value)\.(weight|bias)$")


def standard_names(network: type[AnyNetwork] | AnyNetwork, tensors: Tensors) -> dict[str, np.ndarray]:
    """Return a state dict under the standard names.

    Args:
        network: Of which kind the network is.
        tensors: Arrays by name; counters and constants are left out.

    Raises:
        WeightsError: Two names stand for one tensor.
    """
    kind = network if isinstance(network, type) else type(network)
    rules = {ResNet: _RESNET, ViT: _VIT, Bert: _BERT}.get(kind, ())
    names = [name for name in tensors if not is_no_weight(name)]
    given = {name: _renamed(name, rules) for name in names}
    times = Counter(given.values())
    if twice := sorted(name for name, standard in given.items() if times[standard] > 1):
        raise WeightsError(f"weights: expected every tensor once, got {listed(twice)}")
    return _join({standard: np.asarray(tensors[name]) for name, standard in given.items()})


def is_no_weight(name: str) -> bool:
    """Return whether a tensor of this name is none of a network's weights."""
    return _NOT_WEIGHTS.search(name) is not None


def is_hugging_face(names: Iterable[str]) -> bool:
    """Return whether tensors are named as Hugging Face names a ViT's."""
    return any(_unwrapped(name).startswith("vit.") for name in names)


def _renamed(name: str, rules: _Rules) -> str:
    name = _unwrapped(name)
    for pattern, standard in rules:
        name = re.sub(pattern, standard, name)
    return name


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _join(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Join queries, keys and values; three that are not alike are left as they are, and so refused by name."""
    joined = dict(tensors)
    for name in tensors:
        if (found := _JOINED.search(name)) is None or found[1] != "query":
            continue
        three = [f"{name[: found.start()]}.{part}.{found[2]}" for part in ("query", "key", "value")]
        arrays = [tensors[each] for each in three if each in tensors]
        if len({(array.shape, array.dtype) for array in arrays}) == 1 and len(arrays) == 3 and arrays[0].ndim:  # noqa: PLR2004
            for each in three:
                del joined[each]
            joined[f"{name[: found.start()]}.qkv.{found[2]}"] = np.concatenate(arrays)
    return joined
