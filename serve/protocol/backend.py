"""What answers a model's requests, as the protocol sees it."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol

import numpy as np

from ..engine.records import Answer, Route, Statistics

Event = tuple[int, str, str]
"""What adaptation did: the requests that had been watched before it, its kind (an alarm, a trial, a swap), a text."""


class InferenceEngine(Protocol):
    """The methods of ``serve.engine.engine.Engine`` that the service uses."""

    def submit(
        self,
        images: np.ndarray,
        *,
        route: int,
        deadline: float | None = None,
        request_id: str = "",
        is_traffic: bool = True,
    ) -> "Sequence[Future[Answer]]":
        """Admit all images or none; those that are no traffic are answered, and left out of what is measured of it."""
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
    routes: Callable[[], Sequence[Route]] = lambda: ()
    """Returns the engine's routes, whose buckets grow; the base is the last one."""
    events: Callable[[], Sequence[Event]] = lambda: ()
    """Returns what adaptation has done since the start, the latest last."""
    grow: Callable[[], None] = lambda: None
    """Compiles what may come later, larger batches, while the engine answers."""
