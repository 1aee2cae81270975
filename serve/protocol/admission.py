"""The door: limits of requests, and who is let in before a body is read.

A server that takes every request and refuses late does the work of all and answers none in time. So a request asks at
the door with nothing but its head: for a place among the images on the way, and for its body's bytes. What it got, it
gives back when it is over, however it ends.

How long a request will wait follows from the drain rate: images answered per second, measured while at least ``FULL``
are on the way. With fewer, the server idles now and then, and the rate would tell of the clients and not of it.
"""

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Self

from ..engine.records import OverloadedError, StoppingError
from ..engine.scheduler import PATIENCE
from .messages import SlowBodyError, TooLargeError

FULL = 8  # images on the way with which the device is taken to be busy: a batch
MARGIN = 0.7  # share of the time left that the expected wait may take; steps and other requests cause the rest
_MEMORY = 5.0  # seconds of load over which the drain rate is averaged
_LEAST = 0.25  # seconds of load before it is believed
_RETRY = 1.0  # seconds, where no rate is known


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
            that cannot be met).
        clock: Seconds.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        refused: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open it, with nobody inside."""
        self.limits, self.refused, self.clock = limits, refused, clock
        self.images = self.bytes = 0
        self.closed = False
        self.messages = asyncio.Semaphore(max(1, limits.max_bodies // limits.max_body))
        """gRPC's messages have no announced length: so many may be on their way, of any length, at once."""
        self._inside: set[Admission] = set()
        self._answered = self._loaded = 0.0
        self._at = clock()

    @property
    def rate(self) -> float | None:
        """Images answered per second under load; None if there was none."""
        return self._answered / self._loaded if self._loaded >= _LEAST and self._answered else None

    def enter(self, *, arrived: float | None = None, size: int = 0, images: int = 1) -> "Admission":
        """Admit a request, of which the head alone is known.

        Args:
            arrived: When its first byte came, by the door's clock; its time-outs count from there. None for now.
            size: The announced bytes of its body; 0 if there is none, or its length is not known.
            images: The least that it may hold; 0 for a request that asks for no inference.

        Raises:
            OverloadedError: Too many images, or bytes, are on the way.
            StoppingError: The door is closed.
            TooLargeError: The body is larger than any may be.
        """
        if size > self.limits.max_body:
            raise TooLargeError(f"Content-Length: expected at most {self.limits.max_body} bytes, got {size}")
        if self.closed and images:
            self.refused("stopping")
            raise StoppingError("stopping: the server admits nothing more")
        admission = Admission(self, self.clock() if arrived is None else arrived)
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
            self._answered += admission.images if admission.answered and self.images >= FULL else 0
            self.images -= admission.images
            self.bytes -= admission.size

    def ahead_of(self, admission: "Admission") -> int:
        """Return the images that are expected to be answered before those of a request."""
        return sum(other.images for other in self._inside if other is not admission and other.due <= admission.due)

    def close(self) -> None:
        """Admit nothing more, and cut off the bodies that are still on their way: they cannot be answered."""
        self.closed = True
        for admission in self._inside:
            admission.cut()

    def _advance(self) -> None:
        """Let the time since the last change count, if the server was under load."""
        now = self.clock()
        if self.images >= FULL:
            passed = now - self._at
            keep = math.exp(-passed / _MEMORY)
            self._answered, self._loaded = self._answered * keep, self._loaded * keep + passed
        self._at = now


class Admission:
    """What one request has taken; a context manager that gives it back."""

    def __init__(self, door: Door, arrived: float) -> None:
        """Begin with nothing."""
        self.arrived = arrived
        self.due = math.inf
        """When its images are due, as the scheduler orders them; infinity until they are all here."""
        self.images = self.size = 0
        self.answered = False
        self._door, self._received = door, 0
        self._patience: asyncio.Timeout | None = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Give everything back."""
        self._door.leave(self)

    def take(self, images: int, deadline: float) -> None:
        """Take places for all of a request's images.

        Args:
            images: Their number.
            deadline: When answers are too late, by the door's clock.

        Raises:
            OverloadedError: There are not enough places, or those before it are expected to take until the deadline.
        """
        door = self._door
        self.due = min(deadline, self.arrived + PATIENCE)
        left, rate = deadline - door.clock(), door.rate
        if rate and (door.images + images) / rate > MARGIN * left:  # the sum below takes longer
            ahead = door.ahead_of(self)
            wait = (ahead + images) / rate
            if ahead >= FULL and wait > MARGIN * left:
                raise door.refuse("late", f"{wait * 1e3:.0f} ms expected, and {max(left, 0) * 1e3:.0f} ms left")
        door.reserve(images - self.images, 0)
        self.images = images

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncGenerator[None]:
        """Bound the time in which a body arrives, in all and without a byte; report what arrives by ``received``.

        Raises:
            SlowBodyError: Time ran out.
            StoppingError: The door was closed before the body was here.
        """
        limits = self._door.limits
        try:
            async with asyncio.timeout(limits.timeout) as self._patience:
                self.received(0)
                yield
        except TimeoutError:
            if self._door.closed:
                raise StoppingError("stopping: the body came too late") from None
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
        self._wait(min(self.arrived + limits.timeout - self._door.clock(), limits.idle_timeout))

    def expand(self, size: int) -> None:
        """Take the bytes that a body may have once it is inflated, besides its own.

        Raises:
            OverloadedError: Too many bytes are on the way.
        """
        self._door.reserve(0, size)
        self.size += size

    def cut(self) -> None:
        """End the reading of its body."""
        self._wait(0.0)

    def _wait(self, seconds: float) -> None:
        if self._patience is not None and not self._patience.expired():
            self._patience.reschedule(asyncio.get_running_loop().time() + max(0.0, seconds))
