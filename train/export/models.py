"""Cascades as ONNX models: one for each span, for any number of rows, and one of nested Ifs for a single row."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import jax
import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from gati_jax import Bundle, Candidate, Chain, __version__
from gati_jax.caches import fold_standardize
from gati_jax.models import Architecture
from gati_jax.runtime import Cascade

from .graph import Graph, Value, answer_of, emit, prepare

OPSET, IR_VERSION = 18, 8
ONE_FILE, THRESHOLDS = "cascade.onnx", "thresholds"
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


def models_of(bundle: Bundle) -> dict[str, ModelProto]:
    """Return the models by file name; there is no single file for more caches than can be nested."""
    stages = stages_of(bundle)
    found = {stage.file: span_model(bundle.chain, stage, first=stage is stages[0]) for stage in stages}
    return found | ({ONE_FILE: single_model(bundle, stages)} if len(stages) <= MOST_NESTED else {})


def span_model(chain: Chain, stage: Stage, *, first: bool) -> ModelProto:
    """Return a stage for any number of rows; it gives class, score, logits, and what the next one takes."""
    graph = Graph("")
    if first:
        x, given = _images(graph, chain, "batch")
    else:
        height, width, channels = chain.site_specs[stage.start].shape
        x = Value("activation", (channels, height, width))
        given = _info(x, TensorProto.FLOAT, "batch")
    following, logits, score = _stage(graph, chain, stage, x)
    outputs = {"class_index": answer_of(graph, logits), "score": score, "logits": logits}
    outputs |= {"next": following} if stage.cache else {}
    return _model(_finish(graph, [given], outputs, "batch"))


def single_model(bundle: Bundle, stages: Sequence[Stage]) -> ModelProto:
    """Return the whole cascade for one row, with the thresholds of the default plan unless others are given."""
    graph = Graph("")
    x, images = _images(graph, bundle.chain, 1)
    inputs, defaults = [images], thresholds_of(bundle.cascade, stages)
    if len(defaults):
        graph.constants.append(numpy_helper.from_array(defaults, THRESHOLDS))
        inputs.append(helper.make_tensor_value_info(THRESHOLDS, TensorProto.FLOAT, defaults.shape))
    site, score, logits = _rest(graph, bundle.chain, stages, 0, x)
    outputs = {"class_index": answer_of(graph, logits), "exit": site, "score": score, "logits": logits}
    return _model(_finish(graph, inputs, outputs, 1))


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
    then = _finish(here, [], dict(zip(names, answer, strict=True)), 1)
    otherwise = _finish(later, [], dict(zip(names, _rest(later, chain, stages, index + 1, x), strict=True)), 1)
    found = graph.add_node("If", hit, outputs=3, then_branch=then, else_branch=otherwise)
    return [Value(name, value.shape) for (name, _), value in zip(found, answer, strict=True)]


def _stage(graph: Graph, chain: Chain, stage: Stage, x: Value) -> tuple[Value, Value, Value]:
    """Add a stage; return the activation behind it, logits and score."""
    *blocks, classifier = cast("Architecture", chain.network).modules("folded")
    params = jax.tree.map(np.asarray, chain.params)
    for k in range(stage.start, stage.site):
        x = emit(blocks[k], graph, params[k], x)
    if stage.cache is None:
        infinity = numpy_helper.from_array(np.full(1, np.inf, np.float32))
        batch = graph.add("Shape", x, shape=(1,), start=0, end=1)
        logits = emit(classifier, graph, params[-1], x)
        return x, logits, graph.add("ConstantOfShape", batch, shape=(), value=infinity)
    predictor, variables = fold_standardize(stage.cache.predictor, stage.cache.params["predictor"])
    variables, selector = jax.tree.map(np.asarray, (variables, stage.cache.params["selector"].get("params", {})))
    logits = emit(predictor, graph, {**variables["params"], **variables.get("points", {})}, x)
    score = emit(stage.cache.selector, graph, selector, logits)
    return x, logits, graph.add("Min", score, graph.constant(np.finfo(np.float32).max))


def _images(graph: Graph, chain: Chain, batch: int | str) -> tuple[Value, ValueInfoProto]:
    """Return the prepared images, and the input that they come from: pixels where the bundle normalises them."""
    images = Value("images", chain.input_spec.shape)
    kind = TensorProto.FLOAT if chain.normalization is None else TensorProto.UINT8
    return prepare(graph, images, chain.normalization), _info(images, kind, batch)


def _info(value: Value, kind: int, batch: int | str) -> ValueInfoProto:
    return helper.make_tensor_value_info(value.name, kind, [batch, *value.shape])


def _finish(
    graph: Graph, inputs: Sequence[ValueInfoProto], outputs: Mapping[str, Value], batch: int | str
) -> GraphProto:
    """Return the graph with outputs of these names."""
    infos = []
    for name, value in outputs.items():
        named = Value(f"{graph.prefix}{name}", value.shape)
        graph.nodes.append(helper.make_node("Identity", [value.name], [named.name]))
        kind = TensorProto.INT32 if name in {"class_index", "exit"} else TensorProto.FLOAT
        infos.append(_info(named, kind, batch))
    return helper.make_graph(graph.nodes, graph.prefix or "cascade", inputs, infos, graph.constants)


def _model(graph: GraphProto) -> ModelProto:
    opset, producer = [helper.make_opsetid("", OPSET)], {"producer_name": "gati_jax", "producer_version": __version__}
    return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, **producer)


def thresholds_of(cascade: Cascade, stages: Sequence[Stage]) -> np.ndarray:
    """Return float32[caches]: a threshold for each cache of any plan, infinity for those that are off in this one."""
    known = dict(zip((cache.name for cache in cascade.caches), np.asarray(cascade.thresholds), strict=True))
    return np.array([known.get(stage.cache.name, np.inf) for stage in stages if stage.cache], np.float32)
