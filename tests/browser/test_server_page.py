"""The server's page in a browser: its figures, its box, the token, and what axe-core says of it."""

import io
import json
import re
import urllib.request

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.browser.conftest import COLOURS, NARROW, WIDE, overflows
from tests.serve import fake
from tests.serve.transports import INFER, tensor

DROP = """([name, type, bytes]) => {
  const files = new DataTransfer();
  files.items.add(new File([Uint8Array.from(bytes)], name, {type}));
  return files;
}"""
PATIENCE = 30_000  # milliseconds


@pytest.fixture
def server():
    """A front with a fake engine that has answered six images: its address."""
    with fake.Front().sockets() as (port, _):
        address = f"http://127.0.0.1:{port}"
        for values in ((0, 1), (2,), (3, 4, 5)):
            urllib.request.urlopen(address + INFER, json.dumps({"inputs": [tensor(values)]}).encode()).close()
        yield address


def metrics(address):
    with urllib.request.urlopen(f"{address}/metrics") as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return [sample for family in families for sample in family.samples]


def png(value):
    """A picture of the network's size, all of one grey."""
    file = io.BytesIO()
    Image.fromarray(np.full(fake.SHAPE[:2], value, np.uint8)).save(file, "png")
    return file.getvalue()


def tiles(page):
    return dict(
        zip(page.locator("#tiles dt").all_inner_texts(), page.locator("#tiles dd.value").all_inner_texts(), strict=True)
    )


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("colours", COLOURS)
def test_figures_are_those_of_metrics(server, visit, axe, width, colours):
    page = visit(server, width=width, colours=colours)
    page.locator("#exits tbody tr").first.wait_for(timeout=PATIENCE)
    left = {}
    for sample in metrics(server):
        if sample.name == "gati_left_total":
            left[int(sample.labels["exit"])] = left.get(int(sample.labels["exit"]), 0) + int(sample.value)
    assert sum(left.values()) == 6
    counts = page.locator("#exits tbody tr td:last-child").all_text_contents()
    assert [int(text.split()[0]) for text in counts] == [left[exit_] for exit_ in sorted(left)]
    names = page.locator("#exits tbody th").all_inner_texts()
    assert names == ["Cache at the input", "Cache after block 2", "Whole network"]
    shown = tiles(page)
    assert (shown["Waiting"], shown["Refused"], shown["Failed steps"]) == ("5", "0", "0")
    assert "6 since the start" in page.locator("#tiles").inner_text()
    assert "(plan tight): at most 1 % of answers differ" in page.locator("#promise").inner_text()
    assert page.locator("#state").inner_text() == "Ready"
    assert page.locator("#charts canvas").count() == 4
    assert axe(page) == []
    assert not overflows(page)


def test_lines_follow_the_traffic(server, visit):
    page = visit(server)
    page.locator("#exits tbody tr").first.wait_for(timeout=PATIENCE)
    body = json.dumps({"inputs": [tensor((0, 1, 2, 3, 4, 5, 6, 7))]}).encode()
    urllib.request.urlopen(server + INFER, body).close()
    page.locator("#tiles").get_by_text("14 since the start").wait_for(timeout=PATIENCE)
    shown = tiles(page)
    assert float(shown["Answered a second"]) > 0
    assert shown["Median latency"] == "3 ms"  # all took 3 ms: in the middle of the bucket from 2 to 4
    page.locator("#charts").get_by_text("median 3 ms").wait_for(timeout=PATIENCE)


def test_a_picture_that_is_dropped_is_answered(server, visit, axe):
    page = visit(server)
    page.locator("#content").wait_for(timeout=PATIENCE)
    for value, verdict in (
        (4, "dog (class 1), left early: 2 of 4 blocks were run."),
        (2, "élan (class 2), by the whole network alone."),
    ):
        files = page.evaluate_handle(DROP, ["a.png", "image/png", list(png(value))])
        page.dispatch_event("#drop", "drop", {"dataTransfer": files})
        page.locator("#answer .verdict").get_by_text(verdict.split()[0]).wait_for(timeout=PATIENCE)
        assert page.locator("#answer .verdict").inner_text().startswith(verdict)
    assert page.locator("#answer canvas.preview").count() == 1
    assert axe(page) == []


def test_numbers_are_sent_with_the_keyboard_alone(server, visit):
    page = visit(server)
    page.locator("#content").wait_for(timeout=PATIENCE)
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("1 1 1, 1 1 1")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#answer .verdict").get_by_text("dog").wait_for(timeout=PATIENCE)


def test_a_table_that_has_the_focus_keeps_it_and_goes_on(server, visit):
    page = visit(server)
    table = page.get_by_role("region", name="Plans")
    table.get_by_role("cell", name="6", exact=True).wait_for(timeout=PATIENCE)
    table.focus()
    urllib.request.urlopen(server + INFER, json.dumps({"inputs": [tensor((1,))]}).encode()).close()
    table.get_by_role("cell", name="7", exact=True).wait_for(timeout=PATIENCE)
    assert page.evaluate("document.activeElement.ariaLabel") == "Plans"
    assert page.locator("#bundle dl, #bundle [role=region]").count() == 2


def test_the_token_is_asked_for_kept_for_the_tab_and_never_in_an_address(visit, axe, problems):
    with fake.Front(token="secret").sockets() as (port, _):
        page, asked = visit(f"http://127.0.0.1:{port}"), []
        page.on("request", lambda request: asked.append(request.url))
        page.locator("#token").wait_for(timeout=PATIENCE)
        assert axe(page) == []
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        page.locator("#token-error").get_by_text(re.compile("not the server.s token")).wait_for(timeout=PATIENCE)
        page.fill("#token", "漢字")  # no header can have it
        page.keyboard.press("Enter")
        page.locator("#token-error").get_by_text("ASCII").wait_for(timeout=PATIENCE)
        assert page.evaluate("sessionStorage.length") == 0
        page.evaluate("sessionStorage.setItem('gati-token', 'wrong')")
        page.reload()
        page.locator("#token").wait_for(timeout=PATIENCE)
        page.fill("#token", "secret")
        page.keyboard.press("Enter")
        page.locator("#content").wait_for(timeout=PATIENCE)
        page.click("#random")
        page.locator("#answer .verdict").wait_for(timeout=PATIENCE)
        page.reload()
        page.locator("#content").wait_for(timeout=PATIENCE)
        assert not [url for url in asked if "secret" in url]
        assert page.locator("footer a").count() == 0  # a link sends no token
        assert "/metrics (with the token)" in page.locator("footer").inner_text()
        assert page.evaluate("Object.values(localStorage).length + document.cookie.length") == 0
        page.goto("about:blank")  # before the server ends
        assert all("401" in problem for problem in problems)
        problems.clear()
