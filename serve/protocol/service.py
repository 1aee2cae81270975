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
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from gati_jax import __version__

from ..engine.records import Answer, DeadlineError, StepError, StoppingError
from .admission import Admission, Door
from .backend import Backend
from .codec import DTYPES, Outgoing, Request, images_of, limits_of, outputs_of
from .messages import ModelStatistics, NotReadyError, Parameters, RequestError, ServerMetadata, UnauthorizedError
from .model import Model, Times
from .repository import Entry, Repository

NAME = "gati-jax"
EXTENSIONS = ["binary_tensor_data", "model_configuration", "statistics", "model_repository"]
_log = logging.getLogger("serve")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """An answer, independent of the transport."""

    model: str
    version: str
    id: str
    parameters: Parameters
    outputs: Sequence[Outgoing]


class Compared(NamedTuple):
    """An image's answer, and the base's."""

    route: int
    notes: Mapping[str, str]
    answer: Answer
    base: Answer


class Service:
    """Answers requests for the models of a repository; used from the event loop's thread only."""

    def __init__(self, models: Repository, *, door: Door) -> None:
        """Prepare; it is ready once models are. The transports ask the ``door`` before they read a request."""
        self.models = models
        self.door = door
        self.draining = False

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
        """Whether the server takes new requests: each model has been tried, and some answer."""
        entries = self.models.entries.values()
        answering = [entry.running for entry in entries if entry.backend is not None]
        return bool(answering) and all(answering) and not self.warming_up and not self.draining

    @property
    def warming_up(self) -> bool:
        """Whether some model has not been tried yet."""
        return not all(entry.tried for entry in self.models.entries.values())

    @property
    def alive(self) -> bool:
        """Whether nothing has happened that only a restart can mend."""
        return self.draining or all(e.running for e in self.models.entries.values() if e.backend is not None)

    def check_alive(self) -> None:
        """Check that the server need not be restarted.

        Raises:
            NotReadyError: An engine's thread has ended.
        """
        if not self.alive:
            raise NotReadyError("the engine has ended: restart the server; its log says why")

    def check_ready(self) -> None:
        """Check that the server takes new requests.

        Raises:
            NotReadyError: It is warming up or stopping.
        """
        if not self.ready:
            raise NotReadyError("the server is warming up" if self.warming_up else "the server is stopping")

    def is_ready(self, name: str, version: str = "") -> bool:
        """Return whether the server takes new requests to a model.

        Raises:
            UnknownModelError: There is no such model.
        """
        return self.models.find(name, version).running and not self.draining

    def admit(
        self, *, arrived: float | None = None, size: int = 0, patience: float = math.inf, model: str = ""
    ) -> Admission:
        """Admit an inference request before its body is read, see ``Door.enter``; ``model`` is what a path names.

        Raises:
            NotReadyError: No model answers yet.
        """
        entries = self.models.entries.values()
        if all(entry.backend is None for entry in entries):
            raise next(iter(entries)).unavailable
        names = self.models.entries
        if model not in names:  # a name of a client's own must not be remembered
            model = next(iter(names)) if len(names) == 1 else ""
        return self.door.enter(arrived=arrived, size=size, patience=patience, model=model)

    def metadata(self) -> ServerMetadata:
        """Describe the server."""
        return ServerMetadata(name=NAME, version=__version__, extensions=EXTENSIONS)

    def statistics(self, name: str, version: str = "") -> ModelStatistics:
        """Return a model's statistics; no name means all models that are loaded.

        Raises:
            NotReadyError: It is not loaded.
            UnknownModelError: There is no such model.
        """
        entries = [self.models.find(name, version)] if name else self.models.entries.values()
        found = [entry.tally.snapshot(entry.name, entry.model.version) for entry in entries if name or entry.loaded]
        return ModelStatistics(model_stats=found)

    async def infer(self, request: Request, *, admission: Admission | None = None, request_id: str = "") -> Response:
        """Answer a request; if this is cancelled, its images are abandoned.

        Its time-outs count from its arrival, see ``admission``, which the caller has entered; None enters one.

        Raises:
            ServeError: Why there is no answer.
        """
        if admission is None:
            with self.admit() as own:
                return await self.infer(request, admission=own, request_id=request_id)
        entry = self.models.find(request.model, request.version)
        with _counting(entry, admission):
            response, rows, times = await self._infer(request, entry, admission, request_id)
        entry.tally.answered(rows, times)
        return response

    async def compare(self, request: Request, *, admission: Admission, request_id: str = "") -> Compared:
        """Answer a request for one image as ``infer`` does, and by the base as well: a second image of the request.

        A person asks, and not a client: neither adaptation nor what is measured of the traffic sees it. Stored answers
        are not asked for.

        Raises:
            ServeError: Why there is no answer.
        """
        entry = self.models.find(request.model, request.version)
        with _counting(entry, admission):
            backend, model = _backend_of(entry), entry.model
            epsilon, deadline_ms, seconds = limits_of(request.parameters)
            images = images_of(request, model)
            if len(images) != 1:
                raise RequestError(f"{model.input_name}: expected one, got {len(images)}")
            decoded = time.monotonic()
            admission.take(2, seconds, model=model.name)
            route, base = _route(backend, epsilon, deadline_ms), len(model.plans) - 1
            (answer, by_base), notes = await self._ask(
                backend, images, (route, base), admission, request_id, since=decoded, is_traffic=False
            )
        now = time.monotonic()
        entry.tally.answered(2, Times(now - admission.arrived, 0.0, answer.computed + by_base.computed, 0.0))
        return Compared(route, notes, answer, by_base)

    async def _infer(
        self, request: Request, entry: Entry, admission: Admission, request_id: str
    ) -> tuple[Response, int, Times]:
        started = time.monotonic()
        backend, model = _backend_of(entry), entry.model
        epsilon, deadline_ms, seconds = limits_of(request.parameters)
        outputs = outputs_of(request, model)
        images = images_of(request, model)
        decoded = time.monotonic()
        admission.take(len(images), seconds, model=model.name)
        route = _route(backend, epsilon, deadline_ms)
        answers, noted = await self._ask(backend, images, (route,), admission, request_id, since=decoded)
        answered = time.monotonic()
        plan = model.plans[route]
        bound = model.bounds.get(plan)
        response = Response(
            model=model.name,
            version=model.version,
            id=request.id,
            parameters={"plan": plan, **({} if bound is None else bound._asdict()), **noted},
            outputs=[_output(model, name, answers, binary=binary) for name, binary in outputs.items()],
        )
        now = time.monotonic()
        computing = min(max(answer.computed for answer in answers), answered - decoded)
        return response, len(images), Times(now - admission.arrived, decoded - started, computing, now - answered)

    async def _ask(
        self,
        backend: Backend,
        images: Shaped[np.ndarray, "images *input"],
        routes: Sequence[int],
        admission: Admission,
        request_id: str,
        *,
        since: float,
        is_traffic: bool = True,
    ) -> tuple[list[Answer], Mapping[str, str]]:
        """Have all images answered by each of some routes, in turn; also the first one's notes.

        Raises:
            ServeError: Why there is no answer.
        """
        deadline, futures, noted = admission.deadline, list[Future[Answer]](), dict[str, str]()
        try:
            for route in routes:
                futures += backend.engine.submit(
                    images, route=route, deadline=deadline, request_id=request_id, is_traffic=is_traffic
                )
                noted = noted or backend.notes(route)
            # The engine lets a deadline pass at its next step; a step that hangs must not keep the client.
            async with asyncio.timeout(deadline - since):
                await _wait(futures)
        except TimeoutError:
            if not all(future.done() for future in futures):  # else the event loop was late, and not the engine
                self.door.refused("deadline")
                waited = time.monotonic() - admission.arrived
                raise DeadlineError(f"the deadline passed: no answer within {waited * 1000:.3g} ms") from None
        except ValueError as error:
            raise RequestError(str(error)) from None
        finally:
            for future in futures:  # those that are not done: their images are abandoned
                future.cancel()
        answers = _results(futures)
        admission.answered = True
        if bad := [i for i, answer in enumerate(answers) if not np.isfinite(answer.logits).all()]:
            raise RequestError(f"images: expected inputs with finite logits, got NaN or infinity for image {bad[0]}")
        return answers, noted


@contextlib.contextmanager
def _counting(entry: Entry, admission: Admission) -> Generator[None]:
    """Count a request that fails."""
    try:
        yield
    except BaseException as error:
        entry.tally.failed(time.monotonic() - admission.arrived)
        if isinstance(error, StepError):
            _log.exception("a request was lost with its step")
        raise


def _backend_of(entry: Entry) -> Backend:
    if entry.backend is None:
        raise entry.unavailable
    return entry.backend


def _route(backend: Backend, epsilon: float | None, deadline_ms: float | None) -> int:
    try:
        return backend.choose_route(epsilon, deadline_ms)
    except ValueError as error:
        raise RequestError(str(error)) from None


def _output(model: Model, name: str, answers: Sequence[Answer], *, binary: bool) -> Outgoing:
    datatype, shape = model.outputs[name]
    if name == "class_name":
        values: np.ndarray | list[bytes] = [model.names[answer.class_index] for answer in answers]
    elif name in {"logits", "probabilities"}:
        logits = np.stack([answer.logits for answer in answers])
        values = logits if name == "logits" else softmax(logits)
    else:
        values = np.asarray([getattr(answer, name) for answer in answers], DTYPES[datatype])
    return Outgoing(name, datatype, (len(answers), *shape), values, binary)


def softmax(logits: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    """Return the probabilities of the classes."""
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
