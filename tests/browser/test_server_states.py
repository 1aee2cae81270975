"""What the server's page says where not all is well: missing models, no place, alarms, restarts, long names."""

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.page import routes
from serve.page.feed import Feeds
from tests.browser.conftest import COLOURS, NARROW, overflows
from tests.browser.test_server_box import PIXELS, box, npy, serving
from tests.browser.test_server_page import PATIENCE
from tests.serve import fake
from tests.serve.test_repository import Folder, Shop

PLAN = {"name": "p", "epsilon": 0.03, "delta": 0.05, "sites": [1]}
FACTS = {"default": "p", "plans": [PLAN], "depth": 4}
OPEN = {"state": "open", "version": 1, "shadows": 200, "estimate": 0.01, "upper": 0.02, "events": {}, "input_cache": {}}
CERTIFIED = (
    "Certified on the bundle's data (plan p): at most 3 % of answers differ from the whole network's, with "
    "95 % confidence."
)
LIVE = "On live traffic it is 1 %, estimated from 200 compared answers of caches, and at most 2 %."


@pytest.fixture
def run(address_of, visit):
    """Calls a function of a module of the page with arguments: ``run("history.js", "(module, x) => ...", x)``."""
    address = address_of(fake.Front())
    page = visit(address)

    def call(module, script, *arguments):
        return page.evaluate(f"async (given) => ({script})(await import('/page/{module}'), ...given)", list(arguments))

    return call


def apart(work):
    """Does something in a thread of its own, where no event loop runs."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(PATIENCE)


def test_a_model_that_is_not_loaded_says_why_and_leads_to_the_others(address_of, visit, axe, problems):
    shop = apart(lambda: Shop(Folder("good"), Folder("bad", broken="bundle: plan.json is missing")))
    address = address_of(shop)
    page = visit(f"{address}/?model=bad", width=NARROW)
    page.locator("#token").wait_for(timeout=PATIENCE)
    page.fill("#token", "secret")
    page.keyboard.press("Enter")
    page.locator("#trouble").get_by_text("bundle: plan.json is missing").wait_for(timeout=PATIENCE)
    assert (page.locator("#state").inner_text(), page.locator("h1").inner_text()) == ("Not loaded", "bad")
    assert page.locator("#models a").all_inner_texts() == ["good", "bad (not loaded)"]
    assert axe(page) == []
    page.locator("#models a").first.click()
    page.locator("#state").get_by_text("Ready").wait_for(timeout=PATIENCE)
    assert (page.locator("h1").inner_text(), page.locator("#trouble").is_visible()) == ("good", False)
    apart(lambda: asyncio.run(shop.models.unload("good")))
    page.locator("#trouble").get_by_text("Model good was unloaded.").wait_for(timeout=PATIENCE)
    assert all("401" in problem for problem in problems)  # Chromium's own line on a request without the token
    problems.clear()


def test_no_such_model_and_a_viewer_too_many_are_said_in_a_sentence(address_of, visit, problems, monkeypatch):
    monkeypatch.setattr(routes, "Feeds", functools.partial(Feeds, most=1))
    address = address_of(fake.Front())
    unknown = visit(f"{address}/?model=other")
    unknown.locator("#trouble").get_by_text("no model of this name").wait_for(timeout=PATIENCE)
    assert unknown.locator("#state").inner_text() == "No such model"
    unknown.locator("#trouble a").click()
    unknown.locator("#exits tbody tr").first.wait_for(timeout=PATIENCE)
    another = visit(address)
    another.locator("#trouble").get_by_text("as may at once").wait_for(timeout=PATIENCE)
    assert another.locator("#state").inner_text() == "Waiting for a place"
    unknown.goto("about:blank")
    another.locator("#exits tbody tr").first.wait_for(timeout=PATIENCE)
    assert not another.locator("#trouble").is_visible()
    assert all("404" in problem or "429" in problem for problem in problems)
    problems.clear()


@pytest.mark.parametrize("colours", COLOURS)
def test_long_names_leave_the_page_as_wide_as_the_window(address_of, visit, axe, colours):
    front = serving(class_names=("W" * 500, "深" * 400, "a b " * 100))
    address = address_of(front)
    page = visit(address, width=NARROW, colours=colours)
    ask = box(page)
    for value in range(3):
        ask(npy(PIXELS + value))
        page.locator("#answer meter").first.wait_for(timeout=PATIENCE)
        assert not overflows(page)
        assert page.locator("#answer").bounding_box()["height"] < 1600
    assert axe(page) == []


@pytest.mark.parametrize(
    ("adaptation", "text", "broken"),
    [
        (None, f"{CERTIFIED} It holds for traffic like that data, and live traffic is not compared.", False),
        (OPEN | {"shadows": 2, "estimate": 0.41}, f"{CERTIFIED} Of live traffic, only 2 answers of caches", False),
        (OPEN, f"{CERTIFIED} {LIVE}", False),
        (OPEN | {"estimate": 0.08, "upper": 0.2}, f"{CERTIFIED} On live traffic it is 8 %", False),
        (OPEN | {"state": "part", "events": {"alarm": 1}}, "disagreed with it more often than promised: 1 alarm", True),
        (OPEN | {"state": "part"}, f"{CERTIFIED} Some caches are closed or paused.", False),
        (OPEN | {"state": "safe", "events": {"alarm": 2}}, "Safe mode: the whole network answers. Live traffic", True),
        (OPEN | {"version": 2, "events": {"alarm": 1}}, "1 alarm since the start. What the alarm named is", False),
        (OPEN | {"version": 2, "events": {"alarm": 1, "swap": 1}}, "(version 2) was certified anew on later", False),
        (OPEN | {"version": 2, "events": {"swap": 1}}, "certified anew on later traffic. On live traffic it is", False),
    ],
)  # fmt: skip
def test_the_promise_says_what_live_traffic_has_shown_of_it(run, adaptation, text, broken):
    said = run("drift.js", "(module, facts, now) => module.promise(facts, now)", FACTS, {"adaptation": adaptation})
    assert text in said["text"].replace("\u2019", "'")
    assert bool(said.get("broken")) == broken


def test_an_estimate_of_few_comparisons_is_not_shown(run):
    script = "(module, one) => module.estimated(one)"
    assert run("drift.js", script, OPEN | {"shadows": 29}) is None
    assert run("drift.js", script, OPEN | {"shadows": 30}) == 0.01


def now(started, *, left=0, refused=0, stored=None, counts=(0, 0, 0)):
    return {
        "started": started,
        "left": {"1": left, "4": left},
        "adaptation": stored and {"input_cache": stored},
        "refused": {"overloaded": refused},
        "latency": {"le": [1, 4, None], "counts": list(counts)},
    }


def test_another_process_begins_another_history(run):
    script = """(module, snapshots) => {
        const history = new module.History();
        snapshots.forEach((one, second) => history.add(one, second));
        return [history.times.length, history.between(module.per(module.refused), 5)];
    }"""
    assert run("history.js", script, [now(7, refused=5), now(7, refused=7)]) == [2, 2]
    assert run("history.js", script, [now(7, refused=5), now(9), now(9, refused=3)]) == [2, 3]
    assert run("history.js", script, [now(7, left=5), now(7, left=4)]) == [1, None]  # a model that was loaded again


def test_a_gap_begins_another_history(run):
    """Else the last seconds would be those before it, too."""
    script = """(module, one, times) => {
        const history = new module.History();
        times.forEach((at) => history.add(one, at));
        return history.times;
    }"""
    assert run("history.js", script, now(7), [0, 1, 11]) == [0, 1, 11]
    assert run("history.js", script, now(7), [0, 1, 12, 13]) == [12, 13]


def test_stored_answers_are_not_those_of_the_network_s_caches(run):
    script = """(module, before, after) => [
        module.earlyOf({depth: 4}), module.storedOf, module.depthOf({depth: 4})
    ].map((get) => get(before, after))"""
    found = run("history.js", script, now(1), now(1, left=5, stored={"exact": 80, "nearest": 10}))
    assert found == pytest.approx([0.05, 0.9, (5 * 1 + 5 * 4) / 100 / 4])


def test_a_percentile_above_the_largest_bound_has_no_value(run):
    script = "(module, q, after) => String(module.percentile(q)({latency: {counts: [0, 0, 0]}}, after))"
    assert run("history.js", script, 0.5, now(1, counts=(0, 0, 8))) == "Infinity"
    assert run("history.js", script, 0.5, now(1, counts=(0, 8, 8))) == "2.5"


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, "\N{EN DASH}"),
        (0, "0 %"),
        (3e-5, "< 0.01 %"),
        (0.0312, "3.1 %"),
        (0.5, "50 %"),
        (0.9999, "> 99.9 %"),
        (1, "100 %"),
    ],
)
def test_shares_are_never_rounded_to_none_or_all(run, share, text):
    assert run("dom.js", "(module, x) => module.share(x)", share) == text


def test_latency_above_the_histogram_is_said_to_be_more(address_of, visit):
    front = fake.Front()
    address = address_of(front)
    page = visit(address)
    page.locator("#exits tbody tr").first.wait_for(timeout=PATIENCE)
    for _ in range(4):
        front.observer.answered(_job(), fake.answer(0), 60.0)
    page.locator("#tiles").get_by_text("over 4 s").first.wait_for(timeout=PATIENCE)
    page.locator("#charts").get_by_text("median over 4 s").wait_for(timeout=PATIENCE)


def _job():
    return fake.Job(image=PIXELS, route=0, arrived=0.0)
