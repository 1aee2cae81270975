"""Transformers: ViT for images (Dosovitskiy et al., arXiv:2010.11929) and BERT for texts (Devlin et al., 1810.04805).

Their sites are [tokens, features], the first of which is the class token: what the classifier reads. A block takes one
array, so a text's padding mask travels in it, as one more feature: 1 for a token, 0 for padding. It is taken from the
ids once, where they are embedded, and the features of padded positions are zero, so a cache that reads a site reads the
text and nothing else.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field

from gati_jax.errors import InputError

from .convolution import Algorithm, Layer
from .modules import Norm, Size

_Depth = Annotated[int, Field(ge=1, le=64)]
_Hidden = Annotated[int, Field(ge=1, le=16_384)]
_Positions = Annotated[int, Field(ge=1, le=8192)]
_Vocabulary = Annotated[int, Field(ge=2, le=1_000_000)]
_Epsilon = Annotated[float, Field(gt=0, lt=1)]
_Classes = Annotated[int, Field(ge=2, le=100_000)]

_SMALL = nn.initializers.truncated_normal(0.02)
_UNIFORM = nn.initializers.xavier_uniform()


# --- Modules ----------------------------------------------------------------------------------------------------------
# Like convolutions, they compute in the dtype of their input; layer norms and classifiers in float32.


def _dense(x: Float[Array, "*batch inputs"], features: int, name: str) -> Float[Array, "*batch features"]:
    return nn.Dense(features, dtype=x.dtype, kernel_init=_UNIFORM, name=name)(x)


def _normalize(x: Float[Array, "*batch width"], epsilon: float, name: str) -> Float[Array, "*batch width"]:
    # In float32. The fast variance, E[x^2] - E[x]^2, loses digits that PyTorch keeps.
    norm = nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, its queries, keys and values from one matrix."""

    heads: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Bool[Array, "batch tokens"] | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Attend to all tokens, or to those that ``mask`` names."""
        batch, tokens, width = x.shape
        qkv = _dense(x, 3 * width, "qkv").reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q * (width // self.heads) ** -0.5, k)
        scores = scores.astype(jnp.float32) if x.dtype.itemsize < 4 else scores  # noqa: PLR2004 (softmax sums them)
        if mask is not None:  # not -inf: a text of padding alone has finite logits, too
            scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores).astype(x.dtype), v)
        return _dense(y.reshape(x.shape), width, "proj")


class EncoderBlock(nn.Module):
    """Attention and an MLP with GELU, each with a residual; layer norm comes first (ViT) or behind each sum (BERT)."""

    heads: int
    hidden: int
    epsilon: float
    norm_first: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: Bool[Array, "batch tokens"] | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Run the block."""
        attention = Attention(self.heads, name="attention")
        if self.norm_first:
            x = x + attention(_normalize(x, self.epsilon, "norm1"), mask)
            return x + self._mlp(_normalize(x, self.epsilon, "norm2"))
        x = _normalize(x + attention(x, mask), self.epsilon, "norm1")
        return _normalize(x + self._mlp(x), self.epsilon, "norm2")

    def _mlp(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        y = jax.nn.gelu(_dense(x, self.hidden, "fc1"), approximate=False)
        return _dense(y, x.shape[-1], "fc2")


class PatchTokens(nn.Module):
    """A linear map of every patch, a class token before them, and learned positions."""

    patch: int
    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch tokens features"]:
        """Return tokens."""
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, size, padding="VALID", dtype=x.dtype, name="patches")(x)
        x = x.reshape(len(x), -1, self.width)
        token = self.param("class_token", _SMALL, (1, 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        return x + self.param("positions", _SMALL, (1, *x.shape[1:])).astype(x.dtype)


class FirstEncoderBlock(nn.Module):
    """Tokens and the first block: nothing worth a cache lies between them."""

    tokens: PatchTokens
    block: EncoderBlock

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch tokens features"]:
        """Run both."""
        return self.block(self.tokens(x))


class ClassTokenClassifier(nn.Module):
    """Layer norm and a linear layer on the class token."""

    classes: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch classes"]:
        """Return logits."""
        token = _normalize(x[:, 0].astype(jnp.float32), self.epsilon, "last_norm")
        return _dense(token, self.classes, "head")


class TextTokens(nn.Module):
    """The sum of a token's word, its position and the first segment, normalised; and the padding mask."""

    vocabulary: int
    positions: int
    segments: int
    width: int
    padding: int
    epsilon: float

    @nn.compact
    def __call__(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens carry"]:
        """Return tokens."""
        words = self.param("words", _SMALL, (self.vocabulary, self.width))[ids]
        positions = self.param("positions", _SMALL, (self.positions, self.width))[None, : ids.shape[1]]
        segments = self.param("segments", _SMALL, (self.segments, self.width))[None, :1]
        x = _normalize(words + positions + segments, self.epsilon, "norm0")
        return _with_mask(x, ids != self.padding)


class TextBlock(nn.Module):
    """A block of a text's encoder, and before the first one its tokens."""

    block: EncoderBlock
    tokens: TextTokens | None = None

    def __call__(self, x: Int[Array, "batch tokens"] | Float[Array, "batch tokens carry"]) -> Float[Array, "b t carry"]:
        """Run the block on what is no padding."""
        carry = x if self.tokens is None else self.tokens(x)
        mask = carry[..., -1] > 0
        return _with_mask(self.block(carry[..., :-1], mask), mask)


def _with_mask(x: Float[Array, "b t width"], mask: Bool[Array, "b t"]) -> Float[Array, "b t carry"]:
    kept = mask[..., None].astype(x.dtype)
    return jnp.concatenate([x * kept, kept], axis=-1)


class TextClassifier(nn.Module):
    """A tanh layer and a linear one on the class token."""

    classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens carry"]) -> Float[Array, "batch classes"]:
        """Return logits."""
        token = x[:, 0, :-1].astype(jnp.float32)
        return _dense(jnp.tanh(_dense(token, token.shape[-1], "pooler")), self.classes, "head")


# --- Configurations ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT:
    """The configuration of a vision transformer with a class token."""

    patch: Annotated[int, Field(ge=1, le=64)]
    """Pixels per side of a square patch."""
    width: Size
    """Features of a token."""
    depth: _Depth
    """Blocks."""
    heads: _Depth
    hidden: _Hidden
    """Features inside of a block's MLP."""
    epsilon: _Epsilon = 1e-6
    """Of layer norms: 1e-6 in timm's and torchvision's networks, 1e-12 in Hugging Face's."""
    classes: _Classes = 10
    input_shape: tuple[Size, Size, Size] = (32, 32, 3)
    """Height, width, channels."""
    input_dtype: ClassVar[str] = "float32"

    def __post_init__(self) -> None:
        """Refuse heads of unequal widths, and images that are not whole patches."""
        _check_heads(self.width, self.heads)
        if any(side % self.patch for side in self.input_shape[:2]):
            raise InputError(
                f"input_shape: expected height and width in whole patches of {self.patch}, got {self.input_shape}"
            )

    def modules(self, norm: Norm = "folded", algorithms: Sequence[tuple[Algorithm, ...]] = ()) -> tuple[nn.Module, ...]:
        """Return the modules of blocks 1 .. N and the classifier; it has neither batch norms nor convolutions."""
        del norm, algorithms
        block = EncoderBlock(self.heads, self.hidden, self.epsilon)
        first = FirstEncoderBlock(PatchTokens(self.patch, self.width), block)
        return (first, *[block] * (self.depth - 1), ClassTokenClassifier(self.classes, self.epsilon))

    def layers(self) -> tuple[tuple[Layer, ...], ...]:
        """Return the convolutions of every block that may run by several algorithms: none."""
        return ((),) * self.depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bert:
    """The configuration of a BERT that classifies texts: token ids in, padded behind; one segment."""

    vocabulary: _Vocabulary
    length: _Positions
    """Tokens of an input, with its padding."""
    width: Size
    """Features of a token."""
    depth: _Depth
    """Blocks."""
    heads: _Depth
    hidden: _Hidden
    """Features inside of a block's MLP."""
    positions: _Positions = 512
    """That were learned; inputs may be shorter."""
    segments: Annotated[int, Field(ge=1, le=16)] = 2
    padding: Annotated[int, Field(ge=0)] = 0
    """The id of padding, to which no token attends."""
    epsilon: _Epsilon = 1e-12
    classes: _Classes = 2
    input_dtype: ClassVar[str] = "int32"

    def __post_init__(self) -> None:
        """Refuse heads of unequal widths, and inputs longer than the positions."""
        _check_heads(self.width, self.heads)
        if self.length > self.positions:
            raise InputError(f"length: expected at most the {self.positions} positions, got {self.length}")
        if self.padding >= self.vocabulary:
            raise InputError(f"padding: expected an id below {self.vocabulary}, got {self.padding}")

    @property
    def input_shape(self) -> tuple[int]:
        """The shape of an input: its tokens."""
        return (self.length,)

    def modules(self, norm: Norm = "folded", algorithms: Sequence[tuple[Algorithm, ...]] = ()) -> tuple[nn.Module, ...]:
        """Return the modules of blocks 1 .. N and the classifier; see ``ViT.modules``."""
        del norm, algorithms
        sizes = self.vocabulary, self.positions, self.segments, self.width, self.padding
        block = EncoderBlock(self.heads, self.hidden, self.epsilon, norm_first=False)
        first = TextBlock(block, TextTokens(*sizes, self.epsilon))
        return (first, *[TextBlock(block)] * (self.depth - 1), TextClassifier(self.classes))

    def layers(self) -> tuple[tuple[Layer, ...], ...]:
        """Return no convolutions; see ``ViT.layers``."""
        return ((),) * self.depth


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise InputError(f"heads: expected a divisor of the width {width}, got {heads}")
