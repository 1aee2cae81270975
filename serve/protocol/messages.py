"""The protocol's JSON messages, and errors as clients see them. gRPC replies have fields of the same names.

https://github.com/kserve/open-inference-protocol, with Triton's extensions for binary tensors, model configuration and
statistics.
"""

from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gati_jax.errors import printable

from ..engine.records import DeadlineError, OverloadedError, ServeError, StepError, StoppingError

Parameter = bool | int | float | str
Parameters = dict[str, Parameter]
MOST_DIMENSIONS = 8  # of a tensor
MOST_ID = 200  # characters of a request's id
MOST_ITEMS = 100  # inputs, outputs, or parameters, of which the protocol knows a few
_MOST_MESSAGE = 1000  # characters of an error; the values in it are cut at 200


def _check_count(given: object) -> object:
    """Check the number of items before each is: errors of a million of them would take gigabytes."""
    if isinstance(given, list | dict) and len(given) > MOST_ITEMS:
        raise ValueError(f"expected at most {MOST_ITEMS} items, got {len(given)}")
    return given


_Few = BeforeValidator(_check_count)
Given = Annotated[dict[str, Parameter | None] | None, _Few]
"""Parameters as clients write them: null for none, and for those that they leave out."""


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class RequestInput(_Message):
    """An input tensor."""

    name: str
    datatype: str = Field(examples=["UINT8", "FP32"])
    shape: Annotated[
        list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(max_length=MOST_DIMENSIONS, examples=[[1, 32, 32, 3]])
    ]
    parameters: Given = {}
    data: Any = Field(default=None, description="Nested or flat, in row-major order; left out if it is sent as binary.")


class RequestedOutput(_Message):
    """A requested output."""

    name: str
    parameters: Given = {}


class InferenceRequest(_Message):
    """Images to classify."""

    id: Annotated[str, Field(max_length=MOST_ID)] | None = ""
    parameters: Given = Field(
        default={}, description="epsilon, deadline_ms, timeout (microseconds), binary_data_output"
    )
    inputs: Annotated[list[RequestInput], _Few]
    outputs: Annotated[list[RequestedOutput] | None, _Few] = []


class ResponseOutput(_Message):
    """An output tensor."""

    name: str
    datatype: str
    shape: list[int]
    parameters: Parameters = {}
    data: list[Any] = []


class InferenceResponse(_Message):
    """The answers."""

    model_name: str
    model_version: str
    id: str = ""
    parameters: Parameters
    outputs: list[ResponseOutput]


class ErrorResponse(_Message):
    """The reason of a failure."""

    error: str


class Live(_Message):
    """Whether the process answers."""

    live: bool


class Ready(_Message):
    """Whether the server takes requests."""

    ready: bool


class ModelReady(Ready):
    """Whether the server takes requests to the model."""

    name: str
    batches: list[int] = Field(default=[], description="Sizes of the batches that are compiled so far.")


class ModelIndex(_Message):
    """A model of the repository."""

    name: str
    version: str = ""
    state: str = Field(examples=["READY", "LOADING", "UNAVAILABLE"])
    reason: str = Field(default="", description="Why it is not ready, or why what came last was not loaded.")


class Done(_Message):
    """What was asked for is done."""


class IndexRequest(_Message):
    """Which models the index is to list."""

    ready: bool = Field(default=False, description="Only those that answer.")


class LoadRequest(_Message):
    """How a model is to be loaded: no parameter is known."""

    parameters: Annotated[dict[str, Any], Field(max_length=0)] = {}


class ServerMetadata(_Message):
    """A description of the server."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(_Message):
    """A tensor's type and shape; -1 is the number of images."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(_Message):
    """A model's inputs and outputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ConfigTensor(_Message):
    """A tensor's type and shape without the number of images."""

    name: str
    data_type: str
    dims: list[int]


class ConfigParameter(_Message):
    """A value of the configuration."""

    string_value: str


class ModelConfig(_Message):
    """A model as Triton's clients read it."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[ConfigTensor]
    output: list[ConfigTensor]
    dynamic_batching: dict[str, int] = {}
    parameters: dict[str, ConfigParameter]


class Duration(_Message):
    """A number of events and their total time."""

    count: int = 0
    ns: int = 0


class InferStatistics(_Message):
    """Times of requests; the last four add up to ``success``."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class BatchStatistics(_Message):
    """Times of steps with this many rows."""

    batch_size: int
    compute_input: Duration = Duration()
    compute_infer: Duration
    compute_output: Duration = Duration()


class Statistics(_Message):
    """A model's statistics since the server started."""

    name: str
    version: str
    last_inference: int = Field(description="Milliseconds since 1970.")
    inference_count: int = Field(description="Images answered.")
    execution_count: int = Field(description="Steps; an image takes part in one or more.")
    inference_stats: InferStatistics
    batch_stats: list[BatchStatistics]


class ModelStatistics(_Message):
    """Statistics of all models."""

    model_stats: list[Statistics]


M = TypeVar("M", bound=_Message)


def parse(kind: type[M], text: bytes) -> M:
    """Read a message's JSON.

    Raises:
        RequestError: It is malformed, or a field is missing or of the wrong type.
    """
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{_path(first['loc']) or 'body'}: {message}") from None


def _path(location: tuple[int | str, ...]) -> str:
    """Write ("inputs", 0, "shape") as ``inputs[0].shape``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{printable(key)}" for key in location).removeprefix(".")


class RequestError(ServeError):
    """The request is invalid; the message names the field."""


class UnauthorizedError(ServeError):
    """The request does not carry the server's token."""


class UnknownModelError(ServeError):
    """There is no such model or version."""


class TooLargeError(ServeError):
    """The body is larger than the server allows."""


class SlowBodyError(ServeError):
    """The body took too long to arrive."""


class EncodingError(ServeError):
    """The body is compressed in a way that the server does not know."""


class NotReadyError(ServeError):
    """The server is warming up or stopping."""


class ForbiddenError(ServeError):
    """The server was not started so that it does this."""


class LoadError(ServeError):
    """A model cannot be loaded."""


class Refusal(NamedTuple):
    """An error as a client sees it."""

    status: int  # HTTP's; gRPC's is derived from it
    message: str
    retry_after: float | None = None  # seconds


_STATUS: dict[type[ServeError], int] = {
    RequestError: 400,
    LoadError: 400,  # gRPC's clients would repeat what is 503
    UnauthorizedError: 401,
    ForbiddenError: 403,
    UnknownModelError: 404,
    SlowBodyError: 408,
    TooLargeError: 413,
    EncodingError: 415,
    OverloadedError: 429,
    NotReadyError: 503,
    StoppingError: 503,
    DeadlineError: 504,
}
REASONS: dict[type[Exception], str] = {
    RequestError: "invalid",
    UnauthorizedError: "unauthorized",
    UnknownModelError: "unknown_model",
    ForbiddenError: "forbidden",
    LoadError: "not_loaded",
    SlowBodyError: "slow_body",
    TooLargeError: "body_too_large",
    EncodingError: "encoding",
    NotReadyError: "not_ready",
}
"""By error, the reason of a refusal that the engine does not count."""
_RETRY_AFTER = 1.0  # seconds, of a server that warms up or is replaced


def refusal(error: Exception) -> Refusal:
    """Describe an error to the client.

    Failures inside the server are logged and not described: the details may name files or other clients' data.
    """
    status = _STATUS.get(type(error)) if isinstance(error, ServeError) else None
    if status is None:
        what = "the computation of this request failed" if isinstance(error, StepError) else "the server failed"
        return Refusal(500, f"{what}; its log says why, under this x-request-id")
    message = printable(str(error), most=_MOST_MESSAGE)
    if isinstance(error, OverloadedError):
        return Refusal(status, message, error.retry_after)
    return Refusal(status, message, _RETRY_AFTER if status == 503 else None)  # noqa: PLR2004 (HTTP)
