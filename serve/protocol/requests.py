"""A request out of its envelope, and what is checked of it before anything runs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from .errors import RequestError
from .messages import Parameter
from .model import INPUT, Model
from .tensors import Incoming, to_array

_KNOWN = ("epsilon", "deadline_ms", "timeout", "binary_data_output")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A request, out of its envelope."""

    model: str
    version: str = ""
    id: str = ""
    parameters: Mapping[str, Parameter] = dataclasses.field(default_factory=dict)
    inputs: Sequence[Incoming]
    outputs: Sequence[tuple[str, Mapping[str, Parameter]]] = ()
    binary: bool = False
    """Whether outputs are sent as bytes where nothing is said of them."""


def images_of(request: Request, model: Model) -> Shaped[np.ndarray, "n *input"]:
    """Return the images of a request.

    Raises:
        RequestError: They are not what the model takes.
    """
    if len(request.inputs) != 1:
        msg = f"inputs: expected one tensor, {INPUT}, got {len(request.inputs)}"
        raise RequestError(msg)
    tensor = request.inputs[0]
    if tensor.name != INPUT:
        msg = f"{tensor.field}.name: expected {INPUT}, got {tensor.name[:100]!r}"
        raise RequestError(msg)
    if tensor.datatype not in model.datatypes:
        msg = f"{tensor.field}.datatype: expected {' or '.join(model.datatypes)}, got {tensor.datatype[:100]!r}"
        raise RequestError(msg)
    rows, one = tensor.shape[:1], tensor.shape[1:]
    if tensor.shape == model.input_shape:
        rows, one = (1,), tensor.shape
    if one != model.input_shape or not rows or not 1 <= rows[0] <= model.max_rows:
        expected = f"[n, {', '.join(map(str, model.input_shape))}] with n = 1 to {model.max_rows}"
        msg = f"{tensor.field}.shape: expected {expected}, got {list(tensor.shape)}"
        raise RequestError(msg)
    return to_array(tensor).reshape(*rows, *one)


def wanted_of(request: Request, model: Model) -> dict[str, bool]:
    """Return the names of the outputs, in their order, and whether each is sent as bytes.

    Raises:
        RequestError: There is no such output, or a parameter is none.
    """
    default = request.parameters.get("binary_data_output", request.binary)
    if not isinstance(default, bool):
        msg = f"parameters.binary_data_output: expected true or false, got {default!r}"
        raise RequestError(msg)
    wanted: dict[str, bool] = {}
    for i, (name, parameters) in enumerate(request.outputs):
        if name not in model.outputs or name in wanted:
            msg = f"outputs[{i}].name: expected each at most once of {', '.join(model.outputs)}, got {name[:100]!r}"
            raise RequestError(msg)
        if unknown := parameters.keys() - {"binary_data"}:
            msg = f"outputs[{i}].parameters: expected binary_data alone, got {min(unknown)[:100]!r}"
            raise RequestError(msg)
        binary = parameters.get("binary_data", default)
        if not isinstance(binary, bool):
            msg = f"outputs[{i}].parameters.binary_data: expected true or false, got {binary!r}"
            raise RequestError(msg)
        wanted[name] = binary
    return wanted or dict.fromkeys(model.outputs, default)


def wishes_of(parameters: Mapping[str, Parameter]) -> tuple[float | None, float | None, float]:
    """Return epsilon, deadline_ms, and the seconds that the client waits.

    ``deadline_ms`` also chooses the plan; Triton's ``timeout``, in microseconds, does not.

    Raises:
        RequestError: One is not a number in its bounds, or there are other parameters.
    """
    if unknown := parameters.keys() - set(_KNOWN):
        msg = f"parameters: expected {', '.join(_KNOWN)} at most, got {min(unknown)[:100]!r}"
        raise RequestError(msg)
    epsilon = _number(parameters, "epsilon", 0.0, 1.0)
    deadline_ms = _number(parameters, "deadline_ms", 1e-3, 1e9)
    timeout = _number(parameters, "timeout", 1.0, 1e12)
    seconds = (math.inf if x is None else x for x in (deadline_ms and deadline_ms * 1e-3, timeout and timeout * 1e-6))
    return epsilon, deadline_ms, min(seconds)


def _number(parameters: Mapping[str, Parameter], name: str, low: float, high: float) -> float | None:
    value = parameters.get(name)
    if value is None:
        return None
    if isinstance(value, bool | str) or not low <= value <= high:
        msg = f"parameters.{name}: expected a number from {low:g} to {high:g}, got {str(value)[:100]!r}"
        raise RequestError(msg)
    return float(value)
