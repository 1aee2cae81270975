"""The tools of the browser tests find what they are for: a page at fault fails."""

from tests.browser.conftest import NARROW, overflows

GOOD = "<!doctype html><html lang=en><title>t</title><main><h1>Good</h1><p>Text</p></main></html>"


def test_a_good_page_passes(visit, axe, tmp_path):
    (tmp_path / "good.html").write_text(GOOD)
    page = visit(tmp_path / "good.html", width=NARROW)
    assert axe(page) == []
    assert not overflows(page)


def test_axe_finds_a_picture_without_text_and_faint_letters(visit, axe, tmp_path):
    faint = "<p style='color:#bbb;background:#fff'>faint</p><img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>"
    (tmp_path / "bad.html").write_text(GOOD.replace("<p>Text</p>", faint))
    found = axe(visit(tmp_path / "bad.html"))
    assert {line.split()[0] for line in found} >= {"image-alt", "color-contrast"}


def test_a_wide_page_overflows(visit, tmp_path):
    (tmp_path / "wide.html").write_text(GOOD.replace("<p>", "<p style='width: 900px'>"))
    assert overflows(visit(tmp_path / "wide.html", width=NARROW))


def test_an_error_in_the_console_and_a_foreign_request_are_problems(visit, problems, tmp_path):
    calls = "<script>console.error('no')</script><img alt='' src='http://192.0.2.1/x.png'><p>"
    (tmp_path / "loud.html").write_text(GOOD.replace("<p>", calls))
    visit(tmp_path / "loud.html", offline=True)
    assert {problem.split(":")[0] for problem in problems} == {"console", "request of another machine"}
    problems.clear()
