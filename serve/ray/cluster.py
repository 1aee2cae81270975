"""The application on a Ray cluster that is joined or started."""

import contextlib
import logging
import os
import socket
import time
from types import TracebackType
from typing import Any, Self

from gati_jax import InputError

from .options import Parsed, RayOptions

try:
    import ray
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise InputError("serve.ray: expected Ray to be installed, see: pip install 'gati-jax[serve,ray]'") from error

from ray.exceptions import RayError, RayTaskError

from .controller import Controller
from .replica import Directory, Replica

APPLICATION = "gati"
_log = logging.getLogger("serve.ray.cluster")
_HEALTH = 2.0  # seconds between two checks of a replica
_SLOW = 10.0  # seconds for its answer
_REACHED = 5.0
_LOOK = 0.1  # seconds between two looks at whether replicas have ended
_SAVED = 10.0  # seconds for the controller to save its state


class Cluster:
    """Replicas behind one address.

    Args:
        parsed: How many, and of what.

    Raises:
        InputError: There is no cluster at the address.
    """

    def __init__(self, parsed: Parsed) -> None:
        """Join the cluster, or start one."""
        self._parsed = parsed
        _join(parsed.ray.address or "local")
        server = parsed.server
        options = HTTPOptions(host=server.host, port=server.http_port, request_timeout_s=server.timeout)
        ray_serve.start(proxy_location="EveryNode", http_options=options)
        self._directory: Any = ray.remote(num_cpus=0)(Directory).remote()
        self._controller: Any = None
        if server.adapt:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # its folder is
            always: Any = ray.remote(num_cpus=0, max_restarts=-1)(Controller)
            self._controller = always.options(scheduling_strategy=here).remote(
                server, parsed.ray.most * server.places, self._directory
            )

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the replicas once they have answered, and leave the cluster."""
        self._drain()
        ray_serve.shutdown()
        if self._controller is not None:
            with contextlib.suppress(RayError):
                ray.get(self._controller.stop.remote(), timeout=_SAVED)
        ray.shutdown()

    def deploy(self) -> None:
        """Start the replicas; returns once they answer.

        Raises:
            InputError: The bundle cannot adapt, or not in this folder.
        """
        if self._controller is not None:
            try:
                ray.get(self._controller.begin.remote())
            except RayTaskError as error:
                raise InputError(str(error.cause)) from error
        made: Any = ray_serve.deployment(ray_serve.ingress()(Replica))
        deployment = made.options(
            name="replica",
            user_config={},  # so that Serve calls ``reconfigure``
            max_ongoing_requests=2 * self._parsed.server.capacity,  # the door of each refuses before Serve queues
            health_check_period_s=_HEALTH,
            health_check_timeout_s=_SLOW,
            graceful_shutdown_timeout_s=self._parsed.server.drain,
            ray_actor_options={"num_cpus": self._parsed.ray.cpus, "num_gpus": self._parsed.ray.gpus},
            **_how_many(self._parsed.ray),
        )
        application = deployment.bind(self._parsed.server, self._directory, self._controller)
        ray_serve.run(application, name=APPLICATION, route_prefix="/")

    def _drain(self) -> None:
        """Have replicas finish what they have, while proxies are there to pass it on; ``shutdown`` ends these first."""
        ray_serve.delete(APPLICATION, _blocking=False)
        until = time.monotonic() + self._parsed.server.drain + _SLOW
        while APPLICATION in ray_serve.status().applications and time.monotonic() < until:
            time.sleep(_LOOK)

    def swap(self) -> None:
        """Have every replica load what has changed. A new deployment would end replicas before others are ready."""
        if self._controller is not None:
            _log.warning("a bundle that adapts is not replaced: replicas and controller would have different ones")
            return
        ray.get(self._directory.swap.remote())


def _how_many(options: RayOptions) -> dict[str, Any]:
    if options.max_replicas is None:
        return {"num_replicas": options.replicas}
    scaling = {"min_replicas": options.replicas, "max_replicas": options.max_replicas}
    return {"autoscaling_config": scaling | {"target_ongoing_requests": options.target_requests}}


def _join(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports of its use to others
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "//" not in host:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=_REACHED).close()
        ray.init(address=address, include_dashboard=False, logging_level=logging.WARNING)
    except (OSError, OverflowError, ValueError) as error:
        raise InputError(f"--address: expected that of a Ray cluster, got {address}: {error}") from error
