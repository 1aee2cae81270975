"""What takes long, in a thread of its own."""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_thread(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run something in a daemon thread, for which the process does not wait when it exits."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def body() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 (raised where it is awaited)
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # the waiting was cancelled
                done.set_exception(error)
        else:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                done.set_result(result)

    threading.Thread(target=body, name=name, daemon=True).start()
    return asyncio.wrap_future(done)
