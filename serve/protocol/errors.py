"""What clients are told when they get no answer: one table for both transports."""

from typing import NamedTuple

from serve.records import DeadlineError, OverloadedError, ServeError, StepError, StoppingError


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
