"""A base as a chain: N blocks and a classifier, pure functions of their parameters; all that a cache sees of it."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num, PyTree, Shaped
from pydantic import Field, FiniteFloat

from gati_jax.errors import InputError, as_array, check_kind, kind_of, printable
from gati_jax.options import Positive, check_options
from gati_jax.pytrees import is_traced, register_pytree, tree_bytes

from .transformers import Bert

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
        params: N + 1 pytrees of arrays or numbers: one for each block, then the classifier's.
        input_spec: Shape and dtype of one prepared input, without the batch dimension; or its shape, of float32.
        normalization: How uint8 inputs become prepared ones; None if the chain takes prepared inputs only.
        network: The configuration by which a bundle can rebuild the blocks; None for a user's own functions.
        input_name: What a server calls the input in requests.

    Raises:
        InputError: ``params`` has not one entry for each block and the classifier, or holds something else than arrays
            and numbers; an argument is of another kind.

    Example:
        >>> import jax.numpy as jnp
        >>> double = lambda params, x: x * params
        >>> chain = Chain((double, double), lambda params, x: x @ params, (2.0, 3.0, jnp.eye(4)), (4,))
        >>> len(chain), chain(jnp.ones((1, 4))).tolist()
        (2, [[6.0, 6.0, 6.0, 6.0]])
    """

    blocks: tuple[Block, ...]
    classifier: Block
    params: tuple[PyTree, ...]
    input_spec: jax.ShapeDtypeStruct
    normalization: Normalization | None
    network: Hashable
    input_name: str

    def __init__(
        self,
        blocks: Sequence[Block],
        classifier: Block,
        params: Sequence[PyTree],
        input_spec: jax.ShapeDtypeStruct | Sequence[int],
        normalization: Normalization | None = None,
        network: Hashable = None,
        *,
        input_name: str = "images",
    ) -> None:
        """Check and convert the arguments; a pytree that is unflattened does not come through here."""
        blocks = _entries("blocks", blocks, "functions block(params, x[batch, ...])")
        for name, function in (*(("blocks", block) for block in blocks), ("classifier", classifier)):
            if not callable(function):
                raise InputError(f"{name}: expected functions of parameters and a batch, got {kind_of(function)}")
        params, spec = _check_params(params), _check_spec(input_spec)
        if not blocks or len(params) != len(blocks) + 1:
            expected = f"one entry for each of {len(blocks)} blocks and one for the classifier"
            raise InputError(f"params: expected {expected}, got {len(params)}")
        check_normalization(normalization)
        if normalization and len(normalization.mean) not in {1, spec.shape[-1]}:
            raise InputError(f"normalization: expected {spec.shape[-1]} channels, got {len(normalization.mean)}")
        _check_input_name(input_name)
        values = blocks, classifier, params, spec, normalization, network, input_name
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    def __repr__(self) -> str:
        """Describe it in a line."""
        network = "functions of your own" if self.network is None else type(self.network).__name__
        spec, pixels = self.input_spec, "" if self.normalization is None else " or pixels"
        return (
            f"Chain({len(self.blocks)} blocks of {network}; {self.input_name}: {spec.dtype}{list(spec.shape)}{pixels})"
        )

    @classmethod
    def from_layers(
        cls,
        layers: Sequence[Callable[..., Array] | tuple[Block, PyTree]],
        input_spec: jax.ShapeDtypeStruct | Sequence[int],
        *,
        normalization: Normalization | None = None,
        input_name: str = "images",
    ) -> "Chain":
        """Return a chain of layers, each a block; the last is the classifier.

        Args:
            layers: Pairs of a function and its parameters, ``(layer, params)`` for ``layer(params, x[batch, ...])``, or
                functions of x alone, such as ``jax.nn.relu``.
            input_spec: See ``Chain``.
            normalization: See ``Chain``.
            input_name: See ``Chain``.

        Raises:
            InputError: As for ``Chain``; or there are fewer than two layers, or one is neither of both.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> dense = lambda params, x: x @ params
            >>> chain = Chain.from_layers([(dense, jnp.eye(4)), jax.nn.relu, (dense, jnp.ones((4, 2)))], (4,))
            >>> len(chain), chain(jnp.ones((1, 4))).tolist()
            (2, [[4.0, 4.0]])
        """
        functions, params = [], []
        for layer in _entries("layers", layers, "functions of a batch, or pairs of a function and its parameters"):
            pair = layer if isinstance(layer, (tuple, list)) else (layer, ())
            if len(pair) != 2 or not callable(pair[0]):  # noqa: PLR2004
                raise InputError(f"layers: expected a function, or a function and its parameters, got {kind_of(layer)}")
            functions.append(WithoutParams(cast("Any", layer)) if callable(layer) else pair[0])
            params.append(pair[1])
        if len(functions) < 2:  # noqa: PLR2004
            raise InputError(f"layers: expected a block or more and the classifier, got {len(functions)}")
        return cls(functions[:-1], functions[-1], params, input_spec, normalization, input_name=input_name)

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
        return tuple(jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype) for spec in output_specs(self)[: len(self)])

    @property
    def bytes(self) -> int:
        """The memory that the parameters take."""
        return tree_bytes(self.params)

    @functools.cached_property
    def classes(self) -> int:
        """The number of classes."""
        return output_specs(self)[-1].shape[-1]


@dataclasses.dataclass(frozen=True)
class WithoutParams:
    """A function of a batch as a block that has no parameters; equal functions make equal blocks."""

    function: Callable[[Array], Array]

    def __call__(self, params: PyTree, x: Array) -> Array:
        """Apply the function."""
        del params
        return self.function(x)


def check_normalization(given: Any) -> None:  # noqa: ANN401 (checked here)
    """Check that an argument is a normalization, or None.

    Raises:
        InputError: It is something else.
    """
    check_kind("normalization", given, (Normalization, NoneType), "gati_jax.Normalization(mean=..., std=...) or None")


def check_is_chain(given: Any) -> None:  # noqa: ANN401 (checked here)
    """Check that an argument is a chain.

    Raises:
        InputError: It is something else.
    """
    check_kind("chain", given, Chain, "a gati_jax.Chain, as gati_jax.load_network, from_linen, ... return it")


def _check_input_name(given: Any) -> None:  # noqa: ANN401 (checked here)
    if not isinstance(given, str) or not _INPUT_NAME.fullmatch(given):
        raise InputError(
            f"input_name: expected up to 100 letters, digits, dots, dashes or underscores, got {given!r:.200}"
        )


def _entries(argument: str, given: Any, expected: str) -> tuple[Any, ...]:  # noqa: ANN401
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise InputError(f"{argument}: expected a sequence of {expected}, got {type(given).__name__}")
    return tuple(given)


def _check_params(given: Any) -> tuple[PyTree, ...]:  # noqa: ANN401
    """Return parameters in which numbers have become arrays, of the dtypes that a bundle restores."""
    params = _entries("params", given, "pytrees, one for each block and one for the classifier")
    pairs, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = []
    for path, leaf in pairs:
        if isinstance(leaf, (bool, int, float, complex)):
            leaves.append(jnp.asarray(np.asarray(leaf)))
            continue
        dtype = getattr(leaf, "dtype", None) if hasattr(leaf, "shape") else None
        if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_)):
            got = kind_of(leaf) if dtype is None else f"{dtype}{list(leaf.shape)}"
            raise InputError(f"params: expected arrays and numbers, got {got} at {jax.tree_util.keystr(path)}")
        leaves.append(leaf)
    return jax.tree.unflatten(structure, leaves)


def _check_spec(given: Any) -> jax.ShapeDtypeStruct:  # noqa: ANN401
    if isinstance(given, jax.ShapeDtypeStruct):
        return given
    if isinstance(given, (tuple, list)) and all(isinstance(n, int) and n > 0 for n in given):
        return jax.ShapeDtypeStruct(tuple(given), jnp.float32)
    raise InputError(
        "input_spec: expected the shape of one float32 input, such as (28, 28, 1), or"
        f" jax.ShapeDtypeStruct(shape, dtype), got {kind_of(given)}"
    )


ROWS = 8
"""Rows of the batches that show what a chain does."""


def output_specs(chain: Chain) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return shapes and dtypes for a batch of ``ROWS``: at sites 0 .. N - 1, of block N's output, and of the logits.

    Raises:
        InputError: A block fails, or returns something else than one array with the batch first; or the classifier
            something else than logits[batch, classes] of two classes or more.
    """
    spec = chain.input_spec
    specs = [jax.ShapeDtypeStruct((ROWS, *spec.shape), spec.dtype)]
    for i, (function, params) in enumerate(zip((*chain.blocks, chain.classifier), chain.params, strict=True), 1):
        name = f"block {i}" if i <= len(chain) else "the classifier"
        try:
            got = jax.eval_shape(function, params, specs[-1])
        except InputError:
            raise
        except Exception as error:  # a user's function may raise anything
            reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])
            expected = f"functions of a batch of {spec.dtype}{list(spec.shape)}"
            raise InputError(f"chain: expected {expected}, got an error from {name}: {reason}") from error
        if not isinstance(got, jax.ShapeDtypeStruct):
            raise InputError(f"chain: expected {name} to return one array[batch, ...], got {type(got).__name__}")
        if i <= len(chain) and got.shape[:1] != (ROWS,):
            raise InputError(
                f"chain: expected {name} to return an array[batch, ...], got {list(got.shape)} for a batch of {ROWS}"
            )
        specs.append(got)
    if len(got := specs[-1].shape) != 2 or got[0] != ROWS or got[1] < 2:  # noqa: PLR2004
        hint = " (for one sigmoid logit z, return [0, z])" if got in {(ROWS,), (ROWS, 1)} else ""
        raise InputError(
            f"chain: expected logits[batch, classes] of two classes or more, got {list(got)}"
            f" for a batch of {ROWS}{hint}"
        )
    return tuple(specs)


def check_images(chain: Chain, images: Any, *, batched: bool = True, argument: str = "images") -> np.ndarray:  # noqa: ANN401
    """Return ``images`` as an array that ``chain`` can take.

    Args:
        chain: The base.
        images: uint8 pixels (if the chain has a normalization) or prepared inputs of ``chain.input_spec``'s dtype; or
            lists of numbers, which become one of these.
        batched: Whether a leading batch dimension is expected.
        argument: The name to use in messages.

    Raises:
        InputError: The shape, the dtype or a value (NaN, infinity) is not what the chain takes.
    """
    check_is_chain(chain)
    spec, array = chain.input_spec, _as_array(chain, images, argument)
    if array.shape[1 if batched else 0 :] != spec.shape or (batched and array.ndim == len(spec.shape)):
        batch = "batch, " if batched else ""
        expected = f"[{batch}{', '.join(map(str, spec.shape))}]"
        raise InputError(f"{argument}: expected shape {expected}, got {list(array.shape)}")
    if chain.normalization is not None and array.dtype == np.uint8:
        return array
    if array.dtype != spec.dtype:
        pixels = "uint8 pixels or " if chain.normalization is not None else ""
        raise InputError(f"{argument}: expected {pixels}{spec.dtype}, got {array.dtype}")
    if isinstance(chain.network, Bert) and array.size:
        low, high, most = array.min(), array.max(), chain.network.vocabulary - 1
        if low < 0 or high > most:  # XLA would take the row of another token
            raise InputError(f"{argument}: expected token ids from 0 to {most}, got {low} to {high}")
    if jnp.issubdtype(array.dtype, jnp.floating) and not np.isfinite(array).all():
        raise InputError(f"{argument}: expected finite values, got NaN or infinity")
    return array


def _as_array(chain: Chain, images: Any, argument: str) -> np.ndarray:  # noqa: ANN401
    """Return what NumPy makes of images; lists of numbers, which have no dtype, get the chain's."""
    if isinstance(images, (str, bytes, os.PathLike)):
        raise InputError(f"{argument}: expected an array, got the path {images!r:.100}: read it first, as with Pillow")
    if is_traced(images):
        raise InputError(
            f"{argument}: expected an array, got one that jit, vmap or grad is tracing: call this outside of them, or"
            " inside gati_jax.runtime.predict_batch(bundle.cascade, images), and for gradients bundle.chain(inputs)"
        )
    if hasattr(images, "images"):
        raise InputError(f"{argument}: expected an array, got {kind_of(images)}: pass its images")
    array = as_array(argument, images)
    if hasattr(images, "dtype") or array.dtype not in (np.int64, np.float64) or not array.size:
        return array
    whole = array.dtype == np.int64
    dtype = np.dtype(np.uint8 if chain.normalization is not None and whole else chain.input_spec.dtype)
    if whole and dtype.kind in "iu":
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        if array.min() < least or array.max() > most:
            got = f"{array.min()} .. {array.max()}"
            raise InputError(f"{argument}: expected whole numbers in {least} .. {most}, got {got}")
    return array.astype(dtype) if whole or dtype.kind not in "iu" else array


F = TypeVar("F", bound=Callable)


def reference(function: F) -> F:
    """Return ``function`` with the arithmetic that base answers are defined by: true float32 products.

    By default GPUs and TPUs round the factors of float32 products.
    """
    return jax.default_matmul_precision("highest")(function)
