"""An engine whose answers are computed by hand, and the service in front of it.

An image of value v (its first pixel) is answered with class v % 3, logits 0 but for a 2 at the class, and it leaves
by v % 3: at site 0, at site 2, or at exit 4, the base, whose score is infinite; elsewhere the score is v / 2. So three
classes at 2: probabilities e^2 / (e^2 + 2) = 0.7870 and 1 / (e^2 + 2) = 0.1065.
"""

import asyncio
import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from serve.engine.records import Answer, Job, Route, Statistics, Step
from serve.metrics import EngineMetrics, Metrics
from serve.protocol.admission import Door, Limits
from serve.protocol.backend import Backend
from serve.protocol.connections import HttpServer
from serve.protocol.drain import Drain
from serve.protocol.grpc import create_server
from serve.protocol.http import create_app
from serve.protocol.model import Bound, Model, Tally
from serve.protocol.repository import Entry, Loaded, Repository, Source
from serve.protocol.service import Service

SHAPE = (2, 3, 1)
EXITS = (0, 2, 4)
LIMIT = 4096
LIMITS = Limits(capacity=16, max_body=LIMIT, max_bodies=2**20, timeout=30.0)
ROUTES = tuple(
    Route(
        name=name, sites=EXITS[:-1], depth=4, epsilon=epsilon, stage_ms={1: (1.0,) * 3, 4: (2.0,) * 3}, leave=(0, 0, 1)
    )
    for name, epsilon in (("tight", 0.01), ("loose", 0.05), ("base", 0.0))
)
MODEL = Model(
    name="gati",
    version="v7",
    input_shape=SHAPE,
    datatypes=("UINT8", "FP32"),
    classes=3,
    class_names=("cat", "dog", "élan"),
    plans=("tight", "loose", "base"),
    bounds={"tight": Bound(0.01, 0.05), "loose": Bound(0.05, 0.05), "base": Bound(0.0, 0.0)},
    max_rows=8,
)


def answer(value: float) -> Answer:
    index = int(value) % 3
    logits = np.zeros(3, np.float32)
    logits[index] = 2
    return Answer(index, EXITS[index], float("inf") if index == 2 else value / 2, logits, computed=1e-6)


def choose_route(epsilon, deadline_ms):
    del deadline_ms
    if epsilon is None:
        return 0
    if epsilon < 0.01:
        return 2
    if epsilon > 0.5:
        raise ValueError(f"epsilon: expected at most 0.5, got {epsilon}")
    return 1 if epsilon >= 0.05 else 0


class FakeEngine:
    """Answers in another thread, as the engine does."""

    def __init__(self):
        self.refusal: Exception | None = None  # of submit
        self.failure: Exception | None = None  # of every future
        self.silent = False  # whether it never answers
        self.submitted = threading.Event()
        self.abandoned = threading.Event()
        self.calls: list[dict] = []
        self.observer: EngineMetrics | None = None
        self._pool = ThreadPoolExecutor(1)

    def submit(self, images, *, route, deadline=None, request_id="", is_traffic=True):
        if self.refusal:
            raise self.refusal
        self.calls.append({"images": images, "route": route, "deadline": deadline, "request_id": request_id})
        jobs = [Job(image=image, route=route, arrived=0.0, is_traffic=is_traffic) for image in images]
        if not self.silent:
            self._pool.submit(self._run, jobs, route)
        for job in jobs:
            job.done.add_done_callback(lambda done: self.abandoned.set() if done.cancelled() else None)
        self.submitted.set()
        return [job.done for job in jobs]

    def _run(self, jobs, route):
        if self.observer:
            self.observer.step(Step(route, 0, 8, tuple(jobs)), 0.002, failed=bool(self.failure))
        for job in jobs:
            if not job.done.set_running_or_notify_cancel():
                continue
            if self.failure:
                job.done.set_exception(self.failure)
            else:
                one = answer(float(job.image.ravel()[0]))
                if self.observer:
                    self.observer.answered(job, one, 0.003)
                job.done.set_result(one)

    def stop(self, timeout: float | None = None) -> bool:
        del timeout
        self._pool.shutdown()
        return True

    running = True

    def statistics(self):
        return Statistics(
            waiting={(1, 2): 5},
            slots_in_use=3,
            admitted=16,
            backlog_ms=250.0,
            batches=(1, 4),
            leave=((0, 0, 1),) * 3,
            running=True,
        )


class Front:
    """A service in front of a fake engine."""

    def __init__(
        self, *, token=None, operator=None, limits=LIMITS, ready=True, clock=time.monotonic, start=None, with_page=True
    ):
        self.engine, self.metrics, tally = FakeEngine(), Metrics(), Tally()
        self.engine.observer = self.observer = self.metrics.of("gati", ROUTES, tally)
        self.door = Door(limits, refused=self.metrics.refused, clock=clock)
        self.entry = Entry("gati", Source(lambda: self.loaded, lambda: self.loaded.model.version), tally)
        self.entry.loaded = self.loaded = Loaded(MODEL, start or self.backend)
        self.service = Service(Repository([self.entry]), door=self.door)
        self.metrics.watch(self.service)
        self.token, self.operator = token, operator
        self.app = create_app(self.service, self.metrics, token=token, operator=operator, with_page=with_page)
        if ready:
            self.warm_up()

    def backend(self):
        return Backend(self.engine, choose_route, routes=lambda: ROUTES)

    def warm_up(self):
        self.entry.serve(*self.entry.start())

    def answers(self, rate):
        """Have the door believe that so many images are answered per second."""
        drain = self.door._drains["gati"] = Drain(self.door.clock())
        drain._answered, drain._loaded = rate, 1.0

    def sockets(self):
        """See ``sockets``."""
        return sockets(self.service, self.metrics, token=self.token, operator=self.operator)


@contextlib.contextmanager
def sockets(service, metrics, *, token=None, operator=None):
    """Serve over real sockets from a thread of its own; yields HTTP's port and gRPC's."""
    ports, up, end = [], threading.Event(), {}

    async def serve():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            app = create_app(service, metrics, token=token, operator=operator)
            http = HttpServer(app, listener, service.door.limits, refused=metrics.refused, refuse=app.refuse)
            rpc = create_server(service, metrics, token=token, operator=operator)
            ports.extend((listener.getsockname()[1], rpc.add_insecure_port("127.0.0.1:0")))
            await rpc.start()
            end["loop"], end["event"] = asyncio.get_running_loop(), asyncio.Event()
            running = asyncio.create_task(http.serve())
            while not http.started:
                await asyncio.sleep(0.001)
            up.set()
            await end["event"].wait()
            http.should_exit = True
            await asyncio.gather(running, rpc.stop(0))

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert up.wait(30)
    try:
        yield tuple(ports)
    finally:
        end["loop"].call_soon_threadsafe(end["event"].set)
        thread.join(30)
