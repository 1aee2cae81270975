"""The one controller of replicas that adapt: an actor, which is called before each request and each step of a replica.

It holds the ``AdaptiveEngine`` of a server of its own, with the folder of ``--adapt-dir``, the monitor, the input cache
and the trials; only the engine below it answers elsewhere. All requests of all replicas get their tickets here, in one
order, and are observed in that order, so that the promise is the same as of one server. What a replica was asked and
has not reported when it ends is left out, from the first such request of it on, whatever was answered: no answer has
influenced that. A controller that has ended is replaced, and goes on from the folder; until then replicas answer by the
base alone.
"""

import collections
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import prometheus_client
import ray
from jaxtyping import Shaped

import gati_jax
from gati_jax import InputError
from gati_jax.adaptation import Served, Ticket, served_by
from gati_jax.bundle.record import certified_only
from gati_jax.imports import load_chain
from gati_jax.pytrees import tree_digest

from ..adaptive import AdaptiveGauges, AdaptiveParts, build
from ..adaptive.engine import ADAPTED, BASE, FAILED, SAFE, AdaptiveEngine
from ..engine.records import Answer, Job, Statistics
from ..settings import Settings
from .exchange import HEARTBEAT, SILENT, Place, State, Told

_Id = tuple[int, int]  # of an image: the replica's call, and the row in it
_END = 5.0  # seconds for a piece of a trial


class Elsewhere:
    """In the place of an engine: notes what replicas are to answer, and makes changes between two calls."""

    def __init__(self) -> None:
        """Note nothing yet."""
        self.asked: list[tuple[Ticket | None, int]] = []
        self.shadows: list[Ticket] = []
        self._between: collections.deque[tuple[Callable[[], None], Future[None]]] = collections.deque()

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
        """Note the images that a replica is to answer; the replica has kept places for all."""
        del deadline, request_id, spare, is_traffic
        numbers = [route] * len(images) if isinstance(route, int) else route
        tickets = [mark if isinstance(mark, Ticket) else None for mark in marks or [None] * len(images)]
        self.asked += zip(tickets, numbers, strict=True)
        return [Future() for _ in images]

    def submit_shadow(self, image: Shaped[np.ndarray, "*input"], *, route: int, mark: object = None) -> None:
        """Note an image that the input cache has answered."""
        del image, route
        assert isinstance(mark, Ticket)  # noqa: S101 (narrows the type)
        self.shadows.append(mark)

    def between_steps(self, work: Callable[[], None]) -> Future[None]:
        """Do it before the present call returns, or the next one."""
        done: Future[None] = Future()
        self._between.append((work, done))
        return done

    def change(self) -> None:
        """Make the changes that wait."""
        while self._between:
            work, done = self._between.popleft()
            work()
            done.set_result(None)

    @property
    def running(self) -> bool:
        """It always is."""
        return True

    def statistics(self) -> Statistics:
        """Return nothing: replicas have their own."""
        return Statistics(waiting={}, slots_in_use=0, admitted=0, backlog_ms=0.0)

    def stop(self, timeout: float | None = None) -> bool:
        """Nothing is left to finish here."""
        del timeout
        return True


class Controller:
    """The actor.

    Args:
        settings: Of the server; there is one bundle.
        places: Images on their way at once, of all replicas.
        directory: The actor of ``Directory``, which is told where metrics are shown.
    """

    def __init__(self, settings: Settings, places: int, directory: Any) -> None:  # noqa: ANN401 (an actor's handle is untyped)
        """Prepare; the first call reads the bundle and the folder, and so tells why it cannot."""
        logging.basicConfig(level=settings.log_level.upper())
        self._settings, self._places, self._directory = settings, places, directory
        self._parts: AdaptiveParts | None = None
        self._engine = Elsewhere()
        self._life, self._serial, self._epoch = secrets.token_hex(8), 0, 0
        self._thresholds = np.zeros(0, np.float32)
        self._tickets: dict[str, dict[_Id, Ticket]] = {}  # by replica, in the order in which they came
        self._last_call: dict[str, float] = {}

    def begin(self) -> None:
        """Read the bundle, and go on where the folder says; at once if that is done.

        Raises:
            InputError: See ``build``; or the folder's version has refitted caches, which replicas do not have.
        """
        if self._parts is not None:
            return
        settings = self._settings
        ((name, folder),) = settings.bundles.items()
        chain = load_chain(settings.chain, "--chain") if settings.chain else None
        bundle = gati_jax.load_bundle(folder, chain=chain)
        parts = build(
            bundle,
            settings.versions(name),
            capacity=self._places,
            epsilon=settings.adapt_epsilon,
            share=settings.adapt_share,
            without=settings.adapt_without,
        )
        served = parts.adapting.controller.served
        if tree_digest(served.caches) != tree_digest(served_by(certified_only(bundle)).caches):
            parts.close()
            raise InputError("--adapt-dir: expected a folder without refitted caches for replicas, got one with them")
        self._parts, self._thresholds = parts, served.thresholds
        parts.adapting.serve(self._engine, self._prepare, end=parts.worker.stop)
        parts.worker.start()
        self._show(name, parts)

    def exchange(
        self,
        replica: str,
        told: Sequence[Told],
        images: Shaped[np.ndarray, "images h w c"] | None = None,
        call: int = 0,
    ) -> State:
        """Take a replica's reports, and what it asks about; return what is served.

        Args:
            replica: Its name.
            told: What has become of images since its last call.
            images: That it has places for.
            call: Its number for these images.

        Raises:
            InputError: See ``begin``.
        """
        self.begin()
        self._last_call[replica] = now = time.monotonic()
        for other in [name for name, at in self._last_call.items() if at < now - SILENT]:
            self._forget(other)
        for one in told:
            self._take(self._tickets.setdefault(replica, {}), one)
        self._engine.change()
        places = () if images is None else self._admit(self._tickets.setdefault(replica, {}), images, call)
        self._engine.change()  # a stored answer may have been one too many
        adapting = self._adapting
        self._serial += 1
        note = adapting.notes(ADAPTED).get("adaptation", "")
        return State(
            self._life, self._serial, self._epoch, self._thresholds, adapting.state in {SAFE, FAILED}, note, places
        )

    def stop(self) -> None:
        """Save the state."""
        if self._parts is not None:
            self._parts.adapting.stop(_END)

    @property
    def _adapting(self) -> AdaptiveEngine:
        assert self._parts is not None, "begin() is called first"  # noqa: S101 (narrows the type)
        return self._parts.adapting

    def _prepare(self, served: Served) -> Callable[[], None]:
        def swap() -> None:
            self._thresholds = served.thresholds
            self._epoch += 1

        return swap

    def _admit(
        self, tickets: dict[_Id, Ticket], images: Shaped[np.ndarray, "images h w c"], call: int
    ) -> tuple[Place, ...]:
        images = np.ascontiguousarray(images)
        self._engine.asked, self._engine.shadows = [], []
        answers = self._adapting.submit(images, route=ADAPTED)
        to_ask, shadows = iter(self._engine.asked), {_row(images, ticket): ticket for ticket in self._engine.shadows}
        places: list[Place] = []
        for row, answer in enumerate(answers):
            if answer.done():
                ticket, route = shadows.get(row), BASE
            else:
                ticket, route = next(to_ask)
            stored = answer.result() if answer.done() else None
            places.append(Place(route, ticket is not None, ticket is not None and ticket.shadow, stored))
            if ticket is not None:
                tickets[call, row] = ticket
        return tuple(places)

    def _take(self, tickets: dict[_Id, Ticket], told: Told) -> None:
        """Take a report; of images that are not known, or no longer, there is nothing to take."""
        ticket = tickets.get((told.call, told.row))
        if ticket is None or ticket.complete:
            return
        job, answer = Job(image=ticket.image, route=ADAPTED, arrived=0.0, mark=ticket), told.answer
        adapting = self._adapting
        if told.kind == "answered" and answer is not None:
            if ticket.observation is None:
                is_base = answer.exit == adapting.controller.depth
                adapting.answered(job, answer, 0.0) if is_base else adapting.shadow(job, answer)
        elif told.kind == "shadowed" and answer is not None and ticket.observation is not None:
            adapting.shadowed(job, answer)
        else:
            adapting.shadowed(job, None)
        while tickets and tickets[first := next(iter(tickets))].complete:  # those behind the first open one are held
            del tickets[first]

    def _forget(self, replica: str) -> None:
        """Leave out what a replica that has ended was asked, from the first image on that is not complete."""
        del self._last_call[replica]
        tickets = self._tickets.pop(replica, {})
        for ticket in tickets.values():
            ticket.observation = None
        for ticket in tickets.values():
            if not ticket.complete:
                self._adapting.shadowed(Job(image=ticket.image, route=ADAPTED, arrived=0.0, mark=ticket), None)

    def _show(self, model: str, parts: AdaptiveParts) -> None:
        """Show metrics at a port, and tell the directory where, again and again."""
        registry, settings = prometheus_client.CollectorRegistry(), self._settings
        registry.register(AdaptiveGauges({model: (parts.adapting, parts.worker)}))
        host = "127.0.0.1" if settings.loopback else ray.util.get_node_ip_address()
        server, _ = prometheus_client.start_http_server(0, host, registry)
        address = f"{host}:{server.server_port}"

        def report() -> None:
            while True:
                self._directory.report.remote(address)
                time.sleep(HEARTBEAT)

        threading.Thread(target=report, name="metrics", daemon=True).start()


def _row(images: Shaped[np.ndarray, "images h w c"], ticket: Ticket) -> int:
    """Return which of the images a ticket is of: its image is a view."""
    begins = (array.__array_interface__["data"][0] for array in (ticket.image, images))
    return (next(begins) - next(begins)) // images.strides[0]
