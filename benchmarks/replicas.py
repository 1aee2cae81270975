"""A cluster of replicas as discrete events: proxies, dispatch by Ray Serve's rule, steps in buckets, incidents.

A request comes to one of the proxies in turn, which takes them one after another, and goes to a replica of its node:
of two drawn at random, the one with fewer requests (Ray Serve's "power of two choices"; a proxy prefers its own node's
replicas). Lengths of queues are known at once here; Serve's own are a network's delay old. A replica reads requests one
after another, refuses beyond its capacity, and runs steps by the rules of ``serve.engine.policy``: the bucket that
promises most departures a millisecond, and the queue where that, weighted by age, is most.

Not simulated: deadlines, shadow jobs, a step that runs ahead, shares that are learned, and processors that replicas
share. Where none of a node's replicas is there, its proxy keeps requests until one is.
"""

import collections
import dataclasses
import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int8

from serve.engine import policy

ANSWERED, REFUSED, LOST = range(3)
"""What becomes of a request; lost: its replica ended, or nothing was left to answer it."""
_WAKE, _END, _LEAVE, _RETURN = range(4)  # kinds of events
Kind = Literal["none", "lost", "away", "both"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """What a replica's steps take: one route of a bundle."""

    stage_ms: Mapping[int, Sequence[float]]
    """By bucket, milliseconds of every stage."""
    leave: Sequence[float]
    """By stage, the share of those that enter it that leave; 1 for the last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Replicas, and the way to them."""

    replicas: int
    per_node: int = 8
    """Replicas of a node, which share a proxy."""
    any_node: bool = False
    """Whether a proxy chooses among all replicas, as with RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING=0."""
    capacity: int = 256
    """Requests in a replica; more are refused."""
    proxy_ms: float = 0.0
    """What a proxy takes for a request: it takes one after another."""
    app_ms: float = 0.0
    """What a replica takes for a request besides steps: it takes one after another."""
    network_ms: float = 0.0
    """From a proxy to a replica, and back again."""
    max_wait_ms: float = 2.0

    @property
    def nodes(self) -> list[list[int]]:
        """The replicas of each node; numbers differ by one at most."""
        count = math.ceil(self.replicas / self.per_node)
        return [part.tolist() for part in np.array_split(np.arange(self.replicas), count)]


class Incident(NamedTuple):
    """What happens to replicas."""

    kind: Kind = "none"
    """``lost``: the first one, for so long. ``away``: all, one after another. ``both``: all at once take ``slower``
    times as long for a step, while they compile a second bundle."""
    at: float = 0.0
    seconds: float = 0.0
    slower: float = 1.0


class Outcomes(NamedTuple):
    """What became of requests."""

    done: Float64[np.ndarray, " n"]
    """When its client had the answer; NaN without one."""
    status: Int8[np.ndarray, " n"]


class _Replica:
    """One engine: requests on their way to it, and queues by stage."""

    __slots__ = ("alive", "coming", "held", "life", "queues", "read", "running")

    def __init__(self, stages: int) -> None:
        self.queues: list[collections.deque[tuple[float, int]]] = [collections.deque() for _ in range(stages)]
        self.coming: collections.deque[tuple[float, int]] = collections.deque()  # by when they have been read
        self.read, self.held = 0.0, 0  # when the last one has been read; requests here
        self.alive, self.running, self.life = True, False, 0


class Simulation:
    """A cluster under one stream of requests.

    Args:
        cluster: The cluster.
        steps: What steps take.
        stages: Where each request leaves.
        incident: What happens meanwhile.
        seed: Of the choices.
    """

    def __init__(
        self,
        cluster: Cluster,
        steps: Steps,
        stages: Int[np.ndarray, " n"],
        incident: Incident = Incident(),  # noqa: B008 (a tuple)
        *,
        seed: int = 0,
    ) -> None:
        """Start empty."""
        self.cluster, self._incident = cluster, incident
        self._stages: list[int] = stages.tolist()
        self._random = np.random.default_rng(seed)
        self._ms = {bucket: [ms / 1e3 for ms in all_ms] for bucket, all_ms in steps.stage_ms.items()}
        self._largest, self._max_wait = max(self._ms), max(cluster.max_wait_ms / 1e3, 1e-6)
        self._choices = [
            [policy.choose_bucket(steps.stage_ms, steps.leave, stage, rows) for rows in range(1, self._largest + 1)]
            for stage in range(len(steps.leave))
        ]
        self._replicas = [_Replica(len(steps.leave)) for _ in range(cluster.replicas)]
        self._nodes, self._all = cluster.nodes, range(cluster.replicas)
        self._events: list[tuple[float, int, int, int, int, int, list[tuple[float, int]]]] = []
        self._count = 0  # of events, so that no two compare further
        self._waiting: list[int] = []  # requests, while there is no replica
        self._begins = incident.at + self._random.random(cluster.replicas)  # replicas look once a second
        self._done: Float64[np.ndarray, " n"] = np.full(len(stages), np.nan)
        self._status: Int8[np.ndarray, " n"] = np.full(len(stages), LOST, np.int8)

    def run(self, arrivals: Float64[np.ndarray, " n"]) -> Outcomes:
        """Serve requests that come at these times."""
        for number, (away, back) in self._absences():
            self._plan(away, number, _LEAVE)
            self._plan(back, number, _RETURN)
        for now, request, node, draws in self._dispatched(arrivals):
            while self._events and self._events[0][0] <= now:
                self._handle()
            self._dispatch(now, request, node, draws)
        while self._events:
            self._handle()
        return Outcomes(self._done, self._status)

    def _absences(self) -> Iterator[tuple[int, tuple[float, float]]]:
        kind, at, seconds, _ = self._incident
        for number in range({"lost": 1, "away": self.cluster.replicas}.get(kind, 0)):
            yield number, (at + number * seconds, at + (number + 1) * seconds)

    def _dispatched(self, arrivals: Float64[np.ndarray, " n"]) -> Iterator[tuple[float, int, int, tuple[float, float]]]:
        """Yield requests as proxies pass them on: when, which, from which node, and two random numbers.

        The end of request i of a proxy is the latest, over all j up to i, of arrival j plus i - j + 1 services.
        """
        nodes, service = len(self._nodes), self.cluster.proxy_ms / 1e3
        passed = arrivals.copy()
        for node in range(nodes):
            mine = arrivals[node::nodes]
            turn = np.arange(len(mine)) * service
            passed[node::nodes] = np.maximum.accumulate(mine - turn) + turn + service
        order, draws = np.argsort(passed, kind="stable"), self._random.random((len(arrivals), 2))
        columns = (passed[order], order, order % nodes, draws)
        for now, request, node, pair in zip(*(column.tolist() for column in columns), strict=True):
            yield now, request, node, (pair[0], pair[1])

    def _dispatch(self, now: float, request: int, node: int, draws: tuple[float, float]) -> None:
        there = self._all if self.cluster.any_node else self._nodes[node]
        if self._incident.kind in {"lost", "away"}:
            there = [n for n in there if self._replicas[n].alive] or [
                n for n, replica in enumerate(self._replicas) if replica.alive
            ]
            if not there:
                self._waiting.append(request)
                return
        one = int(draws[0] * len(there))
        other = (one + 1 + int(draws[1] * (len(there) - 1))) % len(there)
        self._give(now, request, min(there[one], there[other], key=lambda number: self._replicas[number].held))

    def _give(self, now: float, request: int, number: int) -> None:
        replica = self._replicas[number]
        if replica.held >= self.cluster.capacity:
            self._status[request] = REFUSED
            return
        replica.held += 1
        replica.read = max(replica.read, now + self.cluster.network_ms / 2e3) + self.cluster.app_ms / 1e3
        replica.coming.append((replica.read, request))
        if not replica.running and len(replica.coming) == 1:
            self._plan(replica.read, number, _WAKE)

    def _plan(self, at: float, number: int, kind: int, stage: int = 0, jobs: Sequence[tuple[float, int]] = ()) -> None:
        self._count += 1
        life = self._replicas[number].life
        heapq.heappush(self._events, (at, self._count, number, life, kind, stage, list(jobs)))

    def _handle(self) -> None:
        now, _, number, life, kind, stage, jobs = heapq.heappop(self._events)
        replica = self._replicas[number]
        if kind == _LEAVE:
            self._end_life(replica, finishes=self._incident.kind == "away")
        elif kind == _RETURN:
            replica.alive = True
            waiting, self._waiting = self._waiting, []
            for request in waiting:
                self._give(now, request, number)
        elif life == replica.life:
            if kind == _END:
                self._finish(replica, now, stage, jobs)
            self._step(replica, now, number)

    def _end_life(self, replica: _Replica, *, finishes: bool) -> None:
        """Have no further requests sent to it; unless it ``finishes`` what it has, they stay lost."""
        replica.alive = False
        if not finishes:
            replica.life, replica.running, replica.held, replica.read = replica.life + 1, False, 0, 0.0
            for queue in (replica.coming, *replica.queues):
                queue.clear()

    def _finish(self, replica: _Replica, now: float, stage: int, jobs: list[tuple[float, int]]) -> None:
        replica.running = False
        for job in jobs:
            request = job[1]
            if self._stages[request] > stage:
                replica.queues[stage + 1].append(job)
            else:
                replica.held -= 1
                self._done[request], self._status[request] = now + self.cluster.network_ms / 2e3, ANSWERED

    def _step(self, replica: _Replica, now: float, number: int) -> None:
        """Begin the best step; if nothing waits, wake when the next request has been read."""
        if replica.running:
            return
        while replica.coming and replica.coming[0][0] <= now:
            replica.queues[0].append(replica.coming.popleft())
        best, chosen = -math.inf, -1
        for stage, queue in enumerate(replica.queues):
            if queue:
                gain = self._choices[stage][min(len(queue), self._largest) - 1].gain
                score = gain * (1 + (now - queue[0][0]) / self._max_wait)
                if score >= best:  # of equals, the deeper one
                    best, chosen = score, stage
        if chosen < 0:
            if replica.coming:
                self._plan(replica.coming[0][0], number, _WAKE)
            return
        queue = replica.queues[chosen]
        bucket = self._choices[chosen][min(len(queue), self._largest) - 1].bucket
        jobs = [queue.popleft() for _ in range(min(bucket, len(queue)))]
        replica.running = True
        self._plan(now + self._ms[bucket][chosen] * self._slowness(now, number), number, _END, chosen, jobs)

    def _slowness(self, now: float, number: int) -> float:
        kind, _, seconds, slower = self._incident
        begins = self._begins[number]
        return slower if kind == "both" and begins <= now < begins + seconds else 1.0


def simulate(
    cluster: Cluster,
    steps: Steps,
    arrivals: Float64[np.ndarray, " n"],
    incident: Incident = Incident(),  # noqa: B008 (a tuple)
    *,
    seed: int = 0,
) -> Outcomes:
    """Serve requests that come at these times, and leave as often at each stage as ``steps`` says."""
    share = np.cumsum(np.array(steps.leave) * np.cumprod([1.0, *(1 - np.array(steps.leave[:-1]))]))
    drawn = np.random.default_rng([seed, 1]).random(len(arrivals))
    stages = np.minimum(np.searchsorted(share, drawn, side="right"), len(share) - 1)
    return Simulation(cluster, steps, stages, incident, seed=seed).run(arrivals)
