"""Evaluate a bundle on some images."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from gati_jax.bundle import Bundle
from gati_jax.caches import choose
from gati_jax.caches.candidate import fitted_rows
from gati_jax.certification import AnyLedger, find_ledger
from gati_jax.data import Images, fingerprint, row_digests
from gati_jax.errors import InputError, as_array, check_kind, kind_of
from gati_jax.fitting import replay
from gati_jax.fitting.base import open_images
from gati_jax.fitting.loop import progress_bar
from gati_jax.inference import infer_batch
from gati_jax.runtime import Prediction

from . import details, timing
from .records import (
    BaseQuality,
    CascadeQuality,
    EvaluatedCertificate,
    Evaluation,
    Exit,
    Memory,
    ServedResult,
    record_of,
)

TIMED, BATCHES = 150, (1, 8, 32, 128)
CONFIDENCE = 0.95
_CHUNK = 250
_log = logging.getLogger(__name__)


def evaluate(
    bundle: Bundle,
    images: Any,  # noqa: ANN401 (see Args)
    labels: ArrayLike | None = None,
    *,
    timed: int = TIMED,
    batches: Sequence[int] = BATCHES,
    ledger: AnyLedger = "user",
    reveal: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Answer images as requests are by default, and by the base, and time some of them.

    Args:
        bundle: See ``load_bundle``.
        images: As for ``infer_batch``, or a source of them, see ``fit``. Those on which nothing was fitted, chosen or
            certified say most.
        labels: The right classes, int[n], for accuracies; agreement needs none.
        timed: So many requests are timed, from the first; 0: none, which saves most of the time.
        batches: Sizes to time where the bundle has been tuned for this device.
        ledger: Counts the rows as shown: a plan that is chosen by what they show cannot be certified on them. None:
            nothing does, on your word that none will be.
        reveal: Show also the rows that the bundle was certified on.
        progress: Draw a progress bar on a terminal.

    Returns:
        Agreement, accuracies, exits, whether the certificate's bound holds here, times; ``summary()`` is its text.

    Raises:
        InputError: Images that the bundle does not take, labels of another number, or certify rows without ``reveal``.

    Example:
        >>> import gati_jax
        >>> bundle = gati_jax.load_bundle("runs/digits/caches/bundle")  # doctest: +SKIP
        >>> print(gati_jax.evaluate(bundle, images, labels).summary())  # doctest: +SKIP
    """
    check_kind("bundle", bundle, Bundle, "what gati_jax.load_bundle returns")
    array = open_images(bundle.chain, images)
    if not len(array):
        raise InputError("images: expected 1 or more, got none")
    _check_sizes(timed, batches)
    right = None if labels is None else _check_labels(labels, len(array))
    show_rows(bundle, array, ledger, reveal=reveal)
    prediction = _answers(bundle, array, progress=progress)
    exits = np.asarray(prediction.exit)
    _log.info("replaying the %d requests through the base and every cache", len(array))
    # The plan's other caches, too: neighbours on its path may have them on.
    planned = replay(bundle.chain, choose(bundle.caches, bundle.plan.names), array, labels=right)
    table = planned.take([cache.name for cache in bundle.cascade.caches])
    speed, measured = timing.measure(bundle, array, exits, batches, timed, progress=progress) if timed else (None, [])
    agrees = np.asarray(prediction.class_index == table.answers)
    agreement, certificate, costs = float(agrees.mean()), bundle.certificate, details.costs_of_plan(bundle)
    stops = (*bundle.cascade.sites, len(bundle.chain))
    bound = bundle.bound_of()
    holds = bound.epsilon is not None and 1 - agreement <= bound.epsilon
    return Evaluation(
        n=len(table),
        base=BaseQuality(accuracy=accuracy(table.answers, right)),
        cascade=CascadeQuality(accuracy=accuracy(prediction.class_index, right), agreement=agreement),
        certificate=record_of(EvaluatedCertificate, certificate, holds=holds),
        served=record_of(ServedResult, bound, text=str(bound)),
        exits=tuple(_exit_of(site, exits == site, agrees) for site in stops),
        cost=timing.cost(exits, speed, measured) if speed else None,
        memory=Memory(base_bytes=bundle.chain.bytes, cache_bytes=sum(c.bytes for c in bundle.cascade.caches)),
        oracle=timing.oracle(table, speed, costs) if speed else None,
        layout=details.layout(bundle, costs),
        path=details.path_points(bundle, planned, costs) if costs else (),
        classes=details.class_results(bundle, table, exits, agrees, stops),
        confusions=details.confusions(bundle, table, prediction),
        samples=details.samples(bundle, table, prediction, agrees),
    )


def _check_labels(labels: Any, n: int) -> Int[np.ndarray, " n"]:  # noqa: ANN401 (checked here)
    right = as_array("labels", labels)
    if right.shape != (n,) or right.dtype.kind not in "iu":
        raise InputError(f"labels: expected {n} whole numbers, got {right.dtype}{list(right.shape)}")
    return right


def _check_sizes(timed: Any, batches: Any) -> None:  # noqa: ANN401 (checked here)
    if not isinstance(timed, int) or timed < 0:
        raise InputError(f"timed: expected 0 or more, got {kind_of(timed)}")
    if not isinstance(batches, Sequence) or not all(isinstance(size, int) and size > 0 for size in batches):
        raise InputError(f"batches: expected sizes of 1 or more, got {kind_of(batches)}")


def show_rows(bundle: Bundle, images: Images, ledger: AnyLedger, *, reveal: bool) -> None:
    """Close rows that are about to be shown: a plan that is chosen by what they show cannot be certified on them.

    Args:
        bundle: Whose answers are shown.
        images: The rows.
        ledger: Where they are closed.
        reveal: Whether they may be those that the bundle was certified on.

    Raises:
        InputError: They are the certify rows, some are open, and ``reveal`` was not asked for.
    """
    rows, counted = row_digests(images), find_ledger(ledger)
    if known := int(np.isin(rows, np.concatenate([bundle.plan.rows, fitted_rows(bundle.caches)])).sum()):
        text = "the plan was composed, or its caches fitted, on %d of these %d rows: its agreement here says little"
        _log.warning(text, known, len(rows))
    if counted is None:
        _log.warning("no ledger knows that these rows are shown: certify no plan on them that was chosen by it")
        return
    certified_on = fingerprint(rows) == bundle.certificate.data_fingerprint
    if certified_on and not reveal and len(counted.still_open(rows)):
        raise InputError(
            "images: expected others than the certify rows (--split test), or reveal (--reveal), which closes these"
            " rows for other plans: what they show could decide what is certified on them next"
        )
    plans = {name: (plan, bundle.certificates[name].epsilon) for name, plan in bundle.plans.items()}
    counted.reveal(rows, plans, bundle.certificate.delta)
    _log.info("these rows certify no other plan from now on, by %s", counted.path or "this process")


def _answers(bundle: Bundle, images: Images, *, progress: bool) -> Prediction:
    """Answer as requests are answered by default: ``Evaluation.served`` says what holds of it."""
    with progress_bar(progress) as bar:
        starts = bar.track(range(0, len(images), _CHUNK), description="answering")
        chunks = [infer_batch(bundle, images[i : i + _CHUNK]) for i in starts]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)


def _exit_of(site: int, here: np.ndarray, agrees: np.ndarray) -> Exit:
    """Summarise the requests that leave at a site: which do, and which of all agree with the base, are bool[n]."""
    hits, right = int(here.sum()), int(agrees[here].sum())
    if not hits:
        return Exit(exit=site, hits=0, hit_rate=0.0, agreement=None)
    interval = binomtest(right, hits).proportion_ci(CONFIDENCE, "exact")
    return Exit(
        exit=site,
        hits=hits,
        hit_rate=float(here.mean()),
        agreement=right / hits,
        interval=(interval.low, interval.high),
    )


def accuracy(classes: ArrayLike, labels: np.ndarray | None) -> float | None:
    """Return the share of right classes, where labels are known."""
    return None if labels is None else float(np.mean(np.asarray(classes) == labels))
