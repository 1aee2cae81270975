"""Networks from the configs that transformers writes, which are untrusted."""

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from gati_jax.errors import InputError

from .architectures import AnyNetwork, ResNet
from .transformers import Bert, ViT

EPSILON = 1e-12
"""Of layer norms, where a config does not say."""


def network_of_config(config: Mapping[str, Any], images: Mapping[str, Any]) -> AnyNetwork:
    """Return the network that a config of transformers describes, checked as that of a bundle is."""
    kind = config.get("model_type")
    if (build := _HUGGING_FACE.get(str(kind))) is None:
        raise InputError(f"source: expected a config of a {', '.join(_HUGGING_FACE)}, got model_type {kind!r:.100}")
    classes = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
    found = build(config, images) | {"classes": classes}
    other = {"hidden_act": "relu" if kind == "resnet" else "gelu", **_UNSUPPORTED}
    for key, value in other.items():
        if config.get(key, value) != value:
            raise InputError(f"source: expected a network with {key} {value!r}, got {config[key]!r:.100}")
    return TypeAdapter(_KINDS[str(kind)]).validate_python(found)


_UNSUPPORTED = {
    "qkv_bias": True,
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
    "is_decoder": False,
    "position_embedding_type": "absolute",
}
"""Keys of variants that are not built here, and their values otherwise."""


def _encoder_of(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": config.get("hidden_size", 768),
        "depth": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", 12),
        "hidden": config.get("intermediate_size", 3072),
        "epsilon": config.get("layer_norm_eps", EPSILON),
    }


def _sides(size: Any) -> tuple[int, int]:  # noqa: ANN401 (of a config)
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width


def _vit_of(config: Mapping[str, Any], _: Mapping[str, Any]) -> dict[str, Any]:
    shape = (*_sides(config.get("image_size", 224)), config.get("num_channels", 3))
    patch = _sides(config.get("patch_size", 16))[0]
    return {"patch": patch, "input_shape": shape, **_encoder_of(config)}


def _bert_of(config: Mapping[str, Any], _: Mapping[str, Any]) -> dict[str, Any]:
    positions = config.get("max_position_embeddings", 512)
    return {
        "vocabulary": config.get("vocab_size", 30_522),
        "length": positions,
        "positions": positions,
        "segments": config.get("type_vocab_size", 2),
        "padding": config.get("pad_token_id") or 0,
        **_encoder_of(config),
    }


def _resnet_of(config: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    widths = config.get("hidden_sizes", [256, 512, 1024, 2048])
    bottleneck = config.get("layer_type", "bottleneck") == "bottleneck"
    widths = [width // 4 for width in widths] if bottleneck else widths
    if config.get("embedding_size", 64) != widths[0]:
        raise InputError(f"source: expected an embedding_size of {widths[0]}, got {config['embedding_size']!r:.100}")
    sides = _sides(images.get("crop_size") or images.get("size") or 224)
    return {
        "stages": config.get("depths", [3, 4, 6, 3]),
        "widths": widths,
        "bottleneck": bottleneck,
        "stem": 7,
        "input_shape": (*sides, config.get("num_channels", 3)),
    }


_HUGGING_FACE = {"resnet": _resnet_of, "vit": _vit_of, "bert": _bert_of}
_KINDS: dict[str, Any] = {"resnet": ResNet, "vit": ViT, "bert": Bert}
