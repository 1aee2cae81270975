"""What is served, as the protocol's metadata and configuration describe it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import NamedTuple

from .errors import UnknownModelError
from .messages import ConfigParameter, ConfigTensor, ModelConfig, ModelMetadata, TensorMetadata
from .tensors import BYTES

INPUT = "images"
PLATFORM = "gati_jax"
_CONFIG_TYPES = {"UINT8": "TYPE_UINT8", "INT32": "TYPE_INT32", "FP32": "TYPE_FP32", BYTES: "TYPE_STRING"}


class Bound(NamedTuple):
    """At most epsilon of all requests disagree with the base, with confidence 1 - delta."""

    epsilon: float
    delta: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle as clients know it."""

    name: str
    version: str
    input_shape: tuple[int, ...]
    datatypes: tuple[str, ...]
    """Of images that it takes, the preferred one first."""
    classes: int
    class_names: tuple[str, ...] = ()
    plans: tuple[str, ...]
    """The name of every route."""
    bounds: Mapping[str, Bound]
    """What is certified, by plan; plans without a certificate that holds are left out."""
    max_rows: int
    """Images in a request."""

    @property
    def most_numbers(self) -> int:
        """In the images of one request."""
        return self.max_rows * math.prod(self.input_shape)

    @property
    def outputs(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Datatype and shape, without the number of images, of everything that a client may ask for."""
        return {
            "class_index": ("INT32", ()),
            "class_name": (BYTES, ()),
            "probabilities": ("FP32", (self.classes,)),
            "logits": ("FP32", (self.classes,)),
            "exit": ("INT32", ()),
            "score": ("FP32", ()),
        }

    def check(self, name: str, version: str = "") -> None:
        """Check that this is the model asked for.

        Raises:
            UnknownModelError: It is not.
        """
        if name != self.name:
            msg = f"model: expected {self.name!r}, got {name[:100]!r}"
            raise UnknownModelError(msg)
        if version not in {"", self.version}:
            msg = f"version: expected {self.version!r}, got {version[:100]!r}"
            raise UnknownModelError(msg)

    def metadata(self) -> ModelMetadata:
        """Describe inputs and outputs."""
        return ModelMetadata(
            name=self.name,
            versions=[self.version],
            platform=PLATFORM,
            inputs=[TensorMetadata(name=INPUT, datatype=self.datatypes[0], shape=[-1, *self.input_shape])],
            outputs=[
                TensorMetadata(name=name, datatype=datatype, shape=[-1, *shape])
                for name, (datatype, shape) in self.outputs.items()
            ],
        )

    def config(self) -> ModelConfig:
        """Describe the same as perf_analyzer reads it; parameters say what the protocol has no field for."""
        facts = {
            "datatypes": ",".join(self.datatypes),
            "plans": json.dumps(
                {plan: self.bounds[plan]._asdict() if plan in self.bounds else None for plan in self.plans}
            ),
        }
        return ModelConfig(
            name=self.name,
            platform=PLATFORM,
            backend=PLATFORM,
            max_batch_size=self.max_rows,
            input=[ConfigTensor(name=INPUT, data_type=_CONFIG_TYPES[self.datatypes[0]], dims=list(self.input_shape))],
            output=[
                ConfigTensor(name=name, data_type=_CONFIG_TYPES[datatype], dims=list(shape))
                for name, (datatype, shape) in self.outputs.items()
            ],
            parameters={key: ConfigParameter(string_value=value) for key, value in facts.items()},
        )
