"""A server with the fake engine, for tests of the process; lines of its standard input release what waits."""

import logging
import os
import sys
import threading
import time

from serve import lifecycle, logs
from serve.__main__ import run
from serve.protocol.admission import limits_of
from serve.protocol.backend import Backend
from serve.settings import parse
from tests.serve import fake

BLOCKS = 77  # the value of a pixel
released = {"warm": threading.Event(), "answer": threading.Event()}


def listen():
    for line in sys.stdin:
        released[line.strip()].set()


class Slow(fake.FakeEngine):
    """Answers when it is released."""

    def submit(self, images, **how):
        if images.max() == BLOCKS:  # in the event loop
            logging.getLogger("serve").info("blocked")
            time.sleep(60)
        return super().submit(images, **how)

    def _run(self, jobs, route):
        logging.getLogger("serve").info("submitted")
        released["answer"].wait()
        super()._run(jobs, route)

    def stop(self, timeout: float | None = None) -> bool:
        finished = released["answer"].wait(timeout)
        return finished and super().stop()


def main():
    ports = [word for name in ("http", "grpc", "admin") for word in (f"--{name}-port", "0")]
    settings = parse(["--bundle", "none", "--json", *ports, *sys.argv[1:]], os.environ)
    logs.configure(settings.log_level, access=settings.access_log)
    engine = Slow()
    threading.Thread(target=listen, daemon=True).start()

    def start():
        released["warm"].wait()
        return Backend(engine, fake.choose_route)

    front = fake.Front(ready=False, limits=limits_of(settings), start=start)
    parts = lifecycle.Parts(service=front.service, metrics=front.metrics)
    sys.exit(lifecycle.run(settings, lambda: parts))


if __name__ == "__main__":
    run(main)
