"""Parts of a cascade as ONNX models: spans of the base, lookups, and the ends of graphs that they share."""

import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from flax import linen as nn
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper

from gati_jax import __version__
from gati_jax.caches import Candidate, Network, fold_standardize
from gati_jax.errors import InputError
from gati_jax.models import AnyNetwork, Chain
from gati_jax.models.chain import output_specs
from gati_jax.pytrees import call, tree_bytes

from .functions import emit_function
from .graph import Graph, Value, prepare
from .transformers import emit  # with its own modules added

OPSET, IR_VERSION = 18, 8
MOST_BYTES = 2**31 - 2**24  # of a protocol buffer, less what is no parameter
BATCH, ROWS = "batch", "rows"


def check_exportable(chain: Chain, caches: Iterable[Candidate] = ()) -> None:
    """Check that a base with these caches has an ONNX form, and that it fits into one model.

    Raises:
        InputError: It has none, or does not.
    """
    caches = tuple(caches)
    if (size := tree_bytes([chain, *caches])) > MOST_BYTES:
        raise InputError(f"bundle: expected at most {MOST_BYTES} bytes of parameters, which ONNX can hold, got {size}")
    for k in range(len(chain) + 1):
        if _module(chain, k) is None:
            _emit_part(Graph(""), chain, k, _activation(chain, k))
    for cache in caches:
        if not _known(cache.predictor) or not _known(cache.selector):
            emit_lookup(Graph(""), cache, _activation(chain, cache.site))


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
    for k in range(start, stop):
        x = _emit_part(graph, chain, k, x)
    return x


def emit_classifier(graph: Graph, chain: Chain, x: Value) -> Value:
    """Add the classifier; return its logits."""
    return _emit_part(graph, chain, len(chain), x)


def _emit_part(graph: Graph, chain: Chain, k: int, x: Value) -> Value:
    """Add block k + 1, or behind the last one the classifier."""
    params = jax.tree.map(np.asarray, chain.params[k])
    if (module := _module(chain, k)) is not None:
        return emit(module, graph, params, x)
    where, dtype = f"block {k + 1}" if k < len(chain) else "the classifier", output_specs(chain)[k].dtype
    return emit_function(graph, (*chain.blocks, chain.classifier)[k], params, x, where=where, dtype=dtype)


def _module(chain: Chain, k: int) -> nn.Module | None:
    """Return what block k + 1 or the classifier is, if ``emit`` knows it; other functions are traced."""
    module = chain.network.modules("folded")[k] if isinstance(chain.network, AnyNetwork) else None
    return module if module is not None and _known(module) else None


def _known(module: nn.Module) -> bool:
    parts = module.network.modules("folded") if isinstance(module, Network) else [module]
    return all(emit.dispatch(type(part)) is not emit.dispatch(object) for part in parts)


def emit_lookup(graph: Graph, cache: Candidate, x: Value) -> tuple[Value, Value]:
    """Add a cache's lookup; return its logits and its score."""
    predictor, variables = fold_standardize(cache.predictor, cache.params["predictor"])
    variables, selector = jax.tree.map(np.asarray, (variables, cache.params["selector"]))
    if _known(predictor):
        logits = emit(predictor, graph, {**variables["params"], **variables.get("points", {})}, x)
    else:
        function, where = functools.partial(call, predictor), f"the predictor of {cache.name}"
        logits = emit_function(graph, function, variables, x, where=where)
    if _known(cache.selector):
        score = emit(cache.selector, graph, selector.get("params", {}), logits)
    else:
        function, where = functools.partial(call, cache.selector), f"the selector of {cache.name}"
        score = emit_function(graph, function, selector, logits, where=where)
    return logits, graph.add("Min", score, graph.constant(np.finfo(np.float32).max))


def images(graph: Graph, chain: Chain, batch: int | str, dtype: np.dtype) -> tuple[Value, ValueInfoProto]:
    """Return the prepared images, and the input that they come from: pixels, or what is prepared already."""
    value = Value("images", chain.input_spec.shape)
    given = info(value, helper.np_dtype_to_tensor_dtype(dtype), batch)
    return prepare(graph, value, chain.normalization if dtype == np.uint8 else None), given


def activation(chain: Chain, site: int) -> tuple[Value, ValueInfoProto]:
    """Return the activation at a site, and the input that it comes from: channels first."""
    x = _activation(chain, site)
    return x, info(x, helper.np_dtype_to_tensor_dtype(chain.site_specs[site].dtype), BATCH)


def _activation(chain: Chain, site: int) -> Value:
    _, *shape = output_specs(chain)[site].shape
    if not shape:
        raise InputError(f"bundle: expected activations of one axis or more, for ONNX, got a number at site {site}")
    *positions, channels = shape
    return Value("activation", (channels, *positions))


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
