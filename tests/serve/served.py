"""A server before the fake engine, for tests of the process; its standard input says when what is slow is done."""

import logging
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fake

from serve import lifecycle, logs
from serve.__main__ import run
from serve.protocol.service import Backend
from serve.settings import parse

heard = {"warm": threading.Event(), "answer": threading.Event()}


def listen():
    for line in sys.stdin:
        heard[line.strip()].set()


class Slow(fake.FakeEngine):
    """Answers when it is told to."""

    def _run(self, jobs, route):
        logging.getLogger("serve").info("submitted")
        heard["answer"].wait()
        super()._run(jobs, route)

    def stop(self, timeout: float | None = None) -> bool:
        finished = heard["answer"].wait(timeout)
        return finished and super().stop()


def main():
    settings = parse(["--bundle", "none", "--json", "--http-port", "0", "--grpc-port", "0", *sys.argv[1:]], os.environ)
    logs.configure("info")
    front = fake.Front(ready=False)
    engine = Slow()
    threading.Thread(target=listen, daemon=True).start()

    def start():
        heard["warm"].wait()
        return Backend(engine, fake.choose)

    sys.exit(lifecycle.run(settings, lifecycle.Parts(service=front.service, metrics=front.metrics, start=start)))


if __name__ == "__main__":
    run(main)
