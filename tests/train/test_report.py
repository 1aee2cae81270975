"""The evaluation page: escaped, well-formed, and honest where something is missing."""

import copy
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError

from train.evaluate import render

HOSTILE = "<script>alert('x')</script>\"&"
VOID = {"meta", "br", "hr", "img", "input", "link"}

MEASURED = {
    "device": "cpu-cpu", "driver": "while_loop", "backend": "xla", "numerics": "reference", "dtype": "float32",
    "batch": 1,
    "requests": 10, "full": "tuned", "full_ms": 2.0, "cascade_ms": 1.6, "speedup": 1.25, "ideal": 4 / 3,
    "conversion": 0.9375, "lookup_share": None, "spread": 0.1,
}  # fmt: skip
CERTIFICATE = {
    "epsilon": 0.125, "delta": 0.05, "n": 77, "disagreements": 3, "method": "by hand", "numerics": "reference",
    "looks": 1, "promise": "at most 12.5% of requests disagree with the base", "name": "2%", "plans": 1,
    "accuracy_gap": None, "certified": True, "base_saw_data": False, "holds": True,
}  # fmt: skip
EVALUATION = {
    "dataset": "digits", "split": "all[10:20]", "network": "resnet20", "n": 10, "base": {"accuracy": 0.9},
    "cascade": {"accuracy": 0.8, "agreement": 0.875}, "certificate": CERTIFICATE,
    "exits": [
        {"exit": 2, "hits": 0, "hit_rate": 0.0, "agreement": None},
        {"exit": 5, "hits": 6, "hit_rate": 0.6, "agreement": 0.75},
        {"exit": 9, "hits": 4, "hit_rate": 0.4, "agreement": 1.0},
    ],
    "oracle": {"saved_share": 0.5}, "memory": {"base_bytes": 1_230_000, "cache_bytes": 45_600},
    "cost": {"blocks_mean": 4.5, "saved_share": 0.25, "ideal_speedup": 4 / 3, "measured": [MEASURED]},
    "versions": {"jax": "0.0.1", "numpy": "0.0.2"}, "seed": 0, "date": "2000-01-01",
}  # fmt: skip


class Page(HTMLParser):
    """Checks that tags nest; keeps the tags, and the text of every table cell."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.classes: list[str | None] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.classes.append(dict(attrs).get("class"))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data.strip()


def page(**changes: dict) -> Page:
    evaluation = copy.deepcopy(EVALUATION)
    for section, values in changes.items():
        evaluation[section].update(values)
    return Page(render(evaluation))


def test_the_page_is_well_formed_says_what_the_evaluation_says_and_loads_nothing():
    p = page()
    assert ["accuracy", "90.00%", "80.00%"] in p.rows
    assert ["agreement with the base", "", "87.50%"] in p.rows
    assert ["2", "0", "0.0%", "-", ""] in p.rows  # without hits there is no agreement
    assert ["5", "6", "60.0%", "75.00%", ""] in p.rows
    assert ["9 (base)", "4", "40.0%", "100.00%", ""] in p.rows
    assert [
        "cpu-cpu",
        "xla",
        "reference",
        "1",
        "2.000 ms (tuned)",
        "1.600 ms",
        "1.250",
        "1.333",
        "0.938",
        "10%",
    ] in p.rows
    for text_part in ("3 of 77", "by hand", "1.23 MB", "0.05 MB", "would save 50.0%", "saves 25.0%", "12.50% of 10"):
        assert text_part in p.text
    assert not {"script", "link", "img", "iframe", "object"} & set(p.tags)
    assert "http" not in render(EVALUATION)


def test_missing_labels_are_dashes():
    p = page(base={"accuracy": None}, cascade={"accuracy": None})
    assert ["accuracy", "-", "-"] in p.rows
    assert "None" not in p.text


def hostile(value: object) -> object:
    """Replace every string in a tree, and every key under ``versions``."""
    if isinstance(value, dict):
        return {k: hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_strings_are_escaped_everywhere():
    evaluation = hostile(EVALUATION)
    assert isinstance(evaluation, dict)
    evaluation["versions"] = {HOSTILE: HOSTILE}
    html = render(evaluation)
    p = Page(html)
    assert "script" not in p.tags
    assert "<script" not in html
    assert p.tags == Page(render(EVALUATION | {"versions": {"jax": "0"}})).tags
    assert p.text.count(HOSTILE) >= 8  # network, data set and split in title and heading, method, device, version


@pytest.mark.parametrize(("holds", "wanted", "unwanted"), [(True, "holds", "fails"), (False, "fails", "holds")])
def test_the_promise_is_marked_as_kept_or_broken(holds, wanted, unwanted):
    p = page(certificate={"holds": holds})
    assert wanted in p.classes
    assert unwanted not in p.classes
    assert "At most 12.5% of requests disagree with the base" in p.text
    assert "95%" in p.text


def test_nothing_is_promised_without_a_certificate():
    p = page(certificate={"certified": False, "holds": False, "disagreements": 0})
    assert "Nothing could be certified" in p.text
    assert "At most" not in p.text
    assert "fails" in p.classes


GAP = {"upper": 0.0123, "delta": 0.1, "losses": 41, "gains": 37, "method": "bets"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accuracy_gap": GAP}, "at most 1.23% less accurate than the base"),
        ({"accuracy_gap": GAP}, "confidence 90% of its own"),
        ({"accuracy_gap": GAP}, "41 answers lost and 37 gained; bets"),
        ({"plans": 3}, "plan 2% of 3 certified together"),
        ({"base_saw_data": True}, "trained on the certify rows"),
    ],
)
def test_what_is_not_always_so_is_said_only_where_it_is(change, said):
    assert said in " ".join(page(certificate=change).text.split())
    for words in ("less accurate", "certified together", "trained on the certify rows"):
        assert words not in page().text


@pytest.mark.parametrize("missing", ["certificate", "exits", "versions", "n"])
def test_a_missing_section_is_an_error_not_a_gap(missing):
    with pytest.raises(UndefinedError, match=missing):
        render({k: v for k, v in EVALUATION.items() if k != missing})
