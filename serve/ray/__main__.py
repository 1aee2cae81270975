"""``python -m serve.ray``: deploy replicas, and keep them until a signal comes.

SIGHUP has every replica load the bundles whose folders have changed: each goes on with the old one until the new one
answers. SIGTERM and SIGINT end all of them, once they have answered what they have admitted.
"""

import logging
import os
import queue
import signal

from gati_jax import InputError

from .. import logs
from ..__main__ import run
from .options import parse

_log = logging.getLogger("serve.ray")


def main() -> None:
    """Serve."""
    parsed = parse(None, os.environ)
    logs.configure(parsed.server.log_level, access=False)
    for folder in parsed.server.bundles.values():
        if not (folder / "manifest.json").is_file():
            raise InputError(f"--bundle: expected the folder of a bundle, got {folder}")
    come: queue.SimpleQueue[int] = queue.SimpleQueue()
    # Ray reads it when it is imported, and its processes inherit it; a cluster that runs already has its own.
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", f"{__package__}.proxy.middlewares")
    from .cluster import Cluster  # noqa: PLC0415 (neither --help nor bad options need Ray)

    with Cluster(parsed) as cluster:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):  # Ray has its own until now
            signal.signal(number, lambda number, _: come.put(number))
        cluster.deploy()
        _log.info("listening", extra={"http": f"http://{parsed.server.host}:{parsed.server.http_port}"})
        while come.get() == signal.SIGHUP:
            _log.info("folders are looked at")
            cluster.swap()
        _log.info("stopping")


if __name__ == "__main__":
    run(main)
