"""ONNX Runtime as a backend: a session for each span of the base and for each lookup, and what runs between them.

Each stage runs only the rows that are left, in a batch of exactly that many: nothing is padded. A span gathers its rows
itself, so that activations stay where ONNX Runtime has put them.
"""

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnxruntime
from jaxtyping import Float, Int, Shaped
from onnx import ModelProto

from gati_jax.caches import Candidate
from gati_jax.errors import InputError
from gati_jax.models import Chain
from gati_jax.runtime import Cascade, Prediction

from .models import ROWS, check_exportable, lookup_model, span_model

VERSION = onnxruntime.__version__
_ERRORS = 3  # of ONNX Runtime's levels of severity
_BATCH = 256  # rows at once: larger batches are no faster a row
_SPIN = "20"
"""Microseconds for which a thread looks for the next operator before it sleeps. With ONNX Runtime's default, the idle
threads of one session keep those of the others, and a server's event loop, from the cores; with none, small operators
wait for threads to wake up."""
Value = Any
"""An ``onnxruntime.OrtValue``: an array that ONNX Runtime holds."""


def open_session(model: ModelProto) -> Any:  # noqa: ANN401 (onnxruntime is untyped)
    """Return a session on the CPU, with a pool of threads of its own, unless the process has one for all sessions."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _cores()
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN)
    options.log_severity_level = _ERRORS
    new = functools.partial(  # a fallback would be another provider, and what it prints
        onnxruntime.InferenceSession, model.SerializeToString(), options, ["CPUExecutionProvider"], enable_fallback=0
    )
    try:
        return new()
    except RuntimeError as error:
        if "global thread pool" not in str(error):
            raise
        options.use_per_session_threads = False  # somewhere set_global_thread_pool_sizes was called
        return new()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_value(array: np.ndarray) -> Value:
    """Hand an array to ONNX Runtime, which shares its memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def to_array(value: Value) -> np.ndarray:
    """Copy an array out of ONNX Runtime, which uses its memory again once the value is gone."""
    return np.array(value.numpy())


class Spans:
    """The sessions of a base, cut at the sites where something may look in; weights are in one session each.

    Args:
        chain: The base.
        cuts: Sites. Cascades with caches at some of them share the sessions.

    Raises:
        InputError: The base has no ONNX form.
    """

    def __init__(self, chain: Chain, cuts: Iterable[int]) -> None:
        """Prepare; a session is opened when it is first needed."""
        check_exportable(chain)
        self.chain = chain
        self.stops = [*sorted(set(cuts) - {len(chain)}), len(chain)]

        def session(start: int, stop: int, dtype: np.dtype | None) -> Any:  # noqa: ANN401
            return open_session(span_model(chain, start, stop, inputs=dtype))

        self._session: Callable[..., Any] = functools.cache(session)

    def first(self, images: Shaped[np.ndarray, "batch *input"], stop: int) -> Value:
        """Run images up to site ``stop``, channels first; the logits where it is N."""
        nearest = self.stops[0]
        (x,) = self._session(0, nearest, images.dtype).run_with_ort_values(["next"], {"images": to_value(images)})
        return x if nearest == stop else self.run(x, np.arange(len(images)), nearest, stop)

    def run(self, x: Value, rows: Int[np.ndarray, " rows"], start: int, stop: int) -> Value:
        """Run some rows of the activation at site ``start`` up to site ``stop``; the logits where it is N."""
        for after in (site for site in self.stops if start < site <= stop):
            given = {"activation": x, ROWS: to_value(rows)}
            (x,) = self._session(start, after, None).run_with_ort_values(["next"], given)
            start, rows = after, np.arange(len(rows))
        return x


class Lookup:
    """The session of a cache's lookup."""

    def __init__(self, chain: Chain, cache: Candidate) -> None:
        """Open it."""
        self._session = open_session(lookup_model(chain, cache))

    def __call__(self, x: Value) -> tuple[Float[np.ndarray, "batch classes"], Float[np.ndarray, " batch"]]:
        """Return logits and scores for activations."""
        logits, score = self._session.run_with_ort_values(["logits", "score"], {"activation": x})
        return to_array(logits), to_array(score)


class OnnxCascade:
    """A cascade on ONNX Runtime.

    Args:
        cascade: See ``Cascade``.
        spans: The base's sessions, with cuts at the sites of its caches; by default its own.

    Raises:
        InputError: The base or a cache has no ONNX form, or the sessions have no cut at a cache.
    """

    def __init__(self, cascade: Cascade, spans: Spans | None = None) -> None:
        """Open the sessions of lookups; those of the base are opened when they are needed."""
        check_exportable(cascade.chain, cascade.caches)
        self.cascade = cascade
        self.spans = Spans(cascade.chain, cascade.sites) if spans is None else spans
        if missing := {*cascade.sites} - {*self.spans.stops}:
            raise InputError(f"spans: expected cuts at every cache, got none at sites {sorted(missing)}")
        self._lookups = [Lookup(cascade.chain, cache) for cache in cascade.caches]
        self._thresholds = np.asarray(cascade.thresholds)

    def predict(self, images: Shaped[np.ndarray, "batch *input"]) -> Prediction:
        """Answer a batch; see ``infer_batch``."""
        n, chain = len(images), self.cascade.chain
        exits, scores = np.full(n, len(chain), np.int32), np.full(n, np.inf, np.float32)
        logits = np.empty((n, chain.classes), np.float32)
        for start in range(0, n, _BATCH):
            part = slice(start, start + _BATCH)
            self._answer(images[part], exits[part], scores[part], logits[part])
        return Prediction(logits.argmax(-1).astype(np.int32), exits, scores, logits)

    def every_output(self, images: Shaped[np.ndarray, "batch *input"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the base's logits[batch, classes], and the logits[caches, batch, classes] and scores of every lookup.

        Nothing leaves. Several caches may be at one site.
        """
        everyone, chain, x, at, found = np.arange(len(images)), self.cascade.chain, None, 0, []
        for site, lookup in (*zip(self.cascade.sites, self._lookups, strict=True), (len(chain), None)):
            if x is None:
                x = self.spans.first(images, site)
            elif site > at:
                x = self.spans.run(x, everyone, at, site)
            at = site
            found.append(lookup(x) if lookup else (to_array(x), everyone))
        logits, scores = zip(*found, strict=True)
        n, classes = len(images), chain.classes
        return logits[-1], np.reshape(logits[:-1], (-1, n, classes)), np.reshape(scores[:-1], (-1, n))

    def _answer(self, images: np.ndarray, exits: np.ndarray, scores: np.ndarray, logits: np.ndarray) -> None:
        """Write the answers of at most ``_BATCH`` images."""
        x: Value = None  # nothing has run
        at, left = 0, np.arange(len(images))  # ``rows`` of the activation at site ``at`` are those of requests ``left``
        rows = left
        for site, lookup, threshold in zip(self.cascade.sites, self._lookups, self._thresholds, strict=True):
            x = self.spans.first(images, site) if x is None else self.spans.run(x, rows, at, site)
            found, score = lookup(x)
            hit = score >= threshold
            gone = left[hit]
            exits[gone], scores[gone], logits[gone] = site, score[hit], found[hit]
            rows, at = np.flatnonzero(~hit), site
            left = left[rows]
            if not len(left):
                return
        end = len(self.cascade.chain)
        x = self.spans.first(images, end) if x is None else self.spans.run(x, rows, at, end)
        logits[left] = to_array(x)
