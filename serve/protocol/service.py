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

    @property
    def running(self) -> bool:
        """Whether it answers: neither stopped nor ended by a bug."""
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
    grow: Callable[[], None] = lambda: None
    """Compiles what may come later, larger batches, while the engine answers."""


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
        return self._backend is not None and not self.draining and self._backend.engine.running

    @property
    def alive(self) -> bool:
        """Whether nothing has happened that only a restart can mend."""
        return self._backend is None or self.draining or self._backend.engine.running

    def check_alive(self) -> None:
        """Check that the server need not be restarted.

        Raises:
            NotReadyError: The engine's thread has ended.
        """
        if not self.alive:
            raise NotReadyError("the engine has ended: restart the server; its log says why")

    def check_ready(self) -> None:
        """Check that the server takes new requests.

        Raises:
            NotReadyError: It is warming up or stopping.
        """
        if not self.ready:
            raise NotReadyError(_WARMING_UP if self._backend is None else "the server is stopping")

    def admit(self, *, arrived: float | None = None, size: int = 0, patience: float = math.inf) -> Admission:
        """Admit an inference request before its body is read, see ``Door.enter``.

        Raises:
            NotReadyError: The server is warming up.
        """
        if self._backend is None:
            raise NotReadyError(_WARMING_UP)
        return self.door.enter(arrived=arrived, size=size, patience=patience)

    @property
    def batches(self) -> list[int]:
        """Sizes of the batches that are compiled so far."""
        return [] if self._backend is None else [*self._backend.engine.statistics().batches]

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

    async def infer(self, request: Request, *, admission: Admission | None = None, request_id: str = "") -> Response:
        """Answer a request; if this is cancelled, its images are abandoned.

        Its time-outs count from its arrival, see ``admission``, which the caller has entered; None enters one.

        Raises:
            ServeError: Why there is no answer.
        """
        if admission is None:
            with self.admit() as own:
                return await self.infer(request, admission=own, request_id=request_id)
        try:
            response, rows, times = await self._infer(request, admission, request_id)
        except BaseException as error:
            self._tally.failed(time.monotonic() - admission.arrived)
            if isinstance(error, StepError):
                _log.exception("a request was lost with its step")
            raise
        self._tally.answered(rows, times)
        return response

    async def _infer(self, request: Request, admission: Admission, request_id: str) -> tuple[Response, int, Times]:
        started = time.monotonic()
        assert self._backend is not None, "the request was admitted before the warm-up"  # noqa: S101 (narrows the type)
        engine, choose_route, notes, _ = self._backend
        self.model.check(request.model, request.version)
        epsilon, deadline_ms, seconds = limits_of(request.parameters)
        outputs = outputs_of(request, self.model)
        images = images_of(request, self.model)
        decoded = time.monotonic()
        admission.take(len(images), seconds)
        deadline = admission.deadline
        try:
            route = choose_route(epsilon, deadline_ms)
            futures = engine.submit(images, route=route, deadline=deadline, request_id=request_id)
            noted = notes(route)
        except ValueError as error:
            raise RequestError(str(error)) from None
        try:
            # The engine lets a deadline pass at its next step; a step that hangs must not keep the client.
            async with asyncio.timeout(deadline - decoded):
                await _wait(futures)
        except TimeoutError:
            if not all(future.done() for future in futures):  # else the event loop was late, and not the engine
                self.door.refused("deadline")
                waited = time.monotonic() - admission.arrived
                raise DeadlineError(f"the deadline passed: no answer within {waited * 1000:.3g} ms") from None
        finally:
            for future in futures:  # those that are not done: their images are abandoned
                future.cancel()
        answers = _results(futures)
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


async def _wait(futures: Sequence["Future[Answer]"]) -> None:
    """Wait until all are done, or one has failed: then others may still be in flight.

    The engine's thread wakes the loop once. This takes a tenth of the time of ``asyncio.wrap_future`` for 32 images.
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


def _results(futures: Sequence["Future[Answer]"]) -> list[Answer]:
    """Return the answers of one request, whose futures are all done unless one has failed.

    Raises:
        ServeError: One of them failed.
    """
    try:
        for future in futures:
            if future.done():  # where one has failed, others may not be, and would block
                future.result()
        return [future.result() for future in futures]
    except CancelledError:
        raise StoppingError("the server stopped before the answer was there") from None
