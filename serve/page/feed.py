"""One computation of what the page shows of a model, for all who look at it."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from ..engine.records import OverloadedError

PERIOD = 1.0  # seconds between two snapshots
VIEWERS = 16  # at once
_log = logging.getLogger("serve.page")


class Viewer:
    """An iterator over what a feed produces.

    It keeps the newest item alone. A viewer that reads slowly misses items, and costs nothing; one that reads nothing
    at all is disconnected by ``protocol.http_connection``, as any client that does not take its answer.
    """

    def __init__(self, feed: "Feed") -> None:
        """Begin without an item."""
        self._feed, self._newest, self._changed, self._ended = feed, b"", asyncio.Event(), False

    def offer(self, item: bytes) -> None:
        """Take an item, in place of one that has not been read."""
        self._newest = item
        self._changed.set()

    def end(self) -> None:
        """Have the iteration end after the last item."""
        self._ended = True
        self._changed.set()

    def leave(self) -> None:
        """Get no further items, and free the place."""
        self._feed.leave(self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Return items as they come."""
        while self._newest or not self._ended:
            await self._changed.wait()
            self._changed.clear()
            item, self._newest = self._newest, b""
            if item:
                yield item


class Feed:
    """Computes an item every second while it has viewers; for the event loop's thread only.

    Args:
        compute: Returns the item; called in a thread, so that no request waits for it.
        closing: Set when the server stops: all viewers get a last item, and end.
        period: Seconds.
    """

    def __init__(self, compute: Callable[[], bytes], closing: asyncio.Event, *, period: float = PERIOD) -> None:
        """Compute nothing until a viewer joins."""
        self._compute, self._closing, self._period = compute, closing, period
        self._viewers: set[Viewer] = set()
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Return the number of viewers."""
        return len(self._viewers)

    def join(self) -> Viewer:
        """Return a new viewer, which must ``leave``."""
        viewer = Viewer(self)
        self._viewers.add(viewer)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return viewer

    def leave(self, viewer: Viewer) -> None:
        """Forget a viewer; after the last one, the computation ends."""
        self._viewers.discard(viewer)
        if not self._viewers and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        try:
            closed = False
            while not closed:
                closed = self._closing.is_set()
                item = await asyncio.to_thread(self._compute)
                for viewer in self._viewers:
                    viewer.offer(item)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0 if closed else self._period):
                        await self._closing.wait()
        except Exception:  # noqa: BLE001 (the server goes on)
            _log.exception("the page's snapshot failed")
        for viewer in self._viewers:
            viewer.end()
        self._task = None


class Feeds:
    """The feeds of a server's models, whose viewers are bounded together.

    Args:
        make: Returns the feed of a model, by its name.
        most: Viewers at once.
    """

    def __init__(self, make: Callable[[str], Feed], *, most: int = VIEWERS) -> None:
        """Begin without feeds."""
        self._make, self._most, self._feeds = make, most, dict[str, Feed]()

    def join(self, name: str) -> Viewer:
        """Return a new viewer of a model, which must ``leave``.

        Raises:
            OverloadedError: There are too many.
        """
        if sum(map(len, self._feeds.values())) >= self._most:
            raise OverloadedError(f"page: expected at most {self._most} viewers at once, got one more", PERIOD)
        if name not in self._feeds:
            self._feeds[name] = self._make(name)
        return self._feeds[name].join()
