"""report.html in a browser: nothing loaded from elsewhere, no error, accessible, and as wide as the window."""

import itertools

import pytest

from tests.browser.conftest import COLOURS, NARROW, WIDE, overflows
from tests.train.made_up import EXITS, N, made_up, pictures
from train.report import write_report


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder, e = tmp_path_factory.mktemp("report"), made_up()
    write_report(folder, e, pictures(e))
    return folder / "report.html"


@pytest.mark.parametrize(("width", "colours"), list(itertools.product((NARROW, WIDE), COLOURS)))
def test_axe_finds_nothing_and_the_page_fits(visit, axe, report, width, colours):
    page = visit(report, width=width, colours=colours)
    for summary in page.locator("summary").all():
        summary.click()  # tables are behind them
    assert axe(page) == []
    assert not overflows(page)
    shown = page.locator("figure svg:visible")
    assert shown.count() == page.locator("figure").count()
    assert all(box["width"] <= width for box in (one.bounding_box() for one in shown.all()))


def test_letters_keep_their_size_on_a_phone(visit, report):
    page = visit(report, width=NARROW)
    sizes = page.evaluate(
        "[...document.querySelectorAll('.narrow svg text')].map(t => t.getBoundingClientRect().height)"
    )
    assert min(sizes) > 11


def test_no_letter_of_a_figure_is_cut_off(visit, report):
    for width in (NARROW, WIDE):
        outside = visit(report, width=width).evaluate(
            """[...document.querySelectorAll('figure svg')].filter(s => s.checkVisibility()).flatMap(s => {
                const box = s.getBoundingClientRect();
                return [...s.querySelectorAll('text')].filter(t => {
                    const b = t.getBoundingClientRect();
                    return b.left < box.left - 1 || b.right > box.right + 1 || b.bottom > box.bottom + 1;
                }).map(t => t.textContent);
            })"""
        )
        assert outside == []


def test_what_is_seen_first_says_how_much_how_often_and_where(visit, report):
    page = visit(report)
    first = page.locator("h1").inner_text()
    assert first.startswith("1.76 times as fast as your network")
    assert first.endswith("at most 2% of answers differ, with 95% confidence")
    assert page.locator("h1").bounding_box()["y"] < 200
    leaves = page.locator("#leave + figure .wide svg")
    texts = leaves.locator("text.label").all_text_contents()
    assert {f"{hits / N:.0%}" for _, hits, _ in EXITS} <= set(texts)


def test_sections_are_reached_with_the_keyboard_alone(visit, report):
    page = visit(report, width=NARROW)
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim().slice(0, 30)"))
    assert "Where requests leave" in reached
    assert "The numbers of this figure" in reached
    page.locator("a[href='#time']").press("Enter")
    assert page.evaluate("location.hash") == "#time"
