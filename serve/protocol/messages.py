"""The protocol's JSON messages. gRPC's are made from the replies, field by field of the same names.

https://github.com/kserve/open-inference-protocol, with Triton's extensions for binary tensors, model configuration and
statistics.
"""

from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.engine.records import DeadlineError, OverloadedError, ServeError, StepError, StoppingError

Parameter = bool | int | float | str
Parameters = dict[str, Parameter]


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class RequestInput(_Message):
    """A tensor that comes in."""

    name: str
    datatype: str = Field(examples=["UINT8", "FP32"])
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(max_length=8, examples=[[1, 32, 32, 3]])]
    parameters: Parameters = {}
    data: Any = Field(default=None, description="Nested or flat, in row-major order; left out if it is sent as binary.")


class RequestedOutput(_Message):
    """A tensor that is asked for."""

    name: str
    parameters: Parameters = {}


class InferenceRequest(_Message):
    """Images to classify."""

    id: str = Field(default="", max_length=200)
    parameters: Parameters = Field(
        default={}, description="epsilon, deadline_ms, timeout (microseconds), binary_data_output"
    )
    inputs: list[RequestInput]
    outputs: list[RequestedOutput] = []


class ResponseOutput(_Message):
    """A tensor that goes out."""

    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters = {}
    data: list[Any] = []


class InferenceResponse(_Message):
    """Their classes."""

    model_name: str
    model_version: str
    id: str = ""
    parameters: Parameters
    outputs: list[ResponseOutput]


class ErrorResponse(_Message):
    """Why there is no answer."""

    error: str


class Live(_Message):
    """The process answers."""

    live: bool


class Ready(_Message):
    """Requests are taken."""

    ready: bool


class ModelReady(Ready):
    """Requests to this model are taken."""

    name: str


class ServerMetadata(_Message):
    """What this server is."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(_Message):
    """A tensor's form; -1 is the number of images."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(_Message):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ConfigTensor(_Message):
    """A tensor's form without the number of images."""

    name: str
    data_type: str
    dims: list[int]


class ConfigParameter(_Message):
    """A fact about the model."""

    string_value: str


class ModelConfig(_Message):
    """The same as Triton's clients ask for it."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[ConfigTensor]
    output: list[ConfigTensor]
    dynamic_batching: dict[str, int] = {}
    parameters: dict[str, ConfigParameter]


class Duration(_Message):
    """A number of events, and how long they took together."""

    count: int = 0
    ns: int = 0


class InferStatistics(_Message):
    """Of requests; the last four add up to ``success``."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class BatchStatistics(_Message):
    """Of steps that had this many rows."""

    batch_size: int
    compute_input: Duration = Duration()
    compute_infer: Duration
    compute_output: Duration = Duration()


class Statistics(_Message):
    """What a model has done since the server started."""

    name: str
    version: str
    last_inference: int = Field(description="Milliseconds since 1970.")
    inference_count: int = Field(description="Images answered.")
    execution_count: int = Field(description="Steps; an image takes part in one or more.")
    inference_stats: InferStatistics
    batch_stats: list[BatchStatistics]


class ModelStatistics(_Message):
    """Of all models, which are one."""

    model_stats: list[Statistics]


def parse_request(text: bytes) -> InferenceRequest:
    """Read a request's JSON.

    Raises:
        RequestError: It is malformed, or a field is missing or of another type.
    """
    try:
        return InferenceRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise RequestError(f"{_path(first['loc']) or 'body'}: {first['msg']}") from None


def _path(location: tuple[int | str, ...]) -> str:
    """Write ("inputs", 0, "shape") as ``inputs[0].shape``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location).removeprefix(".")


class RequestError(ServeError):
    """The request is not what this server takes; the message names the field."""


class UnauthorizedError(ServeError):
    """The request does not carry the server's token."""


class UnknownModelError(ServeError):
    """There is no such model, or not in this version."""


class TooLargeError(ServeError):
    """The body is larger than this server takes."""


class SlowBodyError(ServeError):
    """The body took longer to come than a request may."""


class EncodingError(ServeError):
    """The body is compressed."""


class NotReadyError(ServeError):
    """The server is still warming up, or it is stopping."""


class Refusal(NamedTuple):
    """An error as a client sees it."""

    status: int  # HTTP's; `rpc` translates it
    message: str
    retry_after: float | None = None  # seconds


_STATUS: dict[type[ServeError], int] = {
    RequestError: 400,
    UnauthorizedError: 401,
    UnknownModelError: 404,
    SlowBodyError: 408,
    TooLargeError: 413,
    EncodingError: 415,
    OverloadedError: 429,
    NotReadyError: 503,
    StoppingError: 503,
    DeadlineError: 504,
}
_RETRY_AFTER = 1.0  # a server that warms up or is replaced


def refusal(error: Exception) -> Refusal:
    """Describe an error to the client.

    Of a failure inside the server it learns nothing: what went wrong may name files or data of others, and is logged.
    """
    status = _STATUS.get(type(error)) if isinstance(error, ServeError) else None
    if status is None:
        what = "the computation of this request failed" if isinstance(error, StepError) else "the server failed"
        return Refusal(500, f"{what}; its log says why, under this x-request-id")
    if isinstance(error, OverloadedError):
        return Refusal(status, str(error), error.retry_after)
    return Refusal(status, str(error), _RETRY_AFTER if status == 503 else None)  # noqa: PLR2004 (HTTP)
