"""Answers from a bundle: one request, or a batch of them."""

from typing import Any, Literal

from .bundle import Bundle
from .errors import InputError
from .models import check_images
from .profiling import TunedCascade
from .runtime import Prediction, predict_batch, predict_one

Numerics = Literal["reference", "fast"]


def infer(
    bundle: Bundle,
    image: Any,  # noqa: ANN401 (anything that NumPy takes)
    *,
    numerics: Numerics | None = None,
    plan: str | None = None,
) -> Prediction:
    """Answer one request, leaving at the first cache whose score reaches its threshold.

    Args:
        bundle: See ``load_bundle``.
        image: One uint8 image (the bundle normalises it) or one prepared float32 input, without a batch dimension.
        numerics: "reference" is the arithmetic that was certified; "fast" is what ``tune`` found fastest on this
            device, whose logits differ in their last bits. By default fast if the bundle has been tuned.
        plan: The name of one of ``bundle.plans``; by default the first.

    Returns:
        ``class_index`` int32[], ``exit`` int32[] (the site of the cache that answered, or N for the base), ``score``
        float32[] (infinity from the base) and ``logits`` float32[classes] of that cache, or of the base.

    Raises:
        InputError: The shape, the dtype or a value is not what the bundle's network takes, or there is no such plan.

    Example:
        >>> import gati_jax
        >>> bundle = gati_jax.load_bundle("runs/digits/caches/bundle")  # doctest: +SKIP
        >>> int(gati_jax.infer(bundle, image).exit)  # doctest: +SKIP
        3
    """
    array = check_images(bundle.chain, image, batched=False, argument="image")
    tuned = _tuned(bundle, numerics, plan)
    return tuned.predict_one(array) if tuned else predict_one(bundle.cascade_of(plan), array)


def infer_batch(
    bundle: Bundle,
    images: Any,  # noqa: ANN401 (anything that NumPy takes)
    *,
    numerics: Numerics | None = None,
    plan: str | None = None,
) -> Prediction:
    """Answer many requests, each leaving at its own exit.

    Args:
        bundle: See ``load_bundle``.
        images: uint8 images or prepared inputs with a leading batch dimension.
        numerics: As for ``infer``. Reference numerics answer one row after another, exactly as ``infer`` does, in one
            program for each number of rows; fast ones answer in tiles, in one program for each power of two.
        plan: As for ``infer``.

    Returns:
        As ``infer``, with a leading batch dimension everywhere.

    Raises:
        InputError: The shape, the dtype or a value is not what the bundle's network takes, or there is no such plan.
    """
    array = check_images(bundle.chain, images)
    tuned = _tuned(bundle, numerics, plan)
    return tuned.predict(array) if tuned and len(array) else predict_batch(bundle.cascade_of(plan), array)


def _tuned(bundle: Bundle, numerics: Numerics | None, plan: str | None) -> TunedCascade | None:
    if numerics not in {None, "reference", "fast"}:
        raise InputError(f"numerics: expected reference or fast, got {numerics!r}")
    tuned = bundle.tuned_of(plan)
    if numerics == "fast" and tuned is None:
        raise InputError(
            "numerics: this bundle has not been tuned for this device; run python -m train.tune --bundle DIR"
        )
    return None if numerics == "reference" else tuned
