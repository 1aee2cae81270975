"""An exported folder: its models, its manifest, and what holds of its answers.

cascade.onnx     one file for batch 1: nested Ifs, thresholds as an input
span_0.onnx ...  from each open cache's site to the next, with the cache's lookup; the last ends with the classifier
manifest.json    spans, plans with thresholds and promises, class names
cascade.py       runs the spans
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
import onnxruntime
from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper
from pydantic import TypeAdapter

from gati_jax import Bundle, Candidate, Certificate, Chain, InputError, __version__
from gati_jax.bundle.files import replacing
from gati_jax.bundle.manifest import read_json, write_json
from gati_jax.caches import fold_standardize
from gati_jax.certification import ArithmeticCheck, ServedBound, cascade_id, served_bound
from gati_jax.inference import Answers, check_arithmetic
from gati_jax.models import Architecture
from gati_jax.options import Strict
from gati_jax.profiling import device_name
from gati_jax.pytrees import tree_bytes
from gati_jax.runtime import Cascade

from . import cascade as runner
from .graph import Graph, Value, answer_of, emit, prepare

OPSET, IR_VERSION = 18, 8
_MOST_BYTES = 2**31 - 2**24  # of a protocol buffer, less what is no parameter
_MOST_NESTED = 24  # a protocol buffer may be 100 messages deep, and an If takes three
_CHUNK = 256
_ONE_FILE, _THRESHOLDS, ARITHMETIC = "cascade.onnx", "thresholds", "onnx"


class Stage(NamedTuple):
    """Blocks ``start + 1`` to ``site``, and what answers behind them: a cache, or in the last stage the classifier."""

    start: int
    site: int
    cache: Candidate | None


def stages_of(bundle: Bundle) -> list[Stage]:
    """Return a stage for each cache that any plan of the bundle has open, and the last one."""
    opened = {cache.name: cache for cascade in bundle.cascades.values() for cache in cascade.caches}
    caches = sorted(opened.values(), key=lambda cache: cache.site)
    sites = [*(cache.site for cache in caches), len(bundle.chain)]
    return [Stage(*row) for row in zip([0, *sites], sites, [*caches, None], strict=False)]


def _span_file(index: int) -> str:
    return f"span_{index}.onnx"


# --- Models -----------------------------------------------------------------------------------------------------------


def models_of(bundle: Bundle) -> dict[str, ModelProto]:
    """Return the models by file name; there is no single file for more caches than can be nested."""
    stages = stages_of(bundle)
    found = {_span_file(i): span_model(bundle.chain, stages[i], first=i == 0) for i in range(len(stages))}
    return found | ({_ONE_FILE: single_model(bundle, stages)} if len(stages) <= _MOST_NESTED else {})


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
    inputs, defaults = [images], _thresholds(bundle.cascade, stages)
    if len(defaults):
        graph.constants.append(numpy_helper.from_array(defaults, _THRESHOLDS))
        inputs.append(helper.make_tensor_value_info(_THRESHOLDS, TensorProto.FLOAT, defaults.shape))
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
    hit = graph.add("GreaterOrEqual", score, graph.add("Gather", Value(_THRESHOLDS, ()), graph.ints(index)))
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


def _thresholds(cascade: Cascade, stages: Sequence[Stage]) -> np.ndarray:
    """Return float32[caches]: a threshold for each cache of any plan, infinity for those that are off in this one."""
    known = dict(zip((cache.name for cache in cascade.caches), np.asarray(cascade.thresholds), strict=True))
    return np.array([known.get(stage.cache.name, np.inf) for stage in stages if stage.cache], np.float32)


class Compared(Strict):
    """Models of a bundle that were compared with the certified arithmetic, by their digests, in order."""

    programs: tuple[str, ...] = ()


# --- The folder -------------------------------------------------------------------------------------------------------


def export_bundle(
    bundle: Bundle, path: Path, *, images: np.ndarray | None = None, why: str = "", counts: Path | None = None
) -> dict[str, Any]:
    """Write the cascades of a bundle as ONNX models, and what holds of their answers.

    Args:
        bundle: Its base must be a network of this library.
        path: The folder; an earlier export there is replaced as a whole.
        images: The certify rows, on which the exported models are compared with the certified arithmetic, see
            ``check_arithmetic``.
        why: Why there are no images.
        counts: The file that numbers the exports of the bundle which were compared, so that delta holds for all of
            them; None: there is no other, on your word.

    Returns:
        The manifest.

    Raises:
        InputError: The bundle cannot be exported, the images prove nothing, or ``path`` is something else.
    """
    check_exportable(bundle.chain.network)
    if (size := tree_bytes([bundle.chain, *bundle.caches])) > _MOST_BYTES:
        raise InputError(f"bundle: expected at most {_MOST_BYTES} bytes of parameters, which ONNX can hold, got {size}")
    if path.exists() and not (path.is_dir() and ((path / "span_0.onnx").is_file() or not any(path.iterdir()))):
        raise InputError(f"out: expected an export or nothing at {path}, got something else, which is left alone")
    models = models_of(bundle)
    with replacing(path) as folder:
        _write(folder, models, _manifest(bundle, {}, why))
        promised = len(bundle.compared) > 1  # else there is nothing to keep
        checks = _checks(bundle, images, folder, models, counts) if images is not None and promised else {}
        manifest = _manifest(bundle, checks, why)
        promises = json.dumps({name: plan["promise"] for name, plan in manifest["plans"].items()})
        for model in models.values():
            helper.set_model_props(model, {"gati_jax.promises": promises})
        _write(folder, models, manifest)
    return manifest


def check_exportable(network: object) -> None:
    """Check that a base has an ONNX form.

    Raises:
        InputError: It is a user's own chain, whose functions are not known.
    """
    if not isinstance(network, Architecture):
        raise InputError(
            "bundle: expected a base that is a ResNet or a VGG of this library, got a user's own chain: its functions"
            " cannot be exported"
        )


def _write(folder: Path, models: Mapping[str, ModelProto], manifest: Mapping[str, Any]) -> None:
    for name, model in models.items():
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    shutil.copyfile(runner.__file__, folder / "cascade.py")


def _manifest(bundle: Bundle, checks: Mapping[str, ArithmeticCheck], why: str) -> dict[str, Any]:
    chain, stages = bundle.chain, stages_of(bundle)
    plans = {}
    for name, certificate in bundle.certificates.items():
        bound = _bound(certificate, checks.get(cascade_id(certificate)), why)
        thresholds = [None if np.isinf(t) else float(t) for t in _thresholds(bundle.cascades[name], stages)]
        records = {"bound": _plain(bound), "certificate": _plain(certificate)}
        plans[name] = {"thresholds": thresholds, "promise": str(bound), **records}
    return {
        "format_version": 1,
        "opset": OPSET,
        "onnxruntime": onnxruntime.__version__ if checks else "",
        "input": {
            "dtype": "float32" if chain.normalization is None else "uint8",
            "shape": list(chain.input_spec.shape),
        },
        "normalization": _plain(chain.normalization) if chain.normalization else None,
        "classes": chain.classes,
        "class_names": list(bundle.class_names),
        "one_file": _ONE_FILE if len(stages) <= _MOST_NESTED else None,
        "spans": [
            {"file": _span_file(i), "start": s.start, "site": s.site, "cache": s.cache.name if s.cache else None}
            for i, s in enumerate(stages)
        ],
        "plans": plans,
    }


def _plain(record: object) -> Any:  # noqa: ANN401 (what JSON knows)
    return TypeAdapter(type(record)).dump_python(record, mode="json")


def _bound(certificate: Certificate, check: ArithmeticCheck | None, why: str) -> ServedBound:
    """Return what holds of the exported answers, which are in another arithmetic than the certified one."""
    bound = served_bound(certificate, ARITHMETIC, check)
    if bound.epsilon is not None or bound.why:
        return bound
    if not certificate.certified:
        why = "no plan is certified"
    elif certificate.by_group:
        why = "the certificate is by groups, and rows were compared one by one"
    return replace(bound, why=why or "its answers were not compared with the certified arithmetic's")


def _checks(
    bundle: Bundle, images: np.ndarray, folder: Path, models: Mapping[str, ModelProto], counts: Path | None
) -> dict[str, ArithmeticCheck]:
    """Compare the models in a folder with the certified arithmetic."""
    device = f"onnxruntime {onnxruntime.__version__} on a CPU, reference on {device_name()}"
    digest = hashlib.sha256(device.encode())
    for model in models.values():
        digest.update(model.SerializeToString(deterministic=True))
    programs, stages = digest.hexdigest()[:32], stages_of(bundle)

    def each_way(cascade: Cascade, rows: np.ndarray) -> Iterator[Answers]:
        thresholds = _thresholds(cascade, stages)
        spans = runner.Cascade(folder)
        spans.thresholds = np.append(thresholds, np.float32(-np.inf))
        for size in (_CHUNK, 1):
            parts = [spans.predict(rows[i : i + size]) for i in range(0, len(rows), size)]
            yield runner.Prediction(*map(np.concatenate, zip(*parts, strict=True)))
        if _ONE_FILE in models:
            yield answer_one_by_one(folder / _ONE_FILE, rows, thresholds)

    what = {"arithmetic": ARITHMETIC, "programs": programs, "device": device, "number": _number(counts, programs)}
    return {check.cascade: check for check in check_arithmetic(bundle, images, each_way, **what)}


def answer_one_by_one(file: Path, images: np.ndarray, thresholds: np.ndarray) -> runner.Prediction:
    """Answer images by the single file, one after another."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that thresholds can be given
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {_THRESHOLDS: thresholds} if len(thresholds) else {}
    rows = [session.run(None, {"images": images[i : i + 1], **given}) for i in range(len(images))]
    return runner.Prediction(*map(np.concatenate, zip(*rows, strict=True)))


def _number(counts: Path | None, programs: str) -> int:
    """Return j: these are the j-th models of the bundle that are compared. It is noted before anything is seen."""
    if counts is None:
        return 1
    known = read_json(counts, Compared).programs if counts.is_file() else ()
    if programs not in known:
        known = (*known, programs)
        write_json(counts, Compared(programs=known))
    return 1 + known.index(programs)
