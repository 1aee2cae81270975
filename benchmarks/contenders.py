"""Contenders: functions from images uint8[batch, height, width, channels] to logits, each for a process of its own.

Other runtimes are imported where they are used: each process needs one of them, and few machines have all.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import gati_jax
from gati_jax import Bundle, Normalization
from gati_jax.data import Dataset, Images
from gati_jax.models import Architecture, fold, import_state_dict, read_weights, to_chain
from gati_jax.profiling import Backend

Predict = Callable[[np.ndarray], np.ndarray]


class Task(NamedTuple):
    """The inputs of every contender."""

    bundle: Path
    network: Architecture
    weights: Path
    normalization: Normalization
    cores: int
    fit: Callable[[], Dataset]  # for contenders that are trained
    select: Callable[[], Dataset]  # for contenders that are calibrated
    epsilon: float  # how often answers may differ
    folder: Path  # for files that a runtime needs


def _cascade(task: Task, *, caches: bool, backend: Backend | None = None) -> Predict:
    """Return the cascade, or the full network of the same tuning; without a backend the default one."""
    bundle = gati_jax.load_bundle(task.bundle)
    if caches:
        return lambda images: np.asarray(gati_jax.infer_batch(bundle, images, backend=backend).logits)
    if (tuned := bundle.tuned_of(None, backend)) is not None:
        full = tuned.without_caches
        return lambda images: np.asarray(full.predict(images).logits)
    closed = without_caches(bundle)
    return lambda images: np.asarray(gati_jax.infer_batch(closed, images).logits)


def without_caches(bundle: Bundle) -> Bundle:
    """Return the bundle with all its caches closed."""
    off = dataclasses.replace(bundle.certificate, step=-1, disagreements=0)
    return dataclasses.replace(bundle, certificate=off)


def _plain_jit(task: Task) -> Predict:
    chain = to_chain(
        task.network, fold(import_state_dict(task.network, read_weights(task.weights))), task.normalization
    )
    program = jax.jit(lambda chain, images: chain(chain.prepare(images)))
    return lambda images: np.asarray(program(chain, images))


def _prepared(task: Task, images: Images) -> np.ndarray:
    """Normalise in NumPy, channels first: part of every other runtime's time, as it is of ours."""
    mean, std = (np.asarray(v, np.float32) for v in (task.normalization.mean, task.normalization.std))
    x = (np.asarray(images).astype(np.float32) * np.float32(task.normalization.scale) - mean) / std
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _torch(task: Task, *, compiled: bool) -> Predict:
    torch = importlib.import_module("torch")

    load = importlib.import_module("benchmarks.torch_network").load
    torch.set_num_threads(task.cores)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load(task.network, read_weights(task.weights)).to(device)
    model: Any = torch.compile(network) if compiled else network

    def predict(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(_prepared(task, images)).to(device)).cpu().numpy()

    return predict


def _onnx_file(task: Task) -> Path:
    torch = importlib.import_module("torch")

    load = importlib.import_module("benchmarks.torch_network").load
    path = task.folder / "network.onnx"
    height, width, channels = task.network.input_shape
    torch.onnx.export(
        load(task.network, read_weights(task.weights)),
        (torch.zeros(2, channels, height, width),),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        dynamo=False,
    )
    return path


def _onnxruntime(task: Task, *, int8: bool) -> Predict:
    onnxruntime = importlib.import_module("onnxruntime")

    path = _onnx_file(task)
    if int8:
        path = _quantised(task, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.cores
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(None, {"images": _prepared(task, images)})[0])


def _one_file(task: Task) -> Predict:
    """Return the cascade as one exported model of nested Ifs, which takes one image at a time."""
    onnxruntime = importlib.import_module("onnxruntime")
    models = importlib.import_module("train.export.models")
    bundle = gati_jax.load_bundle(task.bundle)
    model = models.single_model(bundle, models.stages_of(bundle)).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.cores
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    run = functools.partial(session.run, ["logits"])
    return lambda images: np.concatenate([run({"images": images[i : i + 1]})[0] for i in range(len(images))])


def _quantised(task: Task, path: Path) -> Path:
    """Quantise to int8 as ONNX Runtime's guide does: static, calibrated on images of the select split."""
    quantization = importlib.import_module("onnxruntime.quantization")
    shapes = importlib.import_module("onnxruntime.quantization.shape_inference")

    images = task.select().images
    batches = iter([{"images": _prepared(task, images[i : i + 50])} for i in range(0, 200, 50)])
    reader = type("Reader", (quantization.CalibrationDataReader,), {"get_next": lambda _: next(batches, None)})

    prepared, quantised = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    shapes.quant_pre_process(path, prepared)
    form = quantization.QuantFormat.QDQ
    quantization.quantize_static(prepared, quantised, reader(), quant_format=form, per_channel=True)
    return quantised


def _openvino(task: Task) -> Predict:
    openvino = importlib.import_module("openvino")

    settings = {"INFERENCE_NUM_THREADS": task.cores, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(_onnx_file(task), "CPU", settings)
    return lambda images: next(iter(model(_prepared(task, images)).values()))


def _first(rows: Dataset, n: int) -> Dataset:
    return Dataset(images=rows.images[:n], labels=None if rows.labels is None else rows.labels[:n])


def _earlyon(task: Task) -> Predict:
    torch = importlib.import_module("torch")
    earlyon = importlib.import_module("benchmarks.earlyon_cascade")
    torch.set_num_threads(task.cores)
    network = importlib.import_module("benchmarks.torch_network").load(task.network, read_weights(task.weights))
    train, select = ((_prepared(task, part.images), part.labels) for part in (_first(task.fit(), 5000), task.select()))
    model = earlyon.fit(earlyon.wrap(network, task.network), train, select, drop=task.epsilon)
    return lambda images: earlyon.predict(model, _prepared(task, images))


CONTENDERS: dict[str, Callable[[Task], Predict]] = {
    "gati-jax full": functools.partial(_cascade, caches=False),
    "gati-jax cascade": functools.partial(_cascade, caches=True),
    "gati-jax full xla": functools.partial(_cascade, caches=False, backend="xla"),
    "gati-jax cascade xla": functools.partial(_cascade, caches=True, backend="xla"),
    "jax.jit full": _plain_jit,
    "onnxruntime full": functools.partial(_onnxruntime, int8=False),
    "onnxruntime cascade in one file": _one_file,
    "onnxruntime int8": functools.partial(_onnxruntime, int8=True),
    "openvino full": _openvino,
    "torch eager full": functools.partial(_torch, compiled=False),
    "earlyon cascade": _earlyon,
    "torch.compile full": functools.partial(_torch, compiled=True),
}
