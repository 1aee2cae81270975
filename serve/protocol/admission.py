"""The door: limits of requests, and who is let in before a body is read.

A server that takes every request and refuses late does the work of all and answers none in time. So a request asks at
the door with nothing but its head: for a place among the images on the way, and for its body's bytes. What it got, it
gives back when it is over, however it ends.

How long a request will wait follows from the drain rate: images answered per second, measured while at least ``FULL``
wait, whose bodies are here. With fewer, the server idles now and then, and the rate would tell of the clients and not
of it. A request whose deadline will have passed by then is refused: with its head if that has the deadline, else once
its body is decoded.
"""

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncGenerator, Callable, Generator
from types import TracebackType
from typing import Self

from ..engine.records import DeadlineError, OverloadedError, ServeError, StoppingError
from ..engine.scheduler import PATIENCE
from .drain import FULL, Drain
from .messages import SlowBodyError, TooLargeError

MARGIN = 0.7  # share of the time left that the expected wait may take; steps and other requests cause the rest
_RETRY = 1.0  # seconds, where no rate is known
_FRESH = 0.1  # seconds in which a body is expected to arrive; one that takes longer holds up no other request
_STALLED = 1.0  # seconds after which a message that has a place makes it for another one
_QUESTIONS = 8  # gRPC's messages on their way to other methods than inference
_INFLATING = 2  # bodies that are inflated at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds of requests; ``serve.settings`` describes them, by the same names."""

    capacity: int = 256
    max_body: int = 32 * 2**20
    max_bodies: int = 256 * 2**20
    timeout: float = 60.0
    idle_timeout: float = 10.0
    header_bytes: int = 32 * 2**10
    header_count: int = 100
    header_timeout: float = 10.0
    keep_alive: float = 75.0
    connections: int = 1024
    grpc_streams: int = 1024


def limits_of(settings: object) -> Limits:
    """Return the bounds that the server's settings have, by the same names."""
    return Limits(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Limits)})


class Door:
    """Counts images and bytes on the way, over all requests of both transports; for the event loop's thread only.

    Args:
        limits: What it keeps.
        refused: Called with the reason of each refusal: "overloaded" (images), "memory" (bytes), "late" (a deadline
            that cannot be met), "deadline" (one that has passed), "stopping".
        clock: Seconds.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        refused: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open it, empty."""
        self.limits, self.refused, self.clock = limits, refused, clock
        self.images = self.bytes = 0
        self.closing = asyncio.Event()
        """Set once nothing more is admitted."""
        self.messages = Messages(self, max(1, limits.max_bodies // limits.max_body))
        """gRPC's requests for inference."""
        self.questions = Messages(self, _QUESTIONS)
        """All other calls of gRPC, some of which need no token."""
        self.inflating = asyncio.Semaphore(_INFLATING)
        """For compressed bodies, each of which may take the memory of the largest body."""
        self._inside: set[Admission] = set()
        self._drains: dict[str, Drain] = {}
        """By model: those of a slow one do not delay those of another."""

    @property
    def closed(self) -> bool:
        """Whether nothing more is admitted."""
        return self.closing.is_set()

    @property
    def rate(self) -> float | None:
        """Images of all models answered per second under load; None if there was none."""
        known = [drain.rate for drain in self._drains.values() if drain.rate]
        return sum(known) or None

    def enter(
        self,
        *,
        arrived: float | None = None,
        size: int = 0,
        images: int = 1,
        patience: float = math.inf,
        model: str = "",
    ) -> "Admission":
        """Admit a request, of which the head alone is known.

        Args:
            arrived: When its first byte came, by the door's clock; its time-outs count from there. None for now.
            size: The announced bytes of its body; 0 if there is none, or its length is not known.
            images: The least that it may hold; 0 for a request that asks for no inference.
            patience: Seconds from its arrival to its deadline, where the head has one.
            model: Whose images it has, where that is known.

        Raises:
            DeadlineError: The deadline has passed.
            OverloadedError: Too many images, or bytes, are on the way; or those before it are expected to take until
                the deadline.
            StoppingError: The door is closed.
            TooLargeError: The body is larger than any may be.
        """
        if size > self.limits.max_body:
            raise TooLargeError(f"Content-Length: expected at most {self.limits.max_body} bytes, got {size}")
        if self.closed and images:
            self.refused("stopping")
            raise StoppingError("stopping: the server admits nothing more")
        arrived = self.clock() if arrived is None else arrived
        admission = Admission(self, arrived, arrived + patience, model)
        if images:
            self.check_time(admission, images)
        self.reserve(images, size)
        admission.images, admission.size = images, size
        self._inside.add(admission)
        return admission

    def reserve(self, images: int, size: int) -> None:
        """Take places for so many images and bytes more.

        Raises:
            OverloadedError: There are not enough.
        """
        limits, more = self.limits, self.images + images
        if images and more > limits.capacity:
            raise self.refuse("overloaded", f"{self.images} of {limits.capacity} places are taken")
        if size and self.bytes + size > limits.max_bodies:
            raise self.refuse("memory", f"{self.bytes} of {limits.max_bodies} bytes for bodies are taken")
        self._advance()
        self.images, self.bytes = more, self.bytes + size

    def check_time(self, admission: "Admission", images: int) -> None:
        """Check that a request of so many images can be answered by its deadline.

        Raises:
            DeadlineError: The deadline has passed.
            OverloadedError: The images before it are expected to take until then.
        """
        left, rate = admission.deadline - self.clock(), self._drain(admission).rate
        if left <= 0:
            self.refused("deadline")
            raise DeadlineError("the deadline passed before the request was read")
        if rate and (self.images + images) / rate > MARGIN * left:  # the sum below takes longer
            ahead = self.ahead_of(admission)
            wait = (ahead + images) / rate
            if ahead >= FULL and wait > MARGIN * left:
                raise self.refuse("late", f"{wait * 1e3:.0f} ms expected, and {left * 1e3:.0f} ms left")

    def refuse(self, reason: str, message: str) -> OverloadedError:
        """Return a refusal; it asks clients to come back when all that is here now will have been answered."""
        self.refused(reason)
        retry = self.images / self.rate if self.rate else _RETRY
        return OverloadedError(f"overloaded: {message}; try again in {retry:.3f} s", retry)

    def leave(self, admission: "Admission") -> None:
        """Give back what a request took."""
        if admission in self._inside:
            self._inside.remove(admission)
            self._advance()
            if admission.is_whole:
                self._drain(admission).leave(admission.images, answered=admission.answered)
            self.images -= admission.images
            self.bytes -= admission.size

    def take(self, admission: "Admission", images: int) -> None:
        """Give a request places for all of its images, now that its body is here.

        Raises:
            OverloadedError: There are not enough.
        """
        self.reserve(images - admission.images, 0)
        self._drain(admission).waiting += images
        admission.images, admission.is_whole = images, True

    def ahead_of(self, admission: "Admission") -> int:
        """Return the images that are expected to be answered before those of a request."""
        fresh = self.clock() - _FRESH
        return sum(
            other.images
            for other in self._inside
            if other is not admission
            and other.model == admission.model
            and other.due <= admission.due
            and (other.is_whole or other.arrived > fresh)
        )

    def close(self) -> None:
        """Admit nothing more, and cut off the bodies that are still on their way: they cannot be answered."""
        self.closing.set()
        for admission in self._inside:
            admission.cut(StoppingError("stopping: the body came too late"))

    def _drain(self, admission: "Admission") -> Drain:
        if admission.model not in self._drains:
            self._drains[admission.model] = Drain(self.clock())
        return self._drains[admission.model]

    def _advance(self) -> None:
        now = self.clock()
        for drain in self._drains.values():
            drain.advance(now)


class Messages:
    """Places for messages of unknown length that do not arrive at once, each of which may become the largest one.

    A message that has stalled makes place for another one, so that a few of them do not keep all others out.
    """

    def __init__(self, door: Door, most: int) -> None:
        """Start with all places free."""
        self._door, self._most = door, most
        self._since: dict[Admission, float] = {}  # by who has a place, the longest first

    @contextlib.contextmanager
    def place(self, admission: "Admission") -> Generator[None]:
        """Hold a place.

        Raises:
            OverloadedError: There is none.
        """
        if len(self._since) >= self._most:
            longest, since = next(iter(self._since.items()))
            if self._door.clock() < since + _STALLED:
                raise self._door.refuse("memory", f"{self._most} messages are on their way")
            del self._since[longest]
            longest.cut(SlowBodyError(f"message: expected within {_STALLED:g} s, while others come"))
        self._since[admission] = self._door.clock()
        try:
            yield
        finally:
            self._since.pop(admission, None)


class Admission:
    """What one request has taken; a context manager that gives it back."""

    def __init__(self, door: Door, arrived: float, deadline: float, model: str) -> None:
        """Begin with nothing."""
        self.arrived, self.model = arrived, model
        self.deadline = min(deadline, arrived + door.limits.timeout)
        """When an answer is too late, by the door's clock."""
        self.images = self.size = 0
        self.is_whole = False
        """Whether its images are all here."""
        self.answered = False
        self._door, self._received = door, 0
        self._cut: ServeError | None = None
        self._until_deadline = False  # whether that is what its body waits for
        self._patience: asyncio.Timeout | None = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Give everything back."""
        self._door.leave(self)

    @property
    def due(self) -> float:
        """When its images are due, as the scheduler orders them."""
        return min(self.deadline, self.arrived + PATIENCE)

    def take(self, images: int, patience: float = math.inf, *, model: str = "") -> None:
        """Take places for all of a request's images.

        Args:
            images: Their number.
            patience: Seconds from the arrival to the deadline that the body has.
            model: Whose they are, where only the body says so.

        Raises:
            DeadlineError: The deadline has passed.
            OverloadedError: There are not enough places, or those before it are expected to take until the deadline.
        """
        self.deadline = min(self.deadline, self.arrived + patience)
        self.model = model or self.model
        self._door.check_time(self, images)
        self._door.take(self, images)

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncGenerator[None]:
        """Bound the time in which a body arrives, in all and without a byte; report what arrives by ``received``.

        Raises:
            DeadlineError: The deadline passed before the body was here.
            SlowBodyError: Time ran out.
            ServeError: Why it was ``cut``: the door was closed, say.
        """
        limits = self._door.limits
        try:
            async with asyncio.timeout(limits.timeout) as self._patience:
                self.received(0)
                yield
        except TimeoutError:
            if self._cut is not None:
                if isinstance(self._cut, StoppingError):
                    self._door.refused("stopping")
                raise self._cut from None
            if self._until_deadline:
                self._door.refused("deadline")
                raise DeadlineError("the deadline passed before the body was here") from None
            waits = f"all of it within {limits.timeout:g} s, and a part every {limits.idle_timeout:g} s"
            raise SlowBodyError(f"body: expected {waits}") from None
        finally:
            self._patience = None

    def received(self, size: int) -> None:
        """Take the bytes that have arrived, as far as they were not announced.

        Raises:
            OverloadedError: Too many bytes are on the way.
            TooLargeError: The body is larger than any may be.
        """
        limits = self._door.limits
        self._received += size
        if self._received > limits.max_body:
            raise TooLargeError(f"body: expected at most {limits.max_body} bytes, got more")
        if self.images and (more := self._received - self.size) > 0:
            self._door.reserve(0, more)
            self.size += more
        left = self.deadline - self._door.clock()
        self._until_deadline = self.deadline < self.arrived + limits.timeout and left <= limits.idle_timeout
        self._wait(min(left, limits.idle_timeout) if self._cut is None else 0.0)

    def hold(self, size: int) -> None:
        """Hold so many bytes from now on.

        Raises:
            OverloadedError: Too many bytes are on the way.
        """
        self._door.reserve(0, size - self.size)
        self.size = size

    def cut(self, why: ServeError) -> None:
        """End the reading of its body, if it is not here yet, by this error."""
        self._cut = why
        self._wait(0.0)

    def _wait(self, seconds: float) -> None:
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time() + max(0.0, seconds))
