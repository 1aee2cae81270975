"""A server with the fake engine, for tests of the process; lines of its standard input release what waits."""

import logging
import os
import sys
import threading

from serve import lifecycle, logs
from serve.__main__ import run
from serve.protocol.service import Backend
from serve.settings import parse
from tests.serve import fake

released = {"warm": threading.Event(), "answer": threading.Event()}


def listen():
    for line in sys.stdin:
        released[line.strip()].set()


class Slow(fake.FakeEngine):
    """Answers when it is released."""

    def _run(self, jobs, route):
        logging.getLogger("serve").info("submitted")
        released["answer"].wait()
        super()._run(jobs, route)

    def stop(self, timeout: float | None = None) -> bool:
        finished = released["answer"].wait(timeout)
        return finished and super().stop()


def main():
    settings = parse(["--bundle", "none", "--json", "--http-port", "0", "--grpc-port", "0", *sys.argv[1:]], os.environ)
    logs.configure(settings.log_level, access=settings.access_log)
    front = fake.Front(ready=False)
    engine = Slow()
    threading.Thread(target=listen, daemon=True).start()

    def start():
        released["warm"].wait()
        return Backend(engine, fake.choose_route)

    sys.exit(lifecycle.run(settings, lifecycle.Parts(service=front.service, metrics=front.metrics, start=start)))


if __name__ == "__main__":
    run(main)
