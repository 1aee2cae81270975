"""What happens to cameras: brightness, blur and noise at severities 1 to 5.

Their strengths are those of CIFAR-10-C (Hendrycks and Dietterich, arXiv:1903.12261).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from scipy.ndimage import gaussian_filter

Images = UInt8[np.ndarray, "n h w c"]
MOST_SEVERE = 5
_BRIGHTER = (0.05, 0.1, 0.15, 0.2, 0.3)  # added to the value in HSV
_BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)  # standard deviation in pixels
_NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)  # standard deviation, of 0 .. 1


def brightness(images: Images, severity: int, random: np.random.Generator) -> Images:
    """Raise the value of every pixel; hue and saturation stay."""
    del random  # it is the same for all
    x = images.astype(np.float32) / 255
    value = x.max(-1, keepdims=True)
    brighter = np.minimum(value + np.float32(_BRIGHTER[severity - 1]), 1)
    return _to_bytes(np.where(value > 0, x * brighter / np.maximum(value, 1e-6), brighter))


def blur(images: Images, severity: int, random: np.random.Generator) -> Images:
    """Blur by a Gaussian, every channel by itself."""
    del random  # it is the same for all
    sigma = _BLUR[severity - 1]
    return _to_bytes(gaussian_filter(images.astype(np.float32) / 255, (0, sigma, sigma, 0)))


def noise(images: Images, severity: int, random: np.random.Generator) -> Images:
    """Add Gaussian noise, to every value by itself."""
    drawn = random.standard_normal(images.shape, np.float32)
    return _to_bytes(images.astype(np.float32) / 255 + np.float32(_NOISE[severity - 1]) * drawn)


CORRUPTIONS: dict[str, Callable[[Images, int, np.random.Generator], Images]] = {
    "brightness": brightness,
    "blur": blur,
    "noise": noise,
}


def _to_bytes(x: np.ndarray) -> Images:
    return np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)
