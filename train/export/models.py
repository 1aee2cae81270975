"""Cascades as ONNX models: one for each span, for any number of rows, and one of nested Ifs for a single row.

cascade.onnx     one file for batch 1: nested Ifs, thresholds as an input
span_0.onnx ...  from each open cache's site to the next, with the cache's lookup; the last ends with the classifier
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from gati_jax import Bundle, Candidate, Chain
from gati_jax.export.graph import Graph, Value, answer_of
from gati_jax.export.models import (
    OPSET,
    activation,
    check_exportable,
    emit_blocks,
    emit_classifier,
    emit_lookup,
    finish,
    images,
    model,
)
from gati_jax.export.sessions import VERSION, open_session
from gati_jax.profiling import device_name
from gati_jax.runtime import Cascade

from . import cascade as runner
from .folder import Answers, input_dtype

_log = logging.getLogger("train.export")

ONE_FILE, THRESHOLDS = "cascade.onnx", "thresholds"
_CHUNK = 256
MOST_NESTED = 24  # a protocol buffer may be 100 messages deep, and an If takes three


class Stage(NamedTuple):
    """Blocks ``start + 1`` to ``site``, and what answers behind them: a cache, or in the last stage the classifier."""

    file: str
    """Where it is a model by itself."""
    start: int
    site: int
    cache: Candidate | None


def stages_of(bundle: Bundle) -> list[Stage]:
    """Return a stage for each cache that any plan of the bundle has open, and the last one."""
    opened = {cache.name: cache for cascade in bundle.cascades.values() for cache in cascade.caches}
    caches = sorted(opened.values(), key=lambda cache: cache.site)
    sites = [*(cache.site for cache in caches), len(bundle.chain)]
    files = [f"span_{i}.onnx" for i in range(len(sites))]
    return [Stage(*row) for row in zip(files, [0, *sites[:-1]], sites, [*caches, None], strict=True)]


class OnnxForm:
    """A bundle as ONNX models, see ``folder.Form``.

    Raises:
        InputError: The bundle has no ONNX form.
    """

    arithmetic = "onnx"
    runner = runner.__file__

    def __init__(self, bundle: Bundle) -> None:
        """Convert; there is no single file for more caches than can be nested."""
        check_exportable(bundle.chain, bundle.caches)
        self.bundle = bundle
        self._stages = stages_of(bundle)
        _log.info("converting %d spans", len(self._stages))
        self._models = {stage.file: span_model(bundle, stage, first=stage is self._stages[0]) for stage in self._stages}
        if len(self._stages) <= MOST_NESTED:
            self._models[ONE_FILE] = single_model(bundle, self._stages)
        self.device = f"onnxruntime {VERSION} on a CPU, reference on {device_name()}"

    def files(self, promises: Mapping[str, str]) -> dict[str, bytes]:
        """Return the models, which have the promises among their properties."""
        for one in self._models.values():
            helper.set_model_props(one, {"gati_jax.promises": json.dumps(promises)})
        return {name: one.SerializeToString(deterministic=True) for name, one in self._models.items()}

    def describe(self, *, checked: bool) -> dict[str, Any]:
        """Return the models and the versions of what runs them."""
        spans = [(stage.file, stage.start, stage.site, stage.cache and stage.cache.name) for stage in self._stages]
        return {
            "opset": OPSET,
            "onnxruntime": VERSION if checked else "",
            "one_file": ONE_FILE if ONE_FILE in self._models else None,
            "spans": [dict(zip(("file", "start", "site", "cache"), span, strict=True)) for span in spans],
        }

    def thresholds(self, cascade: Cascade) -> np.ndarray:
        """Return float32[caches of all plans], infinity for those that are off in this one."""
        return thresholds_of(cascade, self._stages)

    def each_way(self, folder: Path, cascade: Cascade, rows: np.ndarray) -> Iterator[Answers]:
        """Answer rows by spans, in batches and alone, and by the single file."""
        spans = runner.Cascade(folder)
        spans.thresholds = np.append(self.thresholds(cascade), np.float32(-np.inf))
        for size in (_CHUNK, 1):
            parts = [spans.predict(rows[i : i + size])[:2] for i in range(0, len(rows), size)]
            yield np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        if ONE_FILE in self._models:
            yield answer_one_by_one(folder / ONE_FILE, rows, self.thresholds(cascade))[:2]


def answer_one_by_one(file: Path, images: np.ndarray, thresholds: np.ndarray) -> runner.Prediction:
    """Answer images by the single file, one after another."""
    session = open_session(onnx.load(file))
    given = {THRESHOLDS: thresholds} if len(thresholds) else {}
    rows = [session.run(None, {"images": images[i : i + 1], **given}) for i in range(len(images))]
    return runner.Prediction(*map(np.concatenate, zip(*rows, strict=True)))


def span_model(bundle: Bundle, stage: Stage, *, first: bool) -> ModelProto:
    """Return a stage for any number of rows; it gives class, score, logits, and what the next one takes."""
    graph, chain = Graph(""), bundle.chain
    x, given = images(graph, chain, "batch", input_dtype(bundle)) if first else activation(chain, stage.start)
    following, logits, score = _stage(graph, chain, stage, x)
    outputs = {"class_index": answer_of(graph, logits), "score": score, "logits": logits}
    outputs |= {"next": following} if stage.cache else {}
    return model(finish(graph, [given], outputs, "batch"))


def single_model(bundle: Bundle, stages: Sequence[Stage]) -> ModelProto:
    """Return the whole cascade for one row, with the thresholds of the default plan unless others are given."""
    graph = Graph("")
    x, given = images(graph, bundle.chain, 1, input_dtype(bundle))
    inputs, defaults = [given], thresholds_of(bundle.cascade, stages)
    if len(defaults):
        graph.constants.append(numpy_helper.from_array(defaults, THRESHOLDS))
        inputs.append(helper.make_tensor_value_info(THRESHOLDS, TensorProto.FLOAT, defaults.shape))
    site, score, logits = _rest(graph, bundle.chain, stages, 0, x)
    outputs = {"class_index": answer_of(graph, logits), "exit": site, "score": score, "logits": logits}
    return model(finish(graph, inputs, outputs, 1))


def _rest(graph: Graph, chain: Chain, stages: Sequence[Stage], index: int, x: Value) -> list[Value]:
    """Add the stages from ``index`` on, each inside an If of the one before; return exit, score and logits."""
    stage = stages[index]
    x, logits, score = _stage(graph, chain, stage, x)
    answer = [Value(graph.constant([stage.site], np.int32).name, ()), score, logits]
    if stage.cache is None:
        return answer
    hit = graph.add("GreaterOrEqual", score, graph.add("Gather", Value(THRESHOLDS, ()), graph.ints(index)))
    here, later = Graph(f"{graph.prefix}hit_{index}/"), Graph(f"{graph.prefix}miss_{index}/")
    names = ("exit", "score", "logits")
    then = finish(here, [], dict(zip(names, answer, strict=True)), 1)
    otherwise = finish(later, [], dict(zip(names, _rest(later, chain, stages, index + 1, x), strict=True)), 1)
    found = graph.add_node("If", hit, outputs=3, then_branch=then, else_branch=otherwise)
    return [Value(name, value.shape) for (name, _), value in zip(found, answer, strict=True)]


def _stage(graph: Graph, chain: Chain, stage: Stage, x: Value) -> tuple[Value, Value, Value]:
    """Add a stage; return the activation behind it, logits and score."""
    x = emit_blocks(graph, chain, stage.start, stage.site, x)
    if stage.cache is not None:
        return x, *emit_lookup(graph, stage.cache, x)
    infinity = numpy_helper.from_array(np.full(1, np.inf, np.float32))
    batch = graph.add("Shape", x, shape=(1,), start=0, end=1)
    return x, emit_classifier(graph, chain, x), graph.add("ConstantOfShape", batch, shape=(), value=infinity)


def thresholds_of(cascade: Cascade, stages: Sequence[Stage]) -> np.ndarray:
    """Return float32[caches]: a threshold for each cache of any plan, infinity for those that are off in this one."""
    known = dict(zip((cache.name for cache in cascade.caches), np.asarray(cascade.thresholds), strict=True))
    return np.array([known.get(stage.cache.name, np.inf) for stage in stages if stage.cache], np.float32)
