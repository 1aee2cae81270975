"""Pictures in files, decoded, resized and cropped as torchvision evaluates; ``listing`` finds the files.

torchvision resizes by Pillow, whose filters are antialiased; OpenCV's are not, and give other pixels. Files may be
anything: sizes have bounds, and only JPEG, PNG and WebP decoders are asked.
"""

import dataclasses
import io
import os
import stat
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from gati_jax.errors import InputError, printable

from .streaming import Source

_FORMATS = ("JPEG", "PNG", "WEBP")
_DEEP = ("I", "F")  # modes of more than 8 bits a channel
_MOST_PIXELS, _MOST_BYTES = 2**26, 2**28  # of one picture; eight threads decode one each
Interpolation = Literal["bilinear", "bicubic", "lanczos", "box", "nearest"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """Pillow's resize and a centre crop, as ``torchvision.transforms.Resize`` and ``CenterCrop``.

    Args:
        resize: The shorter side, or (height, width).
        crop: The side of a square, or (height, width); zeros surround a smaller picture.
        interpolation: Pillow's filter.
        channels: 1 (grey) or 3 (RGB); None leaves arrays as they are, and makes pictures RGB.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"
    channels: Literal[1, 3] | None = None

    def picture(self, encoded: bytes, origin: str) -> UInt8[np.ndarray, "height width channels"]:
        """Decode a JPEG, PNG or WebP file, and transform it.

        Raises:
            InputError: It is damaged, too large or of another kind; names ``origin``.
        """
        image_module = pillow()
        try:
            with image_module.open(io.BytesIO(encoded), formats=_FORMATS) as image:
                _check_pixels(*image.size)
                _check_depth(image.mode)
                return self._transformed(image.convert("L" if self.channels == 1 else "RGB"))
        except InputError as error:
            raise InputError(f"{origin}: {error}") from error
        except Exception as error:  # Pillow raises many kinds for damaged files
            what = "JPEG, PNG or WebP" if isinstance(error, image_module.UnidentifiedImageError) else "that can be read"
            reason = "another file" if what.startswith("JPEG") else printable(str(error)) or type(error).__name__
            raise InputError(f"{origin}: expected a picture {what}, got {reason}") from error

    def array(self, image: np.ndarray, origin: str) -> np.ndarray:
        """Transform uint8[height, width, channels]; without options, return any array as it is.

        Raises:
            InputError: There are options, but it is no picture of 1 or 3 channels.
        """
        if self == Transform(interpolation=self.interpolation):
            return image
        if image.dtype != np.uint8 or image.ndim != len("hwc") or image.shape[-1] not in {1, 3}:
            expected, got = "uint8[height, width, 1 or 3] to resize or crop", f"{image.dtype}{[*image.shape]}"
            raise InputError(f"{origin}: expected {expected}, got {got}")
        opened = pillow().fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        mode = {None: opened.mode, 1: "L", 3: "RGB"}[self.channels]
        return self._transformed(opened.convert(mode))

    def _transformed(self, image: Any) -> UInt8[np.ndarray, "height width channels"]:  # noqa: ANN401 (optional module)
        width, height = image.size
        if isinstance(self.resize, int):
            longer = int(self.resize * max(width, height) / min(width, height))
            height, width = (self.resize, longer) if height <= width else (longer, self.resize)
        elif self.resize is not None:
            height, width = self.resize
        _check_pixels(width, height)
        if (width, height) != image.size:
            image = image.resize((width, height), pillow().Resampling[self.interpolation.upper()])
        if self.crop is not None:
            rows, columns = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
            top, left = (_offset(*sides) for sides in ((height, rows), (width, columns)))
            image = image.crop((left, top, left + columns, top + rows))
        array = np.asarray(image)
        return array if array.ndim == len("hwc") else array[..., None]


def _offset(side: int, wanted: int) -> int:
    """Return where a centre crop begins, rounded as torchvision does; below 0, zeros come before the picture."""
    return round((side - wanted) / 2) if side >= wanted else -((wanted - side) // 2)


def _check_pixels(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise InputError(f"expected at most {_MOST_PIXELS // 10**6} million pixels, got {width} x {height}")


def _check_depth(mode: str) -> None:
    if mode.startswith(_DEEP):
        raise InputError(f"expected 8 bits a channel, for Pillow would clip more, got a picture of mode {mode}")


def pillow() -> Any:  # noqa: ANN401 (an optional module)
    """Return ``PIL.Image``."""
    try:
        from PIL import Image  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise InputError('data.name: pictures need Pillow (pip install "gati-jax[train]")') from error
    return Image


class Pictures:
    """Picture files as a ``Source``, all of one size once they are transformed."""

    def __init__(self, paths: Sequence[str], transform: Transform) -> None:
        """Read nothing yet."""
        self._paths, self._transform = paths, transform
        self._shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._paths)

    def __getitem__(self, index: int, /) -> UInt8[np.ndarray, "height width channels"]:
        """Read one file."""
        path = self._paths[index]
        image = self._transform.picture(read_regular(path), path)
        self._shape = self._shape or image.shape
        if image.shape != self._shape:
            got = f"{[*image.shape]} in {path}, others have {[*self._shape]}"
            raise InputError(f"data.name: expected pictures of one size, got {got}: set data.resize and data.crop")
        return image


def read_regular(path: str) -> bytes:
    """Read a whole file that is no device, pipe or socket, and not too large.

    Raises:
        InputError: It is, or it cannot be read; names it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
                raise InputError(f"{path}: expected a regular file of at most {_MOST_BYTES >> 20} MB")
            return file.read(_MOST_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{printable(path)}: cannot be read: {reason}") from error


class Transformed:
    """A source of arrays or (array, label) with each image transformed."""

    def __init__(self, source: Source, transform: Transform, name: str) -> None:
        """Read nothing yet."""
        self.wrapped, self._transform, self._name = source, transform, name

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.wrapped)

    def __getitem__(self, index: int, /) -> Any:  # noqa: ANN401 (see Source)
        """Return one row."""
        record, origin = self.wrapped[index], f"data.name: row {index} of {self._name}"
        if isinstance(record, dict):
            return record | {"image": self._transform.array(np.asarray(record["image"]), origin)}
        if isinstance(record, tuple):
            return self._transform.array(np.asarray(record[0]), origin), *record[1:]
        return self._transform.array(np.asarray(record), origin)
