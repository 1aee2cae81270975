"""From the first open socket to the last answer.

1. Ports are taken, so that one which is not free is reported before the bundle is loaded.
2. Sockets open: live returns 200, ready 503, and inference 503.
3. A thread loads one bundle after another: it compiles and warms up programs, those of the smallest batches first,
   and starts an engine. Ready turns 200, and threads go on with larger batches.
4. SIGTERM or SIGINT: ready turns 503 first, while requests are still answered, so that balancers look elsewhere.
5. After ``--grace``, sockets close, requests in flight are finished and the engine stops, all within ``--drain``.
   Bodies that are not here by then get 503. A second signal ends the process at once.

On SIGHUP, bundles whose folders have changed are loaded again, see ``protocol.repository``.

If gRPC's server ends by itself, another one takes its place. Health and metrics have a port and a thread of their own
besides, from the second step until the process ends.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import grpc
import grpc.aio

from gati_jax import InputError

from .metrics import Metrics
from .protocol.connections import HttpServer
from .protocol.grpc import create_server
from .protocol.http import create_app
from .protocol.repository import Repository
from .protocol.service import Service
from .settings import Settings
from .threads import in_thread

_log = logging.getLogger("serve")
_REFUSING = 0.2  # seconds between the last admitted request and the closing of the sockets
_SWITCH = 1e-4
"""Seconds after which a thread that waits for the interpreter gets it. With Python's 5 ms, an event loop that is busy
with refusals keeps the engine waiting."""
_LOOK = 0.2  # seconds until it is seen that gRPC's server has ended by itself
_ENDING = 1.0  # seconds for an idle thread to end
_CLOSING = 5.0  # seconds, after that, for what is saved at the end: a disk may hang
_OTHER_FILES = 512  # open files beside connections: the bundle's, threads'

try:  # half the time of asyncio's own event loop
    from uvloop import new_event_loop
except ImportError:  # there is none for Windows
    from asyncio import new_event_loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The service behind the sockets."""

    service: Service
    metrics: Metrics


class Ports(NamedTuple):
    """Sockets that are bound and do not listen; gRPC, which opens its own, takes the place of its one."""

    http: socket.socket
    grpc: socket.socket | None
    admin: socket.socket


def run(settings: Settings, build: Callable[[], Parts]) -> int:
    """Load the service by ``build``, and serve it until a signal comes; return the exit code.

    Raises:
        InputError: A port is not available, or ``build`` raises it.
    """
    ports = _take_ports(settings)
    parts = build()
    sys.setswitchinterval(_SWITCH)
    _allow_descriptors(parts.service.door.limits.connections)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_serve(settings, parts, ports))


async def _serve(settings: Settings, parts: Parts, ports: Ports) -> int:
    stop = _on_signals(parts.service.models)
    limits, tls = parts.service.door.limits, _tls_files(settings)

    def listen(listener: socket.socket) -> HttpServer:
        app = create_app(
            parts.service,
            parts.metrics,
            token=settings.token,
            operator=settings.repository_token,
            admin=listener is ports.admin,
            with_page=not settings.no_page,
        )
        refused = parts.metrics.refused
        return HttpServer(
            app, listener, limits, drain=settings.drain, tls=tls, refused=refused, refuse=app.refuse
        )  # fmt: skip

    http, admin = listen(ports.http), listen(ports.admin)
    rpc = _Rpc(settings, parts)
    grpc_port = await rpc.start(ports)
    serving = asyncio.create_task(http.serve())
    servers = {
        serving,
        in_thread(lambda: asyncio.run(admin.serve()), "admin"),
        asyncio.create_task(rpc.keep_serving()),
    }
    _announce(settings, ports, grpc_port)
    stopping = asyncio.create_task(stop.wait())
    models = parts.service.models
    warming = asyncio.create_task(models.begin())
    await asyncio.wait({warming, stopping, *servers}, return_when=asyncio.FIRST_COMPLETED)
    _check(servers)
    if not warming.done():
        _leave(0, "stopped before it was ready")
    warming.result()
    _report(models)
    await asyncio.wait({stopping, *servers}, return_when=asyncio.FIRST_COMPLETED)
    _check(servers)
    parts.service.drain()
    _log.info("stopping", extra={"grace": settings.grace, "drain": settings.drain})
    await asyncio.sleep(settings.grace)
    parts.service.close()
    await asyncio.sleep(_REFUSING)
    until = time.monotonic() + settings.drain
    http.should_exit = True
    await asyncio.gather(serving, rpc.stop(settings.drain))
    left = max(_ENDING, until - time.monotonic())
    stopped = models.stop(left)
    if stopped:
        await asyncio.wait(stopped, timeout=left + _CLOSING)
    if not all(one.done() and one.result() for one in stopped):
        _leave(1, "stopped before all admitted requests were answered")
    if models.busy:
        _leave(0, "stopped while programs were being compiled")
    _log.info("stopped")
    return 0


class _Rpc:
    """gRPC's server, or the one that has taken its place: a call whose path is no UTF-8 ends the library's."""

    def __init__(self, settings: Settings, parts: Parts) -> None:
        self._settings, self._parts = settings, parts
        self._server: grpc.aio.Server | None = None

    async def start(self, ports: Ports | None = None) -> int:
        """Start a server on the same port as before; returns the port."""
        self._server = create_server(
            self._parts.service,
            self._parts.metrics,
            token=self._settings.token,
            operator=self._settings.repository_token,
        )
        port = _bind(self._server, self._settings, ports)
        self._settings = self._settings.model_copy(update={"grpc_port": port})
        await self._server.start()
        return port

    async def keep_serving(self) -> None:
        """Start another server whenever one has ended by itself; returns when it is stopped."""
        serving = True
        while self._server is not None and serving:
            try:
                serving = await self._server.wait_for_termination(_LOOK)  # raises at once, and not when all is closed
            except Exception as error:  # noqa: BLE001 (whatever ends the library's server)
                _log.warning("gRPC's server has ended, another one begins: %.200r", error)
                await self.start()

    async def stop(self, grace: float) -> None:
        """Finish the calls in flight, as far as the time allows."""
        if self._server is not None:
            await self._server.stop(grace)


def _report(models: Repository) -> None:
    """Log which models answer."""
    for entry in models.entries.values():
        if entry.loaded is not None:
            _log.info("ready", extra={"model": entry.name, "version": entry.loaded.model.version})


def _check(servers: Iterable[asyncio.Future[None]]) -> None:
    """Raise why a server has ended: nothing but the end of the process ends one."""
    for server in servers:
        if server.done():
            server.result()


def _on_signals(models: Repository) -> asyncio.Event:
    """Return an event that the first signal sets; the second one ends the process. SIGHUP loads what has changed."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    refreshing: set[asyncio.Task[None]] = set()

    def on_hangup() -> None:
        _log.info("folders are looked at")
        refreshing.add(task := loop.create_task(models.refresh()))
        task.add_done_callback(refreshing.discard)

    if hasattr(signal, "SIGHUP"):  # Windows has none
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(signal.SIGHUP, on_hangup)

    def on_signal() -> None:
        if stop.is_set():
            _leave(1, "stopped at once by a second signal")
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, on_signal)
        except NotImplementedError:  # asyncio on Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(on_signal))
    return stop


def _leave(code: int, message: str) -> None:
    """End the process without waiting for threads, which may be compiling or hang in a step."""
    _log.warning(message)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def _take_ports(settings: Settings) -> Ports:
    def take(name: str) -> socket.socket:
        port = getattr(settings, f"{name}_port")
        taken = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
        try:
            if os.name == "posix":  # elsewhere two servers could share a port by it
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind((settings.host, port))
        except (OSError, UnicodeError) as error:
            taken.close()
            raise InputError(f"--{name}-port: cannot listen at {settings.host} port {port}: {error}") from None
        return taken

    return Ports(take("http"), take("grpc") if settings.grpc_port else None, take("admin"))


def _bind(server: grpc.aio.Server, settings: Settings, ports: Ports | None) -> int:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    if ports is not None and ports.grpc is not None:
        ports.grpc.close()
    try:
        if settings.tls_cert is None or settings.tls_key is None:
            return server.add_insecure_port(address)
        pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
        return server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError:
        raise InputError(f"--grpc-port: cannot listen at {address}") from None


def _tls_files(settings: Settings) -> tuple[Path, Path] | None:
    return None if settings.tls_cert is None or settings.tls_key is None else (settings.tls_cert, settings.tls_key)


def _allow_descriptors(connections: int) -> None:
    """Raise the process's limit of open files, where that is needed and allowed."""
    try:
        import resource  # noqa: PLC0415 (there is none for Windows)
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * connections + _OTHER_FILES  # HTTP, gRPC, the admin port
    if soft == resource.RLIM_INFINITY:
        return
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    else:
        _log.warning("only %d files may be open, too few for --connections %d", hard, connections)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _announce(settings: Settings, ports: Ports, grpc_port: int) -> None:
    scheme = "http" if settings.tls_cert is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    http, admin = (f"{scheme}://{host}:{port.getsockname()[1]}" for port in (ports.http, ports.admin))
    where = {"http": http, "grpc": f"{host}:{grpc_port}", "admin": admin}
    _log.info("listening", extra=where)
    if settings.json_output:
        sys.stdout.write(json.dumps(where) + "\n")
        sys.stdout.flush()
    if not settings.loopback and (settings.token is None or settings.tls_cert is None):
        _log.warning("other machines can reach this server: set GATI_TOKEN and --tls-cert to restrict access")
