"""Answers from a bundle."""

from typing import Any

from .bundle import Bundle
from .models import check_images
from .runtime import Prediction, predict_batch, predict_one


def infer(bundle: Bundle, image: Any) -> Prediction:  # noqa: ANN401 (anything that NumPy takes)
    """Answer one request, leaving at the first cache that is sure enough.

    Args:
        bundle: See ``load_bundle``.
        image: One uint8 image (the bundle normalises it) or one prepared float32 input, without a batch dimension.

    Returns:
        ``class_index`` int32[], ``exit`` int32[] (site number, or N for the base), ``score`` float32[] and ``logits``
        float32[classes] of whoever answered.

    Raises:
        InputError: The shape, the dtype or a value is not what the bundle's network takes.

    Example:
        >>> import gati_jax
        >>> bundle = gati_jax.load_bundle("runs/digits/caches/bundle")  # doctest: +SKIP
        >>> int(gati_jax.infer(bundle, image).exit)  # doctest: +SKIP
        3
    """
    return predict_one(bundle.cascade, check_images(bundle.chain, image, batched=False, argument="image"))


def infer_batch(bundle: Bundle, images: Any) -> Prediction:  # noqa: ANN401 (anything that NumPy takes)
    """Answer many requests, each leaving at its own exit; one program for each number of rows.

    Args:
        bundle: See ``load_bundle``.
        images: uint8 or prepared inputs with a leading batch dimension.

    Returns:
        As ``infer``, with a leading batch dimension everywhere.

    Raises:
        InputError: The shape, the dtype or a value is not what the bundle's network takes.
    """
    return predict_batch(bundle.cascade, check_images(bundle.chain, images))
