"""Answers from a bundle: one request, or a batch of them."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt64
from numpy.typing import ArrayLike

from .bundle import Bundle
from .caches.candidate import fitted_rows
from .certification import ArithmeticCheck
from .certification.looks import MOST_DUPLICATES
from .data import check_distinct_rows, fingerprint, row_digests
from .errors import InputError, check_kind, check_share
from .models import check_images
from .planning import ReplayTable, replay_plan
from .profiling import Backend, TunedCascade, Tuning, device_name, run_by, spans_of
from .runtime import Cascade, Prediction, predict_batch, predict_one

_CHUNK = 256
Numerics = Literal["reference", "fast", "bfloat16"]


def infer(
    bundle: Bundle,
    image: Any,  # noqa: ANN401 (anything that NumPy takes)
    *,
    numerics: Numerics | None = None,
    plan: str | None = None,
    backend: Backend | None = None,
) -> Prediction:
    """Answer one request, leaving at the first cache whose score reaches its threshold.

    Args:
        bundle: See ``load_bundle``.
        image: One uint8 image (the bundle normalises it) or one prepared float32 input, without a batch dimension.
        numerics: "reference" is the arithmetic that was certified; "fast" is what ``tune`` found fastest on this
            device, whose logits differ in their last bits. By default fast if ``check_tuning`` has bounded how often
            its answers differ; ``bundle.bound_of(plan)`` says what holds of the answers. "bfloat16" is refused unless
            the plan has a certificate of its own in it, made on this device; see ``certify_numerics``.
        plan: The name of one of ``bundle.plans``; by default the first.
        backend: "xla" or "onnxruntime", which needs the extra onnx; by default the faster of those that fast numerics
            may use. See ``train.tune``.

    Returns:
        ``class_index`` int32[], ``exit`` int32[] (the site of the cache that answered, or N for the base), ``score``
        float32[] (infinity from the base) and ``logits`` float32[classes] of that cache, or of the base.

    Raises:
        InputError: The shape, the dtype or a value is not what the bundle's network takes, or makes its logits
            infinite; there is no such plan; the bundle has not been tuned for this backend, or not certified for these
            numerics.

    Example:
        >>> import gati_jax
        >>> bundle = gati_jax.load_bundle("runs/digits/caches/bundle")  # doctest: +SKIP
        >>> int(gati_jax.infer(bundle, image).exit)  # doctest: +SKIP
        3
    """
    array = check_images(_check_bundle(bundle).chain, image, batched=False, argument="image")
    tuned = _tuned(bundle, numerics, plan, backend)
    return _finite("image", tuned.predict_one(array) if tuned else predict_one(bundle.cascade_of(plan), array))


def infer_batch(
    bundle: Bundle,
    images: Any,  # noqa: ANN401 (anything that NumPy takes)
    *,
    numerics: Numerics | None = None,
    plan: str | None = None,
    backend: Backend | None = None,
) -> Prediction:
    """Answer many requests, each leaving at its own exit.

    Args:
        bundle: See ``load_bundle``.
        images: uint8 images or prepared inputs with a leading batch dimension.
        numerics: As for ``infer``. Reference numerics answer one row after another, exactly as ``infer`` does, in one
            program for each number of rows; fast ones answer in tiles, in one program for each power of two.
        plan: As for ``infer``.
        backend: As for ``infer``.

    Returns:
        As ``infer``, with a leading batch dimension everywhere.

    Raises:
        InputError: The shape, the dtype or a value is not what the bundle's network takes, or makes its logits
            infinite; there is no such plan; or the bundle has not been tuned for this backend.
    """
    array = check_images(_check_bundle(bundle).chain, images)
    tuned = _tuned(bundle, numerics, plan, backend)
    found = tuned.predict(array) if tuned and len(array) else predict_batch(bundle.cascade_of(plan), array)
    return _finite("images", found)


def _check_bundle(bundle: Any) -> Bundle:  # noqa: ANN401 (checked here)
    check_kind("bundle", bundle, Bundle, "what gati_jax.load_bundle returns")
    return bundle


def _finite(argument: str, found: Prediction) -> Prediction:
    """Return a prediction whose logits are numbers: of others the class says nothing, and no promise holds."""
    if wrong := int((~np.isfinite(found.logits)).any(-1).sum()):
        raise InputError(f"{argument}: expected inputs with finite logits, got NaN or infinity for {wrong}")
    return found


def _tuned(bundle: Bundle, numerics: Numerics | None, plan: str | None, backend: Backend | None) -> TunedCascade | None:
    """Return the tuned cascade that is to answer; None if the reference arithmetic is."""
    if numerics not in {None, "reference", "fast", "bfloat16"}:
        raise InputError(f"numerics: expected reference, fast or bfloat16, got {numerics!r}")
    if backend not in {None, "xla", "onnxruntime"}:
        raise InputError(f"backend: expected xla or onnxruntime, got {backend!r}")
    if numerics == "reference" and backend == "onnxruntime":
        raise InputError("backend: expected xla with the reference numerics, which were certified, got onnxruntime")
    if numerics == "bfloat16":
        if backend == "onnxruntime":
            raise InputError("backend: expected xla with bfloat16, got onnxruntime")
        return bundle.bfloat16_of(plan)
    tuned, again = bundle.tuned_of(plan, backend), "run gati-jax tune --bundle DIR"
    if backend == "onnxruntime" and tuned is None:
        raise InputError(f"backend: this bundle has not been tuned for onnxruntime on this device; {again}")
    if numerics == "fast" and tuned is None:
        raise InputError(f"numerics: this bundle has not been tuned for this device; {again}")
    asked = numerics == "fast" or backend == "onnxruntime"
    return tuned if asked or (numerics is None and bundle.checks_of(backend)) else None


def check_tuning(
    bundle: Bundle,
    tuning: Tuning,
    images: Any,  # noqa: ANN401 (anything that NumPy takes)
    *,
    delta: float = 0.01,
    certified: ReplayTable | None = None,
    replays: Sequence[ReplayTable] = (),
) -> Tuning:
    """Compare a tuning's answers with those of the certified arithmetic, which makes it what answers by default.

    A row differs if its class or its exit does: alone, in tiles of any one size, or in a batch with tiles as scheduled.

    Args:
        bundle: Its certified plans and its base are compared.
        tuning: See ``tune``; of this device.
        images: The certify rows, or others that no plan was composed on and no cache fitted on, each drawn by itself;
            labels are not needed.
        delta: The risk that a bound is wrong; it comes on top of the certificate's.
        certified: The replay of ``images`` that was certified, if it is still there: nothing is run in that arithmetic
            then.
        replays: Replays of ``images`` in the tuning's arithmetic, as ``replays_on_onnx`` makes them: nothing is run at
            all then.

    Returns:
        The tuning with its checks, for ``save_tuning``.

    Raises:
        InputError: Nothing is certified, the tuning is of another device, there are no images, plans were composed or
            caches fitted on some of them, some repeat others, or a replay is of other rows or another bundle.
    """
    array = check_images(_check_bundle(bundle).chain, images)
    if tuning.device != (here := device_name(tuning.backend)) or len(array) == 0:
        raise InputError(f"tuning: expected one of {here} and 1 row or more, got {tuning.device} and {len(array)}")
    rows = row_digests(array)
    for table in replays:
        _check_replay("replays", table, bundle, rows)
    before = {check.programs: check.number for one in bundle.tunings for check in one.checks}
    shared = spans_of(bundle.chain, bundle.caches) if tuning.backend == "onnxruntime" else None

    def each_way(cascade: Cascade, rows: np.ndarray) -> Iterator[tuple[ArrayLike, ArrayLike]]:
        if replays:
            return (_replayed(cascade, table) for table in replays)
        return ((p.class_index, p.exit) for p in run_by(tuning, cascade, shared).each_way(rows))

    checks = check_arithmetic(
        bundle,
        array,
        each_way,
        arithmetic="fast",
        programs=tuning.programs,
        device=tuning.device,
        number=before.get(tuning.programs, 1 + max(before.values(), default=0)),
        delta=delta,
        certified=certified,
    )
    return dataclasses.replace(tuning, checks=checks)


def check_arithmetic(
    bundle: Bundle,
    images: Any,  # noqa: ANN401 (anything that NumPy takes)
    each_way: Callable[[Cascade, np.ndarray], Iterable[tuple[ArrayLike, ArrayLike]]],
    *,
    arithmetic: str,
    programs: str,
    device: str,
    number: int,
    delta: float = 0.01,
    certified: ReplayTable | None = None,
) -> tuple[ArithmeticCheck, ...]:
    """Compare an arithmetic's answers with those of the certified one; a row differs if it does in any way.

    Args:
        bundle: Its certified plans and its base are compared.
        images: As for ``check_tuning``.
        each_way: Gives the classes and exits of all rows by a cascade, for each way in which requests may come.
        arithmetic: A name for it.
        programs: A digest of what decides on its answers.
        device: Where both run.
        number: See ``ArithmeticCheck``.
        delta: As for ``check_tuning``.
        certified: As for ``check_tuning``.

    Raises:
        InputError: As ``check_tuning``, or the replay is of other rows.
    """
    array = check_images(bundle.chain, images)
    check_share("delta", delta)
    if len(bundle.compared) == 1:
        raise InputError(f"bundle: expected a certified plan, got none: there is no promise to keep in {arithmetic}")
    if len(array) == 0:
        raise InputError("images: expected 1 row or more, got 0")
    rows = row_digests(array)
    for plan in bundle.plans.values():
        check_distinct_rows(rows, plan.rows, names=("images", "select"))
    check_distinct_rows(rows, fitted_rows(bundle.caches), names=("images", "the rows of the fit"))
    repeated = len(rows) - len(np.unique(rows))
    if repeated > MOST_DUPLICATES * len(rows) and fingerprint(rows) != bundle.certificate.data_fingerprint:
        raise InputError(f"images: expected distinct rows, or the certify rows, got {repeated} of {len(rows)} copies")
    if certified is not None:
        _check_replay("certified", certified, bundle, rows)
    checks = []
    for key, (cascade, comparisons) in bundle.compared.items():
        classes, exits = _replayed(cascade, certified) if certified else _answered(cascade, array)
        differ = np.zeros(len(array), bool)
        for found, left in each_way(cascade, array):
            differ |= (np.asarray(found) != classes) | (np.asarray(left) != exits)
        check = ArithmeticCheck(
            arithmetic=arithmetic,
            programs=programs,
            device=device,
            cascade=key,
            data_fingerprint=fingerprint(rows),
            n=len(array),
            differ=int(differ.sum()),
            delta=delta,
            comparisons=comparisons,
            number=number,
        )
        checks.append(check)
    return tuple(checks)


def _answered(cascade: Cascade, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return classes and exits in the reference arithmetic."""
    parts = [predict_batch(cascade, images[start : start + _CHUNK]) for start in range(0, len(images), _CHUNK)]
    return np.concatenate([p.class_index for p in parts]), np.concatenate([p.exit for p in parts])


def _check_replay(argument: str, table: ReplayTable, bundle: Bundle, rows: UInt64[np.ndarray, " n"]) -> None:
    if not np.array_equal(table.rows, rows):
        raise InputError(f"{argument}: expected a replay of the images in their order, got other rows")
    for plan in bundle.plans.values():
        plan.source.check(table.take(plan.names).source, argument)


def _replayed(cascade: Cascade, table: ReplayTable) -> tuple[np.ndarray, np.ndarray]:
    """Return classes and exits by a replay."""
    table = table.take([cache.name for cache in cascade.caches])
    found = replay_plan(table, np.asarray(cascade.thresholds))
    return found.classes, np.append(table.sites, table.depth)[found.exits]
