"""From the first open socket to the last answer.

1. Sockets open: live answers 200, ready 503, and whoever asks for an inference gets 503.
2. A thread compiles and warms up every program, and starts the engine. Ready turns 200.
3. SIGTERM or SIGINT: ready turns 503 first, while requests are still answered, so that balancers look elsewhere.
4. After the grace, sockets close; requests in flight are finished, then the engine stops; all of it within the drain
   time. A second signal ends the process at once.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import NamedTuple, TypeVar

import grpc
import grpc.aio
import uvicorn
import uvloop
from starlette.types import ASGIApp

from gati_jax import InputError
from serve.protocol.grpc import create_server
from serve.protocol.http import create_app
from serve.protocol.service import Backend, Service

from .metrics import Metrics
from .settings import Settings

_log = logging.getLogger("serve")
_REFUSING = 0.2  # seconds between the last request that is admitted and the sockets' closing
_ENDING = 1.0  # seconds that a thread with nothing to do is given to end
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What is behind the sockets."""

    service: Service
    metrics: Metrics
    start: Callable[[], Backend]
    """Warm up and start what answers: minutes, in a thread of its own."""


def run(settings: Settings, parts: Parts) -> int:
    """Serve until a signal comes; return the exit code.

    Raises:
        InputError: A port cannot be had.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, parts))


class _HttpServer(uvicorn.Server):
    """uvicorn, which would take the signals to itself and close its sockets at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave them to us."""
        yield


async def _serve(settings: Settings, parts: Parts) -> int:
    told = _on_signals()
    listener = _listen(settings, settings.http_port, "--http-port")
    app = create_app(parts.service, parts.metrics, limit=settings.max_body, token=settings.token)
    http = _HttpServer(_http_config(settings, app))
    rpc = create_server(parts.service, parts.metrics, limit=settings.max_body, token=settings.token)
    grpc_port = _bind(rpc, settings)
    await rpc.start()
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    _announce(settings, listener.getsockname()[1], grpc_port)
    stopping = asyncio.create_task(told.wait())
    warming = _in_thread(parts.start)
    await asyncio.wait({warming, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()  # whatever kept it from starting
    if not warming.done():
        _leave(0, "stopped before it was ready")
    backend = warming.result()
    parts.service.warmed_up(backend)
    _log.info("ready", extra={"model": parts.service.model.name, "version": parts.service.model.version})
    await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
    return await _drain(settings, parts.service, backend, _Sockets(http, rpc, serving))


class _Sockets(NamedTuple):
    http: _HttpServer
    rpc: grpc.aio.Server
    serving: asyncio.Task[None]  # http's


async def _drain(settings: Settings, service: Service, backend: Backend, sockets: _Sockets) -> int:
    service.drain()
    _log.info("stopping", extra={"grace": settings.grace, "drain": settings.drain})
    await asyncio.sleep(settings.grace)
    service.close()
    await asyncio.sleep(_REFUSING)
    until = time.monotonic() + settings.drain
    sockets.http.should_exit = True
    hanging_up = asyncio.create_task(_hang_up(sockets.http))
    await asyncio.gather(sockets.serving, sockets.rpc.stop(settings.drain))
    hanging_up.cancel()
    finished = await asyncio.to_thread(backend.engine.stop, max(_ENDING, until - time.monotonic()))
    if not finished:
        _leave(1, "stopped before all that was admitted was answered")
    _log.info("stopped")
    return 0


async def _hang_up(http: _HttpServer) -> None:
    """Cut connections without a request on them: over TLS, closing them waits for the client's goodbye."""
    while True:
        await asyncio.sleep(_REFUSING)
        for connection in list(http.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is None or cycle.response_complete:
                connection.transport.abort()


def _on_signals() -> asyncio.Event:
    """Return what the first signal sets; the second one ends the process."""
    told, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        if told.is_set():
            _leave(1, "stopped at once by a second signal")
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return told


def _leave(code: int, message: str) -> None:
    """End the process without waiting for threads: one of them may compile, or be lost in a step."""
    _log.warning(message)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def _in_thread(work: Callable[[], T]) -> "asyncio.Future[T]":
    """Run something that no exit has to wait for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def body() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 (raised where it is awaited)
            tell = functools.partial(done.set_exception, error)
        else:
            tell = functools.partial(done.set_result, result)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell)

    threading.Thread(target=body, name="warm-up", daemon=True).start()
    return done


def _listen(settings: Settings, port: int, option: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{option}: cannot listen at {settings.host} port {port}: {error}") from None


def _bind(server: grpc.aio.Server, settings: Settings) -> int:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    if settings.grpc_port:
        _listen(settings, settings.grpc_port, "--grpc-port").close()  # grpc would write pages about a taken port
    try:
        if settings.tls_cert is None or settings.tls_key is None:
            return server.add_insecure_port(address)
        pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
        return server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError:
        raise InputError(f"--grpc-port: cannot listen at {address}") from None


def _http_config(settings: Settings, app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(settings.drain),
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )


def _announce(settings: Settings, http_port: int, grpc_port: int) -> None:
    scheme = "http" if settings.tls_cert is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    where = {"http": f"{scheme}://{host}:{http_port}", "grpc": f"{host}:{grpc_port}"}
    _log.info("listening", extra=where)
    if settings.json:
        sys.stdout.write(json.dumps(where) + "\n")
        sys.stdout.flush()
    if not settings.loopback and (settings.token is None or settings.tls_cert is None):
        _log.warning("others can reach this server: GATI_TOKEN and --tls-cert would keep it to those who may")
