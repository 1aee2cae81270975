"""The served model, as the protocol's metadata, configuration and statistics describe it."""

import dataclasses
import functools
import json
import math
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple, Self

from ..engine.records import Step
from .messages import (
    BatchStatistics,
    ConfigParameter,
    ConfigTensor,
    Duration,
    InferStatistics,
    ModelConfig,
    ModelMetadata,
    Statistics,
    TensorMetadata,
    UnknownModelError,
)

BYTES = "BYTES"
PLATFORM = "gati_jax"
_CONFIG_TYPES = {"UINT8": "TYPE_UINT8", "INT32": "TYPE_INT32", "FP32": "TYPE_FP32", BYTES: "TYPE_STRING"}


class Bound(NamedTuple):
    """What is promised: at most epsilon of all requests disagree with the base, with confidence 1 - delta."""

    epsilon: float
    delta: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle as clients know it."""

    name: str
    version: str
    input_shape: tuple[int, ...]
    input_name: str = "images"
    datatypes: tuple[str, ...]
    """Datatypes of images, the preferred one first."""
    classes: int
    class_names: tuple[str, ...] = ()
    plans: tuple[str, ...]
    """The name of every route."""
    bounds: Mapping[str, Bound]
    """The certified bounds, by plan; plans without one are left out."""
    max_rows: int
    """The most images in a request."""
    normalization: Mapping[str, object] | None = None
    """How UINT8 pixels become FP32 inputs, in the names of ``gati_jax.Normalization``."""
    numerics: str = "reference"
    """The arithmetic that answers: the certified one, or "fast", whose bounds include what its check adds."""

    @functools.cached_property
    def names(self) -> list[bytes]:
        """The class names, or the numbers of the classes where they have none."""
        return [name.encode() for name in self.class_names] or [str(i).encode() for i in range(self.classes)]

    @property
    def most_numbers(self) -> int:
        """The most numbers in the images of one request."""
        return self.max_rows * math.prod(self.input_shape)

    @property
    def outputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """By output, its datatype and its shape without the number of images."""
        return {
            "class_index": ("INT32", ()),
            "class_name": (BYTES, ()),
            "probabilities": ("FP32", (self.classes,)),
            "logits": ("FP32", (self.classes,)),
            "exit": ("INT32", ()),
            "score": ("FP32", ()),
        }

    def check(self, name: str, version: str = "") -> Self:
        """Return the model, if it is the one that a request names.

        Raises:
            UnknownModelError: It is another model or version.
        """
        if name != self.name:
            raise UnknownModelError(f"model: expected {self.name!r}, got {name[:100]!r}")
        if version not in {"", self.version}:
            raise UnknownModelError(f"version: expected {self.version!r}, got {version[:100]!r}")
        return self

    def metadata(self) -> ModelMetadata:
        """Describe inputs and outputs."""
        return ModelMetadata(
            name=self.name,
            versions=[self.version],
            platform=PLATFORM,
            inputs=[TensorMetadata(name=self.input_name, datatype=self.datatypes[0], shape=[-1, *self.input_shape])],
            outputs=[
                TensorMetadata(name=name, datatype=datatype, shape=[-1, *shape])
                for name, (datatype, shape) in self.outputs.items()
            ],
        )

    def config(self) -> ModelConfig:
        """Describe the model as perf_analyzer reads it; parameters hold what the protocol has no field for."""
        bounds = {plan: self.bounds[plan]._asdict() if plan in self.bounds else None for plan in self.plans}
        facts = {"datatypes": ",".join(self.datatypes), "plans": json.dumps(bounds), "numerics": self.numerics}
        if self.normalization is not None:
            facts["normalization"] = json.dumps(self.normalization)
        return ModelConfig(
            name=self.name,
            platform=PLATFORM,
            backend=PLATFORM,
            max_batch_size=self.max_rows,
            input=[
                ConfigTensor(
                    name=self.input_name, data_type=_CONFIG_TYPES[self.datatypes[0]], dims=list(self.input_shape)
                )
            ],
            output=[
                ConfigTensor(name=name, data_type=_CONFIG_TYPES[datatype], dims=list(shape))
                for name, (datatype, shape) in self.outputs.items()
            ],
            parameters={key: ConfigParameter(string_value=value) for key, value in facts.items()},
        )


class Times(NamedTuple):
    """The parts of a request's time, in seconds."""

    total: float
    decoding: float
    computing: float  # in steps, of the row that spent most time there
    encoding: float


class Tally:
    """Adds up requests, from the event loop's thread, and steps, from the engine's thread."""

    def __init__(self) -> None:
        """Start at zero."""
        self._lock = threading.Lock()
        self._steps: dict[int, tuple[int, float]] = {}  # by rows: count, seconds
        self._answered = self._images = self._failed = self._last_ms = 0
        self._times = Times(0.0, 0.0, 0.0, 0.0)
        self._failing = 0.0

    def step(self, step: Step, seconds: float) -> None:
        """Count a step."""
        with self._lock:
            count, total = self._steps.get(len(step.jobs), (0, 0.0))
            self._steps[len(step.jobs)] = (count + 1, total + seconds)

    def answered(self, rows: int, times: Times) -> None:
        """Count an answered request."""
        with self._lock:
            self._answered += 1
            self._images += rows
            self._last_ms = time.time_ns() // 1_000_000
            self._times = Times(*(a + b for a, b in zip(self._times, times, strict=True)))

    def failed(self, seconds: float) -> None:
        """Count a failed request."""
        with self._lock:
            self._failed += 1
            self._failing += seconds

    def snapshot(self, name: str, version: str) -> Statistics:
        """Return the statistics so far.

        Time outside of decoding, steps and encoding was spent waiting, so the parts add up to the whole.
        """
        with self._lock:
            times, answered, steps = self._times, self._answered, dict(self._steps)
            failed, images, last_ms = Duration(count=self._failed, ns=_ns(self._failing)), self._images, self._last_ms
        decoding, computing, encoding = _ns(times.decoding), _ns(times.computing), _ns(times.encoding)
        total = max(_ns(times.total), decoding + computing + encoding)
        parts = {
            "success": total,
            "queue": total - decoding - computing - encoding,
            "compute_input": decoding,
            "compute_infer": computing,
            "compute_output": encoding,
        }
        return Statistics(
            name=name,
            version=version,
            last_inference=last_ms,
            inference_count=images,
            execution_count=sum(count for count, _ in steps.values()),
            inference_stats=InferStatistics(
                fail=failed, **{part: Duration(count=answered, ns=ns) for part, ns in parts.items()}
            ),
            batch_stats=[
                BatchStatistics(batch_size=rows, compute_infer=Duration(count=count, ns=_ns(seconds)))
                for rows, (count, seconds) in sorted(steps.items())
            ],
        )


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
