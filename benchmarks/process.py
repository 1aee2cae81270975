"""A server in a process of its own, as a benchmark sees it: addresses, answers, memory, processor time and files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from gati_jax import InputError

from .sockets import message

MODEL = "gati"
DATATYPES = {"uint8": "UINT8", "float32": "FP32"}
LIVE, READY, METRICS = "/v2/health/live", "/v2/health/ready", "/metrics"
INFER = f"/v2/models/{MODEL}/infer"
_START, _STOP = 600.0, 60.0  # seconds for the warm-up, and to stop
_TICKS = os.sysconf("SC_CLK_TCK")


class Server(NamedTuple):
    """A running server; its ports are on loopback."""

    child: subprocess.Popen[str]
    http: int
    grpc: int
    admin: int
    folder: Path
    """Its folder for temporary files, empty at the start."""
    log: Path

    def get(self, path: str, *, admin: bool = False, timeout: float = 30.0) -> tuple[int, bytes]:
        """Return the status and the body of a page."""
        url = f"http://127.0.0.1:{self.admin if admin else self.http}{path}"
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def rss_mib(self) -> float:
        """Return the resident memory."""
        lines = Path(f"/proc/{self.child.pid}/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))

    def busy(self) -> float:
        """Return the seconds of processor time so far."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def descriptors(self) -> int:
        """Return the number of open files and sockets."""
        return sum(1 for _ in Path(f"/proc/{self.child.pid}/fd").iterdir())

    def last_words(self) -> str:
        """Return the last line of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1][:500] if lines else "no message"

    def stop(self) -> int:
        """Ask it to stop, and return its exit code."""
        self.child.send_signal(signal.SIGTERM)
        return self.child.wait(_STOP)


@contextlib.contextmanager
def serving(bundle: Path, *options: str, module: Sequence[str] = ("serve", "--bundle")) -> Generator[Server]:
    """Start a server, and wait until it is ready: until all of its batches are compiled.

    Args:
        bundle: What it serves.
        options: More of ``python -m serve``.
        module: The module to run, and words before the bundle.

    Raises:
        InputError: It ends before it is ready.
    """
    ports = [word for name in ("http", "grpc", "admin") for word in (f"--{name}-port", "0")]
    command = [sys.executable, "-m", *module, str(bundle), "--json", "--grace", "0", "--ready", "all", *ports, *options]
    with tempfile.TemporaryDirectory() as own, (Path(own) / "log").open("w", encoding="utf-8") as log:
        folder = Path(own) / "tmp"
        folder.mkdir()
        environment = os.environ | {"TMPDIR": str(folder)}
        child = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=log)  # noqa: S603
        try:
            assert child.stdout is not None  # noqa: S101 (narrows the type)
            line = child.stdout.readline()
            where = json.loads(line) if line else dict.fromkeys(("http", "grpc", "admin"), ":0")
            http, rpc, admin = (int(where[name].rpartition(":")[2]) for name in ("http", "grpc", "admin"))
            server = Server(child, http, rpc, admin, folder, Path(own) / "log")
            _await_ready(server)
            yield server
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
            _close(child.stdout)


def _await_ready(server: Server) -> None:
    until = time.monotonic() + _START
    while time.monotonic() < until:
        if server.child.poll() is not None:
            raise InputError(f"server: expected it to start, got: {server.last_words()}")
        with contextlib.suppress(OSError):
            if server.get(READY, admin=True)[0] == 200:  # noqa: PLR2004 (HTTP)
                return
        time.sleep(0.1)
    raise InputError(f"server: expected it to be ready within {_START:g} s, got: {server.last_words()}")


def _close(stream: IO[Any] | None) -> None:
    if stream is not None:
        stream.close()


@contextlib.contextmanager
def neighbours(count: int) -> Generator[None]:
    """Keep so many processors busy with other work."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in busy:
            one.kill()
            one.wait()


def inferences(
    images: np.ndarray, *, outputs: Sequence[str] = ("class_index", "exit"), keep: bool = True, **parameters: float
) -> list[bytes]:
    """Return a whole HTTP request for each image, with its tensor as bytes.

    Args:
        images: uint8 or float32[n, *input].
        outputs: What answers hold.
        keep: Whether the connection is kept.
        parameters: Of the requests.

    Raises:
        InputError: Images of a type that the protocol lacks.
    """
    if images.dtype.name not in DATATYPES:
        raise InputError(f"images: expected {' or '.join(DATATYPES)}, got {images.dtype}")
    tensor = {"name": "images", "shape": [1, *images.shape[1:]], "datatype": DATATYPES[images.dtype.name]}
    tensor |= {"parameters": {"binary_data_size": images[0].nbytes}}
    asked = {"inputs": [tensor], "outputs": [{"name": name} for name in outputs], "parameters": parameters}
    head = json.dumps(asked).encode()
    headers = f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {len(head)}\r\n"
    return [message(INFER, head + image.tobytes(), headers=headers, keep=keep) for image in images]
