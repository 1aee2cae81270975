"""From the first open socket to the last answer.

1. Sockets open: live returns 200, ready 503, and inference 503.
2. A thread compiles and warms up every program, and starts the engine. Ready turns 200.
3. SIGTERM or SIGINT: ready turns 503 first, while requests are still answered, so that balancers look elsewhere.
4. After ``--grace``, sockets close, requests in flight are finished and the engine stops, all within ``--drain``.
   A second signal ends the process at once.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
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

import grpc
import grpc.aio
import uvicorn

from gati_jax import InputError
from serve.protocol.grpc import create_server
from serve.protocol.http import create_app
from serve.protocol.service import Backend, Service

from .metrics import Metrics
from .settings import Settings

_log = logging.getLogger("serve")
_REFUSING = 0.2  # seconds between the last admitted request and the closing of the sockets
_ENDING = 1.0  # seconds for an idle thread to end

try:  # half the time of asyncio's own event loop
    from uvloop import new_event_loop
except ImportError:  # there is none for Windows
    from asyncio import new_event_loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The service behind the sockets."""

    service: Service
    metrics: Metrics
    start: Callable[[], Backend]
    """Compile, warm up and start the engine; takes minutes, so it runs in a thread of its own."""


def run(settings: Settings, parts: Parts) -> int:
    """Serve until a signal comes; return the exit code.

    Raises:
        InputError: A port is not available.
    """
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_serve(settings, parts))


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers, which would close the sockets at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals to ``_on_signals``."""
        yield


async def _serve(settings: Settings, parts: Parts) -> int:
    stop = _on_signals()
    listener = _listen(settings, settings.http_port, "--http-port")
    app = create_app(parts.service, parts.metrics, limit=settings.max_body, token=settings.token)
    http = _HttpServer(
        uvicorn.Config(
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
    )
    rpc = create_server(parts.service, parts.metrics, limit=settings.max_body, token=settings.token)
    grpc_port = _bind(rpc, settings)
    await rpc.start()
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    _announce(settings, listener.getsockname()[1], grpc_port)
    stopping = asyncio.create_task(stop.wait())
    warming = _in_thread(parts.start)
    await asyncio.wait({warming, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()  # raises why it did not start
    if not warming.done():
        _leave(0, "stopped before it was ready")
    backend = warming.result()
    parts.service.warmed_up(backend)
    _log.info("ready", extra={"model": parts.service.model.name, "version": parts.service.model.version})
    await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
    parts.service.drain()
    _log.info("stopping", extra={"grace": settings.grace, "drain": settings.drain})
    await asyncio.sleep(settings.grace)
    parts.service.close()
    await asyncio.sleep(_REFUSING)
    until = time.monotonic() + settings.drain
    http.should_exit = True
    hanging_up = asyncio.create_task(_hang_up(http))
    await asyncio.gather(serving, rpc.stop(settings.drain))
    hanging_up.cancel()
    finished = await asyncio.to_thread(backend.engine.stop, max(_ENDING, until - time.monotonic()))
    if not finished:
        _leave(1, "stopped before all admitted requests were answered")
    _log.info("stopped")
    return 0


async def _hang_up(http: _HttpServer) -> None:
    """Abort idle connections: over TLS, closing them would wait for the client."""
    while True:
        await asyncio.sleep(_REFUSING)
        for connection in list(http.server_state.connections):
            cycle = getattr(connection, "cycle", None)
            if cycle is None or cycle.response_complete:
                connection.transport.abort()


def _on_signals() -> asyncio.Event:
    """Return an event that the first signal sets; the second one ends the process."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

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


def _in_thread(work: Callable[[], Backend]) -> asyncio.Future[Backend]:
    """Run something in a daemon thread, for which the process does not wait when it exits."""
    done: concurrent.futures.Future[Backend] = concurrent.futures.Future()

    def body() -> None:
        try:
            done.set_result(work())
        except Exception as error:  # noqa: BLE001 (raised where it is awaited)
            done.set_exception(error)

    threading.Thread(target=body, name="warm-up", daemon=True).start()
    return asyncio.wrap_future(done)


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
        _listen(settings, settings.grpc_port, "--grpc-port").close()  # grpc would log pages about a taken port
    try:
        if settings.tls_cert is None or settings.tls_key is None:
            return server.add_insecure_port(address)
        pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
        return server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError:
        raise InputError(f"--grpc-port: cannot listen at {address}") from None


def _announce(settings: Settings, http_port: int, grpc_port: int) -> None:
    scheme = "http" if settings.tls_cert is None else "https"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    where = {"http": f"{scheme}://{host}:{http_port}", "grpc": f"{host}:{grpc_port}"}
    _log.info("listening", extra=where)
    if settings.json_output:
        sys.stdout.write(json.dumps(where) + "\n")
        sys.stdout.flush()
    if not settings.loopback and (settings.token is None or settings.tls_cert is None):
        _log.warning("other machines can reach this server: set GATI_TOKEN and --tls-cert to restrict access")
