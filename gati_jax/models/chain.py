"""A base as a chain: N blocks and a classifier, pure functions of their parameters; all that a cache sees of it."""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Annotated, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num, PyTree, Shaped
from pydantic import Field, FiniteFloat

from gati_jax.errors import InputError
from gati_jax.options import Positive, check_options
from gati_jax.pytrees import register_pytree, tree_bytes

Block = Callable[[Any, Array], Array]
"""``block(params, x[batch, ...]) -> y[batch, ...]``, pure; equal blocks share compiled programs."""
_INPUT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalization:
    """How uint8 pixels become inputs: ``(pixel * scale - mean) / std``, by channel, as in the base's training."""

    mean: Annotated[tuple[FiniteFloat, ...], Field(description="of each channel, after scaling")]
    std: Annotated[tuple[Positive, ...], Field(description="of each channel, after scaling")]
    scale: Annotated[FiniteFloat, Field(description="factor of the pixels before")] = 1 / 255

    def __post_init__(self) -> None:
        """Check the options, and that there are as many means as standard deviations."""
        check_options(self)
        if len(self.mean) != len(self.std) or not self.std:
            raise InputError(
                f"normalization: expected as many means as standard deviations, got {self.mean} and {self.std}"
            )

    def __call__(self, pixels: Shaped[Array | np.ndarray, "*batch height width channels"]) -> Array:
        """Normalise ``pixels``, uint8[..., height, width, channels], to float32."""
        mean, std = (np.asarray(v, np.float32).reshape((1,) * (pixels.ndim - 1) + (-1,)) for v in (self.mean, self.std))
        return (jnp.asarray(pixels, jnp.float32) * self.scale - mean) / std


@register_pytree(
    leaves="params", static=("blocks", "classifier", "input_spec", "normalization", "network", "input_name")
)
@dataclasses.dataclass(frozen=True)
class Chain:
    """A frozen classifier as N blocks followed by a classifier.

    Site k is what enters block k + 1 (site 0 is the input); exit N is the base itself. The parameters are the only
    leaves, so new parameters of the same shapes never recompile a program.

    Args:
        blocks: N pure functions, ``block(params, x[batch, ...]) -> y[batch, ...]``.
        classifier: A pure function, ``classifier(params, x[batch, ...]) -> logits[batch, classes]``.
        params: N + 1 pytrees: one for each block, then the classifier's.
        input_spec: Shape and dtype of one prepared input, without the batch dimension.
        normalization: How uint8 inputs become prepared ones; None if the chain takes prepared inputs only.
        network: The configuration by which a bundle can rebuild the blocks; None for a user's own functions.
        input_name: What a server calls the input in requests.

    Raises:
        InputError: ``params`` has not one entry for each block and the classifier.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> double = lambda params, x: x * params
        >>> spec = jax.ShapeDtypeStruct((4,), "float32")
        >>> chain = Chain((double, double), lambda params, x: x @ params, (2.0, 3.0, jnp.eye(4)), spec)
        >>> len(chain), chain(jnp.ones((1, 4))).tolist()
        (2, [[6.0, 6.0, 6.0, 6.0]])
    """

    blocks: Sequence[Block]  # kept as a tuple, like params
    classifier: Block
    params: Sequence[PyTree]
    input_spec: jax.ShapeDtypeStruct
    normalization: Normalization | None = None
    network: Hashable = None
    input_name: str = "images"

    def __post_init__(self) -> None:
        """Check the lengths; a pytree that is unflattened does not come through here."""
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "params", tuple(self.params))
        if not self.blocks or len(self.params) != len(self.blocks) + 1:
            expected = f"one entry for each of {len(self.blocks)} blocks and one for the classifier"
            raise InputError(f"params: expected {expected}, got {len(self.params)}")
        if self.normalization and len(self.normalization.mean) not in {1, self.input_spec.shape[-1]}:
            raise InputError(
                f"normalization: expected {self.input_spec.shape[-1]} channels, got {len(self.normalization.mean)}"
            )
        if not _INPUT_NAME.fullmatch(self.input_name):
            raise InputError(
                f"input_name: expected up to 100 letters, digits, dots, dashes or underscores, got {self.input_name!r}"
            )

    def __repr__(self) -> str:
        """Describe it in a line."""
        network = "functions of your own" if self.network is None else type(self.network).__name__
        spec, pixels = self.input_spec, "" if self.normalization is None else " or pixels"
        return (
            f"Chain({len(self.blocks)} blocks of {network}; {self.input_name}: {spec.dtype}{list(spec.shape)}{pixels})"
        )

    def __len__(self) -> int:
        """Return N, the number of blocks."""
        return len(self.blocks)

    def span(self, x: Num[Array, "batch *in"], start: int, stop: int) -> Num[Array, "batch *out"]:
        """Run blocks start + 1 to stop: from site ``start`` to site ``stop``."""
        for block, params in zip(self.blocks[start:stop], self.params[start:stop], strict=True):
            x = block(params, x)
        return x

    def classify(self, x: Num[Array, "batch *in"]) -> Num[Array, "batch classes"]:
        """Return the logits for the output of block N."""
        return self.classifier(self.params[-1], x)

    def __call__(self, x: Num[Array, "batch *in"]) -> Num[Array, "batch classes"]:
        """Return the base's logits for prepared inputs."""
        return self.classify(self.span(x, 0, len(self)))

    def activations(self, x: Num[Array, "batch *in"]) -> tuple[list[Array], Num[Array, "batch classes"]]:
        """Return the activations at sites 0 .. N - 1 and the logits, in one pass."""
        sites = [x]
        for k in range(len(self)):
            sites.append(self.span(sites[k], k, k + 1))
        return sites[:-1], self.classify(sites[-1])

    def prepare(self, images: Shaped[Array | np.ndarray, "batch *in"]) -> Num[Array, "batch *in"]:
        """Normalise uint8 images; pass prepared inputs through."""
        if self.normalization is not None and images.dtype == jnp.uint8:
            return self.normalization(images)
        return jnp.asarray(images)

    @functools.cached_property
    def site_specs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape and dtype of one sample's activation at sites 0 .. N - 1."""
        batch = jax.ShapeDtypeStruct((1, *self.input_spec.shape), self.input_spec.dtype)
        sites, _ = jax.eval_shape(Chain.activations, self, batch)
        return tuple(jax.ShapeDtypeStruct(site.shape[1:], site.dtype) for site in sites)

    @property
    def bytes(self) -> int:
        """The memory that the parameters take."""
        return tree_bytes(self.params)

    @functools.cached_property
    def classes(self) -> int:
        """The number of classes."""
        batch = jax.ShapeDtypeStruct((1, *self.input_spec.shape), self.input_spec.dtype)
        return jax.eval_shape(Chain.__call__, self, batch).shape[-1]


def check_images(chain: Chain, images: Any, *, batched: bool = True, argument: str = "images") -> np.ndarray:  # noqa: ANN401
    """Return ``images`` as an array that ``chain`` can take.

    Args:
        chain: The base.
        images: uint8 pixels (if the chain has a normalization) or prepared inputs of ``chain.input_spec``'s dtype.
        batched: Whether a leading batch dimension is expected.
        argument: The name to use in messages.

    Raises:
        InputError: The shape, the dtype or a value (NaN, infinity) is not what the chain takes.
    """
    try:
        array = np.asarray(images)
    except ValueError as error:
        raise InputError(f"{argument}: expected an array, got rows of different lengths") from error
    spec = chain.input_spec
    if array.shape[1 if batched else 0 :] != spec.shape or (batched and array.ndim == len(spec.shape)):
        batch = "batch, " if batched else ""
        expected = f"[{batch}{', '.join(map(str, spec.shape))}]"
        raise InputError(f"{argument}: expected shape {expected}, got {list(array.shape)}")
    if chain.normalization is not None and array.dtype == np.uint8:
        return array
    if array.dtype != spec.dtype:
        pixels = "uint8 pixels or " if chain.normalization is not None else ""
        raise InputError(f"{argument}: expected {pixels}{spec.dtype}, got {array.dtype}")
    if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
        raise InputError(f"{argument}: expected finite values, got NaN or infinity")
    return array


F = TypeVar("F", bound=Callable)


def reference(function: F) -> F:
    """Return ``function`` with the arithmetic that base answers are defined by: true float32 products.

    By default GPUs and TPUs round the factors of float32 products.
    """
    return jax.default_matmul_precision("highest")(function)
