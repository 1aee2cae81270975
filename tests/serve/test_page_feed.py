"""The feed of the page: what it computes, for whom, and how it ends."""

import asyncio

import pytest

from serve.engine.records import OverloadedError
from serve.page.feed import Feed, Feeds


def stepping(**options):
    """A feed whose computations are counted, and the event that ends it."""
    computed, closing = [], asyncio.Event()

    def compute():
        computed.append(1)
        return b"%d" % len(computed)

    return Feed(compute, closing, **options), computed, closing


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def test_nothing_is_computed_unless_somebody_looks_and_once_for_all_who_do():
    async def look():
        feed, computed, _ = stepping(period=0.01)
        await asyncio.sleep(0.05)
        assert not computed
        viewers = [feed.join(), feed.join()]
        seen = await asyncio.gather(*(anext(aiter(viewer)) for viewer in viewers))
        assert seen == [b"1", b"1"]
        for viewer in viewers:
            viewer.leave()
        await asyncio.sleep(0.02)
        before = len(computed)
        await asyncio.sleep(0.05)
        assert len(computed) == before
        again = feed.join()
        await until(lambda: len(computed) > before)
        again.leave()

    asyncio.run(look())


def test_viewers_are_bounded_and_places_come_back():
    async def look():
        feeds = Feeds(lambda _: stepping()[0], most=2)  # of all models together
        first, _ = feeds.join("one"), feeds.join("two")
        for name in ("one", "two", "three"):
            with pytest.raises(OverloadedError, match="page: expected at most 2 viewers at once, got one more"):
                feeds.join(name)
        first.leave()
        feeds.join("three")

    asyncio.run(look())


def test_one_who_reads_slowly_gets_the_newest_and_holds_nothing_up():
    async def look():
        feed, computed, _ = stepping(period=0.001)
        slow, quick = aiter(feed.join()), aiter(feed.join())
        await anext(slow)
        while len(computed) < 20:
            await anext(quick)
        assert int(await anext(slow)) >= 19  # those between are not kept

    asyncio.run(look())


def test_viewers_get_a_last_item_when_the_server_stops():
    async def look():
        feed, computed, closing = stepping(period=60)
        viewer, seen = feed.join(), []
        async with asyncio.timeout(30):
            async for item in viewer:
                seen.append(item)
                closing.set()
        assert seen == [b"1", b"2"]
        assert len(computed) == 2

    asyncio.run(look())


def test_a_snapshot_that_fails_ends_the_streams_and_nothing_else(caplog):
    async def look():
        def fail():
            raise RuntimeError("broken")

        feed = Feed(fail, asyncio.Event())
        assert [item async for item in feed.join()] == []

    asyncio.run(look())
    assert "the page's snapshot failed" in caplog.text
