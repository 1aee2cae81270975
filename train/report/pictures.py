"""Inputs as small pictures in the page: images as they are, recordings as spectrograms."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from PIL import Image
from scipy.signal import spectrogram

from gati_jax.data import Images, take

SIDE = 72  # of a larger image; smaller ones are enlarged by the browser
FEWEST_SAMPLES, CHANNELS = 2000, {1, 3}
_WINDOW = 256


class Wall(NamedTuple):
    """Pictures by row as data URIs, and why there are none."""

    pictures: Mapping[int, str]
    kind: str = "image"
    missing: str = ""


def draw_wall(images: Images, rows: Sequence[int]) -> Wall:
    """Draw the inputs of some rows, if they can be shown as pictures.

    Args:
        images: All inputs, [n, ...].
        rows: Which to draw.
    """
    shape, dtype = tuple(images.shape[1:]), np.dtype(images.dtype)
    if not rows:
        return Wall({}, missing="There are no requests to show.")
    if dtype.kind in "iu" and len(shape) == 1:
        return Wall({}, missing="Inputs are tokens, and the page has no tokenizer to turn them into text.")
    inputs = np.asarray(take(images, np.array(rows)))
    if dtype.kind in "fiu" and len(shape) == 3 and shape[2] in CHANNELS:  # noqa: PLR2004 (height, width, channels)
        drawn, kind = [_png(pixels) for pixels in _as_pixels(inputs)], "image"
    elif dtype.kind == "f" and _samples(shape) >= FEWEST_SAMPLES:
        flat = inputs.reshape(len(inputs), -1)
        drawn, kind = [_png(_spectrogram(signal)) for signal in flat], "spectrogram"
    else:
        return Wall({}, missing=f"Inputs of {dtype}{list(shape)} are neither images nor recordings, and are not shown.")
    return Wall(dict(zip(rows, drawn, strict=True)), kind)


def _samples(shape: tuple[int, ...]) -> int:
    """Return the length of a recording of one channel; 0 for other inputs."""
    return shape[0] if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1) else 0  # noqa: PLR2004


def _as_pixels(inputs: np.ndarray) -> np.ndarray:
    """Return images as bytes; those that are not bytes already, or use a part of the range, are stretched together."""
    finite = np.nan_to_num(inputs.astype(np.float32))
    low, high = float(finite.min()), float(finite.max())
    if inputs.dtype == np.uint8:
        low, high = 0.0, (255.0 if high > 127 else high)  # noqa: PLR2004 (digits go up to 16)
    return np.clip((finite - low) / max(high - low, 1e-9) * 255, 0, 255).astype(np.uint8)


def _spectrogram(signal: np.ndarray) -> np.ndarray:
    """Return a recording's spectrogram as an image: time to the right, frequency upwards, loud is bright."""
    _, _, power = spectrogram(np.nan_to_num(signal.astype(np.float32)), nperseg=_WINDOW, noverlap=_WINDOW // 2)
    loudness = 10 * np.log10(power[::-1] + 1e-10)
    low = loudness.max() - 80  # decibels
    scaled = np.clip((loudness - low) / 80, 0, 1)
    return (mpl.colormaps["magma"](scaled)[..., :3] * 255).astype(np.uint8)


def _png(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
