"""A cascade by each of its drivers beside the full network, in batches of several sizes, float32 and bfloat16.

Everything runs in turns in this process, on the same images of the test split, others in every turn: the drivers with
the compiler options that tuning tries (see ``DRIVERS``), the full network by ``jax.jit`` (in float32, as a cascade
computes, in bfloat16, and in the device's default precision, which on GPUs is less), and PyTorch's compiled network and
ONNX Runtime on the GPU where they can be imported. Times are of a batch, the mean over a turn's images, of which there
are ``REQUESTS`` or more; the copies of uint8 images to the device and of the answers back are part of them. The result
is written after each batch size, so that what was measured is kept if time runs out; what has not been compiled by then
is left out.
"""

import argparse
import dataclasses
import functools
import importlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
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
REQUESTS = 16  # in a turn, at least: what a cascade takes depends on the image
FULL = {"float32": "jit full float32", "bfloat16": "jit full bfloat16"}
Images = np.ndarray
Call = Callable[[Images], object]


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="of the test split, if it has moved")
    p.add_argument("--batches", type=cli.positive, nargs="+", default=BATCHES, metavar="N")
    p.add_argument("--rounds", type=cli.positive, default=21, metavar="N", help="interleaved repeats (default: 21)")
    p.add_argument("--seconds", type=float, default=1e9, metavar="S", help="begin nothing new after these")
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    arguments = p.parse_args(argv)
    cli.report(measure(arguments), show, out=arguments.out, as_json=arguments.json)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time everything, one batch size after another."""
    began, bundle = time.monotonic(), gati_jax.load_bundle(arguments.bundle)
    config = build_config(bundle.provenance.config)
    images = np.asarray(config.data.load(config.data.splits.test, arguments.data_dir).images)
    result: dict[str, Any] = {"network": config.base.network, "device": device_name(), "versions": cli.versions()}
    result |= {"answers": answers(bundle, images[:1000]), "rows": [], "left_out": {}}
    for batch in arguments.batches:
        turns = turns_of(images, batch, arguments.rounds + 1)  # one to warm up
        left_out: dict[str, str] = {}
        calls: dict[str, Callable[[], object]] = {}
        for name, call in contenders(bundle, config.base, batch, left_out):
            if time.monotonic() - began > arguments.seconds:
                left_out[name] = "no time was left"
            elif ready := _started(name, call, turns[0][0], left_out):
                calls[name] = _Turns(ready, turns)
        result["left_out"] |= {f"{name}, batch {batch}": why for name, why in left_out.items()}
        if FULL["float32"] not in calls:
            continue
        times = {n: ms / len(turns[0]) for n, ms in time_interleaved(calls, rounds=arguments.rounds).items()}
        for name, ms in times.items():
            row = {"batch": batch, "contender": name, "ms": float(np.median(ms)), "spread": spread(ms)}
            own = times.get(FULL["bfloat16" if "bfloat16" in name else "float32"])
            row["over_same_numerics"] = None if own is None else float(np.median(own / ms))
            result["rows"].append(row | {"speedup": float(np.median(times[FULL["float32"]] / ms))})
        if arguments.out:
            write_atomically(arguments.out, json.dumps(result, indent=2).encode())
    return result


def turns_of(images: Images, batch: int, turns: int) -> list[list[Images]]:
    """Return the batches of every turn: other images each time, from the first again after the last."""
    each = max(1, -(-REQUESTS // batch))
    rows = np.arange(turns * each * batch) % len(images)
    return [[images[some] for some in turn] for turn in rows.reshape(turns, each, batch)]


class _Turns:
    """A call that answers the batches of the next turn whenever it is called."""

    def __init__(self, call: Call, turns: Sequence[Sequence[Images]]) -> None:
        self._call, self._turns = call, itertools.cycle(turns)

    def __call__(self) -> None:
        for images in next(self._turns):
            jax.block_until_ready(self._call(images))


def answers(bundle: Bundle, images: Images) -> dict[str, Any]:
    """Return, for each numerics that is certified, its promise, its caches, and where these images leave."""
    base = gati_jax.replay(bundle.chain, (), images).answers
    found: dict[str, Any] = {}
    numerics: list[Numerics] = ["reference"]
    if any(one.certified for one in bundle.bfloat16):
        numerics.append("bfloat16")
    for name in numerics:
        answer = gati_jax.infer_batch(bundle, images, numerics=name)
        cascade = bundle.cascade if name == "reference" else bundle.bfloat16_of().cascade
        stops = (*cascade.sites, len(bundle.chain))
        found[name] = {
            "agreement": float(np.mean(np.asarray(answer.class_index) == base)),
            "promise": str(bundle.bound_of(None, name)),
            "exits": {str(site): float(np.mean(np.asarray(answer.exit) == site)) for site in stops},
        }
    return found


def contenders(
    bundle: Bundle,
    base: Any,  # noqa: ANN401 (a config)
    batch: int,
    left_out: dict[str, str],
) -> Iterator[tuple[str, "Call | _Built"]]:
    """Yield calls by name, or what builds one; what this compiler cannot run goes to ``left_out``.

    A cascade without a certificate in bfloat16 is timed under the thresholds of float32, and its name says so.
    """
    certified = next((one for one in bundle.bfloat16 if one.certified), None)
    half = bundle.bfloat16_of(certified.name).cascade if certified else cascade_in_bfloat16(bundle.cascade)
    cascades = {"float32": (bundle.cascade, ()), "bfloat16": (half, ROUNDED)}
    chains = {"float32": (_exactly, pack(bundle.chain)), "bfloat16": (_rounding, pack(in_bfloat16(bundle.chain)))}
    for dtype, (cascade, more) in cascades.items():
        yield FULL[dtype], functools.partial(_full, *chains[dtype], options=more)
        tiled, uncertified = _tiled(cascade, batch), "" if dtype == "float32" or certified else ", not certified"
        for driver, options in (("loop", ()), *DRIVERS["gpu"]):
            name = f"{driver}{' captured' if options else ''} {dtype}{uncertified}"
            try:
                known = known_options(options, jax.default_backend())
            except InputError as error:
                left_out[name] = str(error)
                continue
            yield name, functools.partial(_drive, driver, (cascade, tiled), options=(*known, *more))
    yield "jit full default precision", functools.partial(_full, _rounding, pack(bundle.chain))
    for dtype in ("float32", "bfloat16"):
        yield f"torch.compile full {dtype}", _Built(functools.partial(_torch, bundle, base, dtype))
    yield "onnxruntime full float32", _Built(functools.partial(_onnxruntime, bundle))


@dataclasses.dataclass
class _Built:
    """What builds a call."""

    build: Callable[[], Call]


def _started(name: str, call: Call | _Built, images: Images, left_out: dict[str, str]) -> Call | None:
    """Run a call three times, for a captured loop may fail the second time; keep what it says if it cannot run."""
    try:
        ready = call.build() if isinstance(call, _Built) else call
        for _ in range(3):
            jax.block_until_ready(ready(images))
    except Exception as error:  # noqa: BLE001 (any runtime's; the others go on)
        first = next(iter(str(error).strip().splitlines()), "")
        left_out[name] = f"{type(error).__name__}: {first}"[:300]
        return None
    return ready


def _drive(
    driver: str, cascades: tuple[Cascade, BatchedCascade], images: Images, *, options: CompilerOptions
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
    function: Callable[..., jax.Array], packed: Packed[Chain], images: Images, *, options: CompilerOptions = ()
) -> np.ndarray:
    return np.asarray(compiled(function, options)(packed, images))


def _torch(bundle: Bundle, base: Any, dtype: str) -> Call:  # noqa: ANN401 (a config)
    """Return PyTorch's compiled network of the same shape, of which only the time is of interest.

    It gets pixels, and normalises them itself; float32 is true float32, as ours is, and not TF32.
    """
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise InputError("torch: expected a GPU, got none")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    number = getattr(torch, dtype)
    network: Any = (
        importlib.import_module("benchmarks.torch_network").build(base.architecture()).eval().cuda().to(number)
    )
    norm = bundle.chain.normalization
    if norm is None:
        raise InputError("torch: expected a network of pixels, got one of prepared inputs")
    scale, mean, std = (torch.tensor(np.asarray(v, np.float32)).cuda() for v in (norm.scale, norm.mean, norm.std))

    def full(pixels: Any) -> Any:  # noqa: ANN401 (tensors)
        return network(((pixels * scale - mean) / std).permute(0, 3, 1, 2).to(number))

    step = torch.compile(full, mode="reduce-overhead")

    def call(images: Images) -> np.ndarray:
        with torch.inference_mode():
            return step(torch.from_numpy(images).cuda()).float().cpu().numpy()

    return call


def _onnxruntime(bundle: Bundle) -> Call:
    """Return the network on ONNX Runtime by TensorRT or CUDA."""
    runtime = importlib.import_module("onnxruntime")
    there = runtime.get_available_providers()
    providers = [p for p in ("TensorrtExecutionProvider", "CUDAExecutionProvider") if p in there]
    if not providers:
        raise InputError(f"onnxruntime: expected a provider for GPUs, got {', '.join(there)}")
    models = importlib.import_module("gati_jax.export.models")
    model = models.span_model(bundle.chain, 0, len(bundle.chain), inputs=np.dtype(np.uint8)).SerializeToString()
    session = runtime.InferenceSession(model, providers=providers)
    return lambda images: session.run(["next"], {"images": images})[0]


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    rows = [
        (
            str(row["batch"]), row["contender"], f"{row['ms']:.3f}", f"{row['speedup']:.2f}",
            "-" if row["over_same_numerics"] is None else f"{row['over_same_numerics']:.2f}", f"{row['spread']:.0%}",
        )
        for row in result["rows"]
    ]  # fmt: skip
    columns = ("batch", "contender", "ms", "over jit full float32", "over its own numerics' full", "spread")
    cli.show(f"drivers on {result['device']}", columns, rows)
    for name, about in result["answers"].items():
        shares = ", ".join(f"{share:.0%} at {site}" for site, share in about["exits"].items())
        print(f"{name}: {about['promise']}; leave: {shares}")
    for name, why in result["left_out"].items():
        print(f"{name} is left out: {why}")


if __name__ == "__main__":
    cli.run(main)
