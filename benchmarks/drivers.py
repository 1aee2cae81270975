"""A cascade by each of its drivers beside the full network, in batches of several sizes, float32 and bfloat16.

Everything runs in turns in this process, on the same images of the test split: the drivers with the compiler options
that tuning tries (see ``DRIVERS``), the full network by ``jax.jit`` (in float32, as a cascade computes, and in
the device's default precision, which on GPUs is less), and PyTorch's compiled network and ONNX Runtime on
the GPU where they can be imported. Times include the copy of uint8 images to the device and of the answers back. The
result is written after each batch size, so that what was measured is kept if time runs out.
"""

import argparse
import functools
import importlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import gati_jax
from gati_jax import Bundle, Chain, InputError
from gati_jax.files import write_atomically
from gati_jax.inference import Numerics
from gati_jax.models import in_bfloat16
from gati_jax.models.chain import reference
from gati_jax.profiling import device_name, time_interleaved
from gati_jax.profiling.bfloat16 import cascade_in_bfloat16
from gati_jax.profiling.compiler import DRIVERS, ROUNDED, known_options
from gati_jax.profiling.costs import spread
from gati_jax.pytrees import Packed, pack, unpack
from gati_jax.runtime import Cascade, CompilerOptions, Prediction, compiled
from gati_jax.runtime.batched import BatchedCascade, Schedule, predict_tiled
from gati_jax.runtime.branches import predict_nested
from gati_jax.runtime.cascade import predict_only
from gati_jax.runtime.hosted import predict_hosted
from train import cli
from train.config import build_config

EXAMPLE = "python -m benchmarks.drivers --bundle runs/gpu/resnet18/caches/bundle --out drivers.json"
BATCHES = (1, 64, 256, 8, 1024)  # those that matter most come first
Images = np.ndarray
Call = Callable[[], object]


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="of the test split, if it has moved")
    p.add_argument("--batches", type=cli.positive, nargs="+", default=BATCHES, metavar="N")
    p.add_argument("--rounds", type=cli.positive, default=21, metavar="N", help="interleaved repeats (default: 21)")
    p.add_argument("--seconds", type=float, default=1e9, metavar="S", help="begin no other batch size after these")
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    arguments = p.parse_args(argv)
    cli.report(measure(arguments), show, out=arguments.out, as_json=arguments.json)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time everything, one batch size after another."""
    began, bundle = time.monotonic(), gati_jax.load_bundle(arguments.bundle)
    config = build_config(bundle.provenance.config)
    images = config.data.load(config.data.splits.test, arguments.data_dir).images
    result: dict[str, Any] = {"network": config.base.network, "device": device_name(), "versions": cli.versions()}
    result |= {"agreement": agreements(bundle, images[:1000]), "rows": [], "left_out": {}}
    for batch in arguments.batches:
        if time.monotonic() - began > arguments.seconds:
            result["left_out"][f"batch {batch}"] = "no time was left"
            continue
        some = np.resize(images, (batch, *images.shape[1:]))
        calls = contenders(bundle, config.base, some, result["left_out"])
        times = time_interleaved(calls, rounds=arguments.rounds, progress=False)
        full = np.array(times["jit full float32"])
        for name, ms in times.items():
            row = {"batch": batch, "contender": name, "ms": float(np.median(ms)), "spread": spread(ms)}
            result["rows"].append(row | {"speedup": float(np.median(full / np.array(ms)))})
        if arguments.out:
            write_atomically(arguments.out, json.dumps(result, indent=2).encode())
    return result


def agreements(bundle: Bundle, images: Images) -> dict[str, float]:
    """Return how many answers of each numerics are the float32 base's."""
    base = gati_jax.replay(bundle.chain, (), images).answers
    numerics: list[Numerics] = ["reference"]
    if any(one.certified for one in bundle.bfloat16):
        numerics.append("bfloat16")
    answers = {name: gati_jax.infer_batch(bundle, images, numerics=name).class_index for name in numerics}
    return {name: float(np.mean(np.asarray(found) == base)) for name, found in answers.items()}


def contenders(bundle: Bundle, base: Any, images: Images, left_out: dict[str, str]) -> Mapping[str, Call]:  # noqa: ANN401
    """Return calls by name, each run once; what cannot run goes to ``left_out``."""
    exact = bundle.cascade
    certified = next((one for one in bundle.bfloat16 if one.certified), None)
    half = bundle.bfloat16_of(certified.name).cascade if certified else cascade_in_bfloat16(exact)
    tried: dict[str, Call] = {
        "jit full float32": functools.partial(_full, _exactly, pack(bundle.chain), images),
        "jit full default precision": functools.partial(_full, _rounding, pack(bundle.chain), images),
        "jit full bfloat16": functools.partial(_full, _rounding, pack(in_bfloat16(bundle.chain)), images, ROUNDED),
    }
    drivers = [("loop", ()), *DRIVERS["gpu"]]
    for dtype, cascade, more in (("float32", exact, ()), ("bfloat16", half, ROUNDED)):
        tiled = _tiled(cascade, len(images))
        for driver, options in drivers:
            try:
                known = known_options(options, jax.default_backend())
            except InputError as error:
                left_out[f"{driver} {dtype}"] = str(error)
                continue
            name = f"{driver}{' captured' if known else ''} {dtype}"
            tried[name] = functools.partial(_drive, driver, (cascade, tiled), images, (*known, *more))
    tried["torch.compile full float32"] = functools.partial(_torch, bundle, base, images)
    tried["onnxruntime full float32"] = functools.partial(_onnxruntime, bundle, images)
    return {name: call for name, call in map(_started, tried.items(), [left_out] * len(tried)) if call is not None}


def _started(item: tuple[str, Call], left_out: dict[str, str]) -> tuple[str, Call | None]:
    """Run a call twice, for a captured loop may fail the second time; keep what it says if it cannot run."""
    name, call = item
    try:
        ready = call()
        ready = ready if callable(ready) else call
        for _ in range(2):
            jax.block_until_ready(ready())
    except Exception as error:  # noqa: BLE001 (any runtime's; the others go on)
        left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[
            :300
        ]
        return name, None
    return name, ready


def _drive(
    driver: str, cascades: tuple[Cascade, BatchedCascade], images: Images, options: CompilerOptions
) -> Prediction:
    (cascade, tiled), n = cascades, len(images)
    if driver == "nest":
        found = predict_nested(cascade, images, n, options)
    elif driver == "host":
        found = predict_hosted(cascade, images, n, options)
    elif n == 1:
        found = predict_only(cascade, images, options)
    else:
        found = predict_tiled(tiled, images, n, options)
    return jax.device_get(found)


def _tiled(cascade: Cascade, batch: int) -> BatchedCascade:
    """Return a cascade in tiles of the whole batch, a quarter and a sixteenth, by guessed times."""
    sizes = {batch, max(1, batch // 4), max(1, batch // 16)}
    return BatchedCascade.of(cascade, Schedule.of({size: 1 + size / 64 for size in sizes}))


def _rounding(packed: Packed[Chain], images: jax.Array) -> jax.Array:
    chain = unpack(packed)
    return chain(chain.prepare(images))


@reference
def _exactly(packed: Packed[Chain], images: jax.Array) -> jax.Array:
    return _rounding(packed, images)


def _full(
    function: Callable[..., jax.Array], packed: Packed[Chain], images: Images, options: CompilerOptions = ()
) -> np.ndarray:
    return np.asarray(compiled(function, options)(packed, images))


def _torch(bundle: Bundle, base: Any, images: Images) -> Call:  # noqa: ANN401 (a config)
    """Return a call of PyTorch's compiled network of the same shape, of which only the time is of interest."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise InputError("torch: expected a GPU, got none")
    network: Any = importlib.import_module("benchmarks.torch_network").build(base.architecture()).eval().cuda()
    step = torch.compile(network, mode="reduce-overhead")

    def call() -> np.ndarray:
        x = np.ascontiguousarray(np.asarray(bundle.chain.prepare(images)).transpose(0, 3, 1, 2))
        with torch.inference_mode():
            return step(torch.from_numpy(x).cuda()).cpu().numpy()

    return call


def _onnxruntime(bundle: Bundle, images: Images) -> Call:
    """Return a call of ONNX Runtime by TensorRT or CUDA."""
    runtime = importlib.import_module("onnxruntime")
    providers = [
        p for p in ("TensorrtExecutionProvider", "CUDAExecutionProvider") if p in runtime.get_available_providers()
    ]
    if not providers:
        raise InputError(
            f"onnxruntime: expected a provider for GPUs, got {', '.join(runtime.get_available_providers())}"
        )
    models = importlib.import_module("gati_jax.export.models")
    model = models.span_model(bundle.chain, 0, len(bundle.chain), inputs=images.dtype).SerializeToString()
    session = runtime.InferenceSession(model, providers=providers)
    return lambda: session.run(["next"], {"images": images})[0]


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    rows = [
        (str(row["batch"]), row["contender"], f"{row['ms']:.3f}", f"{row['speedup']:.2f}", f"{row['spread']:.0%}")
        for row in result["rows"]
    ]
    cli.show(f"drivers on {result['device']}", ("batch", "contender", "ms", "over jit full float32", "spread"), rows)
    for name, why in result["left_out"].items():
        print(f"{name} is left out: {why}")


if __name__ == "__main__":
    cli.run(main)
