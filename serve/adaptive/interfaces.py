"""What adaptation and the rest of the server need of each other: an engine below it, and its parts above."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np
from jaxtyping import Shaped

from ..engine.engine import Engine
from ..engine.records import Answer, Job, Observer, Statistics
from ..engine.routes import CascadeRoute
from ..engine.runner import JaxRunner
from ..engine.turns import Turn
from ..protocol.backend import Event, InferenceEngine


class Answering(Protocol):
    """What answers for an ``AdaptiveEngine``: an ``Engine``, or the engines of replicas elsewhere."""

    def submit(
        self,
        images: Shaped[np.ndarray, "images *input"],
        *,
        route: int | Sequence[int],
        deadline: float | None = None,
        request_id: str = "",
        marks: Sequence[object] | None = None,
        spare: int = 0,
        is_traffic: bool = True,
    ) -> list[Future[Answer]]:
        """See ``Engine.submit``."""
        ...

    def submit_shadow(self, image: Shaped[np.ndarray, "*input"], *, route: int, mark: object = None) -> None:
        """See ``Engine.submit_shadow``."""

    def between_steps(self, work: Callable[[], None]) -> Future[None]:
        """See ``Engine.between_steps``."""
        ...

    @property
    def running(self) -> bool:
        """See ``Engine.running``."""
        ...

    def statistics(self) -> Statistics:
        """See ``Engine.statistics``."""
        ...

    def stop(self, timeout: float | None = None) -> bool:
        """See ``Engine.stop``."""
        ...


class Watching(InferenceEngine, Observer, Protocol):
    """The engine as the service sees it, which also observes the one below it."""

    def report_to(self, observer: Observer) -> None:
        """Pass all that the engine reports on to an observer, too; before the engine starts."""

    def shadow(self, job: Job, answer: Answer) -> bool:
        """Take a cache's answer; return whether to shadow the request."""
        ...

    def notes(self, route: int) -> Mapping[str, str]:
        """Return a response's parameters for the request that was submitted last."""
        ...

    def events(self) -> Sequence[Event]:
        """Return the latest events, the newest last."""
        ...


class Parts(Protocol):
    """An adaptive server before there is an engine: ``AdaptiveParts``, or those of a replica."""

    @property
    def adapting(self) -> Watching:
        """What stands before the engine."""
        ...

    @property
    def sources(self) -> list[CascadeRoute]:
        """For the runner: the plan that adapts, and the base."""
        ...

    @property
    def turn(self) -> Turn | None:
        """What the engine asks before each step; None: nothing of its own."""
        ...

    def serve(self, engine: Engine, runner: JaxRunner) -> None:
        """Start an engine that ``adapting`` observes."""

    def close(self) -> None:
        """Let go of what is held, where no engine could be started."""
