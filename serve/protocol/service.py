"""The server without its sockets: what it does for a client, whatever the transport.

A request's fields are checked (``codec``), a route is chosen, the engine admits all of its images or none, the event
loop waits, and answers become tensors. A client that leaves, or whose time runs out, abandons its images.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import itertools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float

from gati_jax import __version__

from ..engine.records import Answer, DeadlineError, Statistics, StepError, StoppingError
from .admission import Admission, Door
from .codec import DTYPES, Outgoing, Request, images_of, limits_of, outputs_of
from .messages import ModelStatistics, NotReadyError, Parameters, RequestError, ServerMetadata, UnauthorizedError
from .model import Model, Tally, Times

NAME = "gati-jax"
EXTENSIONS = ["binary_tensor_data", "model_configuration", "statistics"]
_WARMING_UP = "the server is warming up"
_log = logging.getLogger("serve")


class InferenceEngine(Protocol):
    """The methods of ``serve.engine.engine.Engine`` that the service uses."""

    def submit(
        self, images: np.ndarray, *, route: int, deadline: float | None = None, request_id: str = ""
    ) -> "Sequence[Future[Answer]]":
        """Admit all images or none."""
        ...

    def statistics(self) -> Statistics:
        """Return a snapshot of the queues and counters."""
        ...

    def stop(self, timeout: float | None = None) -> bool:
        """Finish what was admitted; return whether that was done in time."""
        ...


class Backend(NamedTuple):
    """What answers requests, once it is warmed up."""

    engine: InferenceEngine
    choose_route: Callable[[float | None, float | None], int]
    """Returns a route's number for ``epsilon`` and ``deadline_ms``, see ``serve.engine.routes.choose_route``."""
    notes: Callable[[int], Mapping[str, str]] = lambda _: {}
    """Further parameters of the response to the request that was submitted last, given its route."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """An answer, independent of the transport."""

    model: str
    version: str
    id: str
    parameters: Parameters
    outputs: Sequence[Outgoing]


class Service:
    """Answers requests for one model; used from the event loop's thread only."""

    def __init__(self, model: Model, *, tally: Tally, door: Door) -> None:
        """Prepare; it is ready after ``warmed_up``. The transports ask the ``door`` before they read a request."""
        self.model = model
        self.door = door
        self.draining = False
        self._backend: Backend | None = None
        self._tally = tally
        self._names = [name.encode() for name in model.class_names] or [str(i).encode() for i in range(model.classes)]

    def warmed_up(self, backend: Backend) -> None:
        """Take requests from now on, and answer them by this backend."""
        self._backend = backend

    def close(self) -> None:
        """Refuse new requests, shortly before the sockets close, so that clients ask another server."""
        self.door.close()

    def drain(self) -> None:
        """Turn not ready, so that balancers look elsewhere; requests that arrive are still answered."""
        self.draining = True

    @property
    def closed(self) -> bool:
        """Whether new requests are refused."""
        return self.door.closed

    @property
    def ready(self) -> bool:
        """Whether the server takes new requests."""
        return self._backend is not None and not self.draining and self._backend.engine.statistics().running

    def check_ready(self) -> None:
        """Check that the server takes new requests.

        Raises:
            NotReadyError: It is warming up or stopping.
        """
        if not self.ready:
            raise NotReadyError(_WARMING_UP if self._backend is None else "the server is stopping")

    def admit(self, *, arrived: float | None = None, size: int = 0) -> Admission:
        """Admit an inference request before its body is read, see ``Door.enter``.

        Raises:
            NotReadyError: The server is warming up.
        """
        if self._backend is None:
            raise NotReadyError(_WARMING_UP)
        return self.door.enter(arrived=arrived, size=size)

    def metadata(self) -> ServerMetadata:
        """Describe the server."""
        return ServerMetadata(name=NAME, version=__version__, extensions=EXTENSIONS)

    def statistics(self, name: str, version: str = "") -> ModelStatistics:
        """Return a model's statistics; no name means all models.

        Raises:
            UnknownModelError: There is no such model.
        """
        if name:
            self.model.check(name, version)
        return self._tally.snapshot(self.model.name, self.model.version)

    async def infer(
        self,
        request: Request,
        *,
        admission: Admission | None = None,
        remaining: float | None = None,
        request_id: str = "",
    ) -> Response:
        """Answer a request within ``remaining`` seconds; if this is cancelled, its images are abandoned.

        Its own time-outs count from its arrival, see ``admission``, which the caller has entered; None enters one.

        Raises:
            ServeError: Why there is no answer.
        """
        if admission is None:
            with self.admit() as own:
                return await self.infer(request, admission=own, remaining=remaining, request_id=request_id)
        try:
            response, rows, times = await self._infer(request, admission, remaining, request_id)
        except BaseException as error:
            self._tally.failed(time.monotonic() - admission.arrived)
            if isinstance(error, StepError):
                _log.exception("a request was lost with its step")
            raise
        self._tally.answered(rows, times)
        return response

    async def _infer(
        self, request: Request, admission: Admission, remaining: float | None, request_id: str
    ) -> tuple[Response, int, Times]:
        started = time.monotonic()
        assert self._backend is not None, "the request was admitted before the warm-up"  # noqa: S101 (narrows the type)
        engine, choose_route, notes = self._backend
        self.model.check(request.model, request.version)
        epsilon, deadline_ms, seconds = limits_of(request.parameters)
        outputs = outputs_of(request, self.model)
        images = images_of(request, self.model)
        deadline = admission.arrived + min(seconds, self.door.limits.timeout)
        deadline = min(deadline, started + (math.inf if remaining is None else remaining))
        decoded = time.monotonic()
        if deadline <= decoded:
            raise DeadlineError("the deadline passed before the request was read")
        admission.take(len(images), deadline)
        try:
            route = choose_route(epsilon, deadline_ms)
            futures = engine.submit(images, route=route, deadline=deadline, request_id=request_id)
            noted = notes(route)
        except ValueError as error:
            raise RequestError(str(error)) from None
        try:
            # The engine lets a deadline pass at its next step; a step that hangs must not keep the client.
            async with asyncio.timeout(deadline - decoded):
                answers = await _gather(futures)
        except TimeoutError:
            waited = time.monotonic() - admission.arrived
            raise DeadlineError(f"the deadline passed: no answer within {waited * 1000:.3g} ms") from None
        finally:
            for future in futures:  # those that are not done: their images are abandoned
                future.cancel()
        answered = time.monotonic()
        admission.answered = True
        if bad := [i for i, answer in enumerate(answers) if not np.isfinite(answer.logits).all()]:
            raise RequestError(f"images: expected inputs with finite logits, got NaN or infinity for image {bad[0]}")
        plan = self.model.plans[route]
        bound = self.model.bounds.get(plan)
        response = Response(
            model=self.model.name,
            version=self.model.version,
            id=request.id,
            parameters={"plan": plan, **({} if bound is None else bound._asdict()), **noted},
            outputs=[self._output(name, answers, binary=binary) for name, binary in outputs.items()],
        )
        now = time.monotonic()
        computing = min(max(answer.computed for answer in answers), answered - decoded)
        return response, len(images), Times(now - admission.arrived, decoded - started, computing, now - answered)

    def _output(self, name: str, answers: Sequence[Answer], *, binary: bool) -> Outgoing:
        datatype, shape = self.model.outputs[name]
        if name == "class_name":
            values: np.ndarray | list[bytes] = [self._names[answer.class_index] for answer in answers]
        elif name in {"logits", "probabilities"}:
            logits = np.stack([answer.logits for answer in answers])
            values = logits if name == "logits" else _softmax(logits)
        else:
            values = np.asarray([getattr(answer, name) for answer in answers], DTYPES[datatype])
        return Outgoing(name, datatype, (len(answers), *shape), values, binary)


def _softmax(logits: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def check_token(token: str | None, authorization: str | None) -> None:
    """Check a client's token, in a time that does not depend on how much of it is right.

    Raises:
        UnauthorizedError: It is not the server's.
    """
    scheme, _, shown = (authorization or "").partition(" ")
    right = hmac.compare_digest(shown.encode(), (token or "").encode())
    if token is not None and not (right and scheme.lower() == "bearer"):
        raise UnauthorizedError("authorization: expected 'Bearer' and this server's token")


async def _gather(futures: Sequence["Future[Answer]"]) -> list[Answer]:
    """Wait for the answers of one request.

    The engine's thread wakes the loop once: when all are done, or when the first has failed. This takes a tenth of the
    time of ``asyncio.wrap_future`` for 32 images.

    Raises:
        ServeError: One of them failed; others may still be in flight.
    """
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    missing = itertools.count(len(futures) - 1, -1)

    def one(future: "Future[Answer]") -> None:
        if next(missing) == 0 or future.cancelled() or future.exception() is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(ended.set)

    for future in futures:
        future.add_done_callback(one)
    await ended.wait()
    try:
        for future in futures:
            if future.done():  # where one has failed, others may not be, and would block
                future.result()
        return [future.result() for future in futures]
    except CancelledError:
        raise StoppingError("the server stopped before the answer was there") from None
