"""Inputs as the page shows them: images, recordings as spectrograms, other rows of numbers as lines, tokens."""

import base64
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from PIL import Image
from scipy.signal import spectrogram

from gati_jax.data import Images, take

SIDE = 72  # of a larger image; smaller ones are enlarged by the browser
CHANNELS, MOST_TOKENS = {1, 3}, 48
FEWEST_VALUES, FEWEST_SAMPLES = 256, 2000  # of a line, and of a spectrogram
_WINDOW, _COLUMNS = 256, 144
_LINE = (217, 100, 40, 255)  # seen on light and on dark paper
_RELATED = 0.3  # least correlation of neighbours in a recording


class Wall(NamedTuple):
    """Pictures by row as data URIs, or texts, and why there are none."""

    pictures: Mapping[int, str]
    kind: str = "image"
    missing: str = ""
    texts: Mapping[int, str] = {}
    note: str = ""
    """What is to be seen, where it is not plain."""


def draw_wall(images: Images, rows: Sequence[int]) -> Wall:
    """Draw the inputs of some rows, or write them as text.

    Args:
        images: All inputs, [n, ...].
        rows: Which to show.
    """
    shape, dtype = tuple(images.shape[1:]), np.dtype(images.dtype)
    if not rows:
        return Wall({}, missing="There are no requests to show.")
    inputs = np.asarray(take(images, np.array(rows)))
    if dtype.kind in "iu" and len(shape) == 1:
        note = "Inputs are numbers of tokens: a bundle holds no vocabulary. Zeros at the end are left out."
        texts = dict(zip(rows, map(_tokens, inputs), strict=True))
        return Wall({}, kind="tokens", texts=texts, note=note)
    if dtype.kind in "fiu" and len(shape) == 3 and shape[2] in CHANNELS:  # noqa: PLR2004 (height, width, channels)
        return Wall(_by_row(rows, _as_pixels(inputs)))
    if dtype.kind == "f" and max(shape, default=0) == np.prod(shape) >= FEWEST_VALUES:
        signals = np.nan_to_num(inputs.reshape(len(inputs), -1).astype(np.float32))
        if signals.shape[1] >= FEWEST_SAMPLES and _are_recordings(signals):
            return Wall(
                _by_row(rows, map(_spectrogram, signals)), "spectrogram", note="They are drawn as spectrograms."
            )
        note = "They are drawn as lines: their values in order, each from its least to its largest."
        return Wall(_by_row(rows, map(_line, signals)), "line", note=note)
    return Wall({}, missing=f"Inputs of {dtype}{list(shape)} are neither images, recordings nor tokens: none is shown.")


def _by_row(rows: Sequence[int], drawn: Iterable[np.ndarray]) -> dict[int, str]:
    return dict(zip(rows, map(_png, drawn), strict=True))


def _tokens(row: np.ndarray) -> str:
    """Write the numbers of a row: the first ones, without what pads it."""
    kept = np.trim_zeros(row, "b").tolist()
    more = f" … ({len(kept):,} in all)" if len(kept) > MOST_TOKENS else ""
    return " ".join(map(str, kept[:MOST_TOKENS])) + more or "0"


def _are_recordings(signals: np.ndarray) -> bool:
    """Tell recordings from other rows of numbers: these swing about zero, and neighbours are related."""
    swing = np.abs(signals.mean(1)) < 0.2 * signals.std(1) + 1e-12
    centred = signals - signals.mean(1, keepdims=True)
    related = np.abs((centred[:, 1:] * centred[:, :-1]).mean(1)) > _RELATED * centred.var(1)
    return bool(np.median(swing & related) > 0)


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


def _line(values: np.ndarray) -> np.ndarray:
    """Return values in order as an image: every column reaches from the least to the largest of its part."""
    low, high = float(values.min()), float(values.max())
    heights = (SIDE - 1) * (1 - (values - low) / max(high - low, 1e-9))
    picture = np.zeros((SIDE, _COLUMNS, 4), np.uint8)
    edges = np.linspace(0, len(values) - 1, _COLUMNS + 1).astype(int)
    for column, (start, end) in enumerate(itertools.pairwise(edges)):
        part = heights[start : end + 1]
        picture[int(part.min()) : int(part.max()) + 1, column] = _LINE
    return picture


def _png(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((_COLUMNS, SIDE) if image.mode == "RGBA" else (SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
