"""Random crops, flips and cutouts on the device."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, Shaped

from gati_jax._errors import InputError

Images = Shaped[Array, "batch *input"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """What may be done to a training image.

    Args:
        pad: Pixels by which the picture may shift in each direction; what moves in is zero.
        flip: Whether half of the pictures are mirrored left to right.
    """

    pad: int = 0
    flip: bool = False

    def __call__(self, key: PRNGKeyArray, images: Images) -> Images:
        """Augment every image[height, width, channels] on its own; without options, take any input.

        Raises:
            InputError: There are options, but the inputs are not images.
        """
        if not (self.pad or self.flip):
            return images
        if images.ndim != 4:  # noqa: PLR2004
            msg = f"augment: expected images[batch, height, width, channels] to shift or flip, got {list(images.shape)}"
            raise InputError(msg)
        crop_key, flip_key = jax.random.split(key)
        batch, *shape = images.shape
        if self.pad:
            padded = jnp.pad(images, ((0, 0), (self.pad, self.pad), (self.pad, self.pad), (0, 0)))
            corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * self.pad + 1)
            images = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), shape))(padded, corners)
        if self.flip:
            flipped = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
            images = jnp.where(flipped, images[:, :, ::-1], images)
        return images


def cutout(key: PRNGKeyArray, images: Images, size: int) -> Images:
    """Set a square to zero in every image (DeVries and Taylor, arXiv:1708.04552); zero is the mean once normalised.

    Args:
        key: Draws the squares' centres, anywhere in the picture: part of a square may lie outside.
        images: [batch, height, width, channels].
        size: Side of the square in pixels; 0 leaves the images as they are.
    """
    if not size:
        return images
    batch, height, width, _ = images.shape
    rows, columns = (
        jax.random.randint(k, (batch, 1), 0, n) for k, n in zip(jax.random.split(key), (height, width), strict=True)
    )

    def inside(centre: Array, n: int) -> Array:
        at = jnp.arange(n).reshape(1, n) - centre + size // 2
        return (at >= 0) & (at < size)  # bool[batch, n]

    square = inside(rows, height)[:, :, None, None] & inside(columns, width)[:, None, :, None]
    return jnp.where(square, jnp.zeros((), images.dtype), images)
