"""Parts of a cascade as ONNX models: spans of the base, lookups, and the ends of graphs that they share."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import jax
import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from gati_jax import __version__
from gati_jax.caches import Candidate, Network, fold_standardize
from gati_jax.errors import InputError
from gati_jax.models import AnyNetwork, Architecture, Chain
from gati_jax.pytrees import tree_bytes

from .graph import Graph, Value, prepare
from .transformers import emit  # with its own modules added

OPSET, IR_VERSION = 18, 8
MOST_BYTES = 2**31 - 2**24  # of a protocol buffer, less what is no parameter
BATCH, ROWS = "batch", "rows"


def why_not(network: object, caches: Iterable[Candidate] = ()) -> str:
    """Return why a base of this network with these caches has no ONNX form; empty if it has one."""
    if not isinstance(network, AnyNetwork):
        return (
            "expected a base that is a network of this library, got a user's own chain: its functions cannot be"
            " exported"
        )
    caches = tuple(caches)
    predictors, selectors = [cache.predictor for cache in caches], [cache.selector for cache in caches]
    networks = [network, *(predictor.network for predictor in predictors if isinstance(predictor, Network))]
    modules = [module for each in networks for module in each.modules("folded")]
    kinds = {type(module) for module in (*modules, *predictors, *selectors)}
    unknown = sorted(kind.__name__ for kind in kinds if emit.dispatch(kind) is emit.dispatch(object))
    return f"expected modules that can be exported, got a {unknown[0]}, which has no ONNX form" if unknown else ""


def check_exportable(chain: Chain, caches: Iterable[Candidate] = ()) -> None:
    """Check that a base with these caches has an ONNX form, and that it fits into one model.

    Raises:
        InputError: It has none, or does not.
    """
    caches = tuple(caches)
    if why := why_not(chain.network, caches):
        raise InputError(f"bundle: {why}")
    if (size := tree_bytes([chain, *caches])) > MOST_BYTES:
        raise InputError(f"bundle: expected at most {MOST_BYTES} bytes of parameters, which ONNX can hold, got {size}")


def span_model(chain: Chain, start: int, stop: int, *, inputs: np.dtype | None = None) -> ModelProto:
    """Return the base from site ``start`` to site ``stop``, for any number of rows; N includes the classifier.

    Args:
        chain: The base.
        start: Where it begins.
        stop: Where it ends.
        inputs: The dtype of images, which the span then takes; None: it takes activations at ``start`` and the indices
            of the rows to run.
    """
    graph = Graph("")
    if inputs is not None:
        x, given = images(graph, chain, BATCH, inputs)
        infos = [given]
    else:
        x, given = activation(chain, start)
        infos = [given, helper.make_tensor_value_info(ROWS, TensorProto.INT64, [ROWS])]
        x = graph.add("Gather", x, Value(ROWS, ()), axis=0)
    x = emit_blocks(graph, chain, start, stop, x)
    if stop == len(chain):
        x = emit_classifier(graph, chain, x)
    return model(finish(graph, infos, {"next": x}, BATCH if inputs is not None else ROWS))


def lookup_model(chain: Chain, cache: Candidate) -> ModelProto:
    """Return a lookup for any number of rows: from activations to logits and score."""
    graph = Graph("")
    x, given = activation(chain, cache.site)
    logits, score = emit_lookup(graph, cache, x)
    return model(finish(graph, [given], {"logits": logits, "score": score}, BATCH))


def emit_blocks(graph: Graph, chain: Chain, start: int, stop: int, x: Value) -> Value:
    """Add blocks ``start + 1`` to ``stop``."""
    modules = cast("Architecture", chain.network).modules("folded")
    for k in range(start, stop):
        x = emit(modules[k], graph, jax.tree.map(np.asarray, chain.params[k]), x)
    return x


def emit_classifier(graph: Graph, chain: Chain, x: Value) -> Value:
    """Add the classifier; return its logits."""
    *_, classifier = cast("Architecture", chain.network).modules("folded")
    return emit(classifier, graph, jax.tree.map(np.asarray, chain.params[-1]), x)


def emit_lookup(graph: Graph, cache: Candidate, x: Value) -> tuple[Value, Value]:
    """Add a cache's lookup; return its logits and its score."""
    predictor, variables = fold_standardize(cache.predictor, cache.params["predictor"])
    variables, selector = jax.tree.map(np.asarray, (variables, cache.params["selector"].get("params", {})))
    logits = emit(predictor, graph, {**variables["params"], **variables.get("points", {})}, x)
    score = emit(cache.selector, graph, selector, logits)
    return logits, graph.add("Min", score, graph.constant(np.finfo(np.float32).max))


def images(graph: Graph, chain: Chain, batch: int | str, dtype: np.dtype) -> tuple[Value, ValueInfoProto]:
    """Return the prepared images, and the input that they come from: pixels, or what is prepared already."""
    value = Value("images", chain.input_spec.shape)
    pixels = dtype == np.uint8
    given = info(value, TensorProto.UINT8 if pixels else TensorProto.FLOAT, batch)
    return prepare(graph, value, chain.normalization if pixels else None), given


def activation(chain: Chain, site: int) -> tuple[Value, ValueInfoProto]:
    """Return the activation at a site, and the input that it comes from: channels first."""
    *positions, channels = chain.site_specs[site].shape
    x = Value("activation", (channels, *positions))
    return x, info(x, TensorProto.FLOAT, BATCH)


def info(value: Value, kind: int, batch: int | str) -> ValueInfoProto:
    """Describe an input or an output."""
    return helper.make_tensor_value_info(value.name, kind, [batch, *value.shape])


def finish(
    graph: Graph, inputs: Sequence[ValueInfoProto], outputs: Mapping[str, Value], batch: int | str
) -> GraphProto:
    """Return the graph with outputs of these names."""
    infos = []
    for name, value in outputs.items():
        named = Value(f"{graph.prefix}{name}", value.shape)
        graph.nodes.append(helper.make_node("Identity", [value.name], [named.name]))
        kind = TensorProto.INT32 if name in {"class_index", "exit"} else TensorProto.FLOAT
        infos.append(info(named, kind, batch))
    return helper.make_graph(graph.nodes, graph.prefix or "cascade", inputs, infos, graph.constants)


def model(graph: GraphProto) -> ModelProto:
    """Return a graph as a model."""
    opset, producer = [helper.make_opsetid("", OPSET)], {"producer_name": "gati_jax", "producer_version": __version__}
    return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, **producer)
