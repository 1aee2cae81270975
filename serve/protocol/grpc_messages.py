"""gRPC's messages and the protocol's requests and answers: bounded, decoded, encoded."""

from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from . import inference_pb2 as pb
from .codec import MOST_NUMBERS, Incoming, Request, size_of, to_bytes
from .messages import MOST_DIMENSIONS, MOST_ID, MOST_ITEMS, Parameter, Parameters, RequestError
from .service import Response

_MOST_FIELDS = 4 * MOST_ITEMS  # of a message
_WIDTHS = {0: 0, 1: 8, 2: 0, 5: 4}  # bytes, by wire type, where those are known
_CONTENTS = {"UINT8": "uint_contents", "INT32": "int_contents", "FP32": "fp32_contents"}
M = TypeVar("M", bound=Message)


def decode(message: pb.ModelInferRequest, most_numbers: int = MOST_NUMBERS) -> Request:
    """Decode a message, with at most ``most_numbers`` numbers in the contents of a tensor.

    Raises:
        RequestError: Its parts do not fit together.
    """
    if len(message.id) > MOST_ID:
        raise RequestError(f"id: expected at most {MOST_ID} characters, got {len(message.id)}")
    for name, items in (("inputs", message.inputs), ("outputs", message.outputs)):
        if len(items) > MOST_ITEMS:
            raise RequestError(f"{name}: expected at most {MOST_ITEMS} items, got {len(items)}")
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise RequestError(
            f"raw_input_contents: expected one for each of the {len(message.inputs)} inputs, got {len(raw)}"
        )
    inputs = []
    for i, tensor in enumerate(message.inputs):
        field = f"inputs[{i}]"
        if len(tensor.shape) > MOST_DIMENSIONS:
            got = len(tensor.shape)
            raise RequestError(f"{field}.shape: expected at most {MOST_DIMENSIONS} dimensions, got {got}")
        shape = tuple(tensor.shape)
        if raw and tensor.HasField("contents"):
            raise RequestError(f"{field}.contents: expected nothing beside raw_input_contents")
        size = size_of(field, _parameters(f"{field}.parameters", tensor.parameters))
        if size is not None and not (raw and size == len(raw[i])):  # KServe's client sends it beside the bytes
            got = f"{str(size)[:20]}, and {len(raw[i])} bytes" if raw else "no bytes"
            raise RequestError(f"{field}.parameters.binary_data_size: expected that of raw_input_contents, got {got}")
        contents = () if raw else getattr(tensor.contents, _CONTENTS.get(tensor.datatype, "bytes_contents"))
        if len(contents) > most_numbers:
            raise RequestError(f"{field}.contents: expected at most {most_numbers} numbers, got {len(contents)}")
        numbers = None if raw else list(contents)
        inputs.append(
            Incoming(field, tensor.name, tensor.datatype, shape, raw=raw[i] if raw else None, numbers=numbers)
        )
    return Request(
        model=message.model_name,
        version=message.model_version,
        id=message.id,
        parameters=_parameters("parameters", message.parameters),
        inputs=inputs,
        outputs=[
            (output.name, _parameters(f"outputs[{i}].parameters", output.parameters))
            for i, output in enumerate(message.outputs)
        ],
        binary=True,
    )


def encode(response: Response) -> pb.ModelInferResponse:
    """Encode an answer; tensors are raw, as Triton's clients expect in any case."""
    message = pb.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    for name, value in response.parameters.items():
        if isinstance(value, str):
            message.parameters[name].string_param = value
        else:
            message.parameters[name].double_param = value
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_output_contents.append(to_bytes(tensor))
    return message


def _parameters(field: str, given: Mapping[str, pb.InferParameter]) -> Parameters:
    if len(given) > MOST_ITEMS:
        raise RequestError(f"{field}: expected at most {MOST_ITEMS} items, got {len(given)}")
    parameters: dict[str, Parameter] = {}
    for name, value in given.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is None:
            raise RequestError(f"{field}.{name[:100]}: expected a value, got none")
        parameters[name] = getattr(value, kind)
    return parameters


def parse(kind: type[M], body: bytes) -> M:
    """Read a message.

    Raises:
        RequestError: It is none, or has too many fields.
    """
    try:
        _check_fields(body)
        return kind.FromString(body)
    except DecodeError:
        raise RequestError(f"message: expected a {kind.__name__}, got something else") from None


def _check_fields(body: bytes) -> None:
    """Check the number of a message's own fields: two bytes each may become a hundred, of an empty tensor.

    Raises:
        DecodeError: It is no message.
        RequestError: There are too many.
    """
    at = count = 0
    while at < len(body):
        tag, at = _varint(body, at)
        if tag & 7 not in _WIDTHS:
            raise DecodeError
        size, at = _varint(body, at) if tag & 7 in {0, 2} else (_WIDTHS[tag & 7], at)
        at += 0 if tag & 7 == 0 else size
        count += 1
        if count > _MOST_FIELDS:
            raise RequestError(f"message: expected at most {_MOST_FIELDS} fields, got more")


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """Return a number in Protocol Buffers' variable-length form, and where it ends."""
    number = 0
    for shift, byte in enumerate(body[at : at + 10]):
        number |= (byte & 127) << (7 * shift)
        if byte < 128:  # noqa: PLR2004 (the last byte)
            return number, at + shift + 1
    raise DecodeError
