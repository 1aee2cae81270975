"""The evaluation page: a true headline, figures to scale, well-formed, escaped, whole where something is missing."""

import base64
import io
import itertools
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from gati_jax.certification import AccuracyGap
from tests.train.made_up import BLOCKS_MS, DEPTH, EXITS, NAMES, N, evaluation, made_up, pictures
from train import cli
from train.report import draw_wall, write_report
from train.report.figures import FIGURES
from train.report.page import LIGHT, NARROW, WIDE, ZOOM, render
from train.report.pictures import SIDE, Wall
from train.report.svg import Scale, spread_out
from train.report.words import headline, share
from train.results import Evaluation

HOSTILE = "<script>alert('x')</script>\"&"
CONTROL = "\x00\x1b[2J\ud800"
INLINE = {"a", "code", "span", "strong"}
VOID = {"meta", "br", "hr", "img", "input", "link"}
NO_PICTURES = Wall({}, missing="Nothing to see.")


class Page(HTMLParser):
    """Checks that tags nest; keeps tags, attributes, ids, and the text of every table cell."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += "" if tag in INLINE else "\n"

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data.strip()

    def values(self, name: str) -> list[str]:
        return [value for found, value in self.attributes if found == name]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def page(**changes) -> Page:
    e = made_up(**changes)
    return Page(render(e, pictures(e)))


def test_the_page_is_well_formed_says_what_the_evaluation_says_and_loads_nothing():
    p, e = page(), made_up()
    assert e.cost is not None
    for exit_ in e.exits[:-1]:
        row = next(row for row in p.rows if row[0] == f"site {exit_.exit}")
        assert row[1:3] == [f"{exit_.hits:,}", share(exit_.hit_rate, digits=1)]
    assert ["base", "300", "15%", "100%", "99.2% to 100%"] in p.rows
    first = e.cost.measured[0]
    assert [f"{first.speedup:.3f}"] == next(row for row in p.rows if row[0] == "1" and "ms" in row[1])[3:4]
    for point in e.path:
        assert any(row[0].split()[0] == str(point.step) and row[2] == share(point.agreement) for row in p.rows)
    assert ["cat", "bird", "9"] in p.rows
    for said in ("30 of the 2,500 certify requests disagreed (1.2%)", "44.70 MB", "1.23 MB", "0.13% of such samples"):
        assert said in p.words
    assert e.commands[0] in p.text
    assert not {"script", "link", "iframe", "object"} & set(p.tags)
    assert all(source.startswith("data:image/png;base64,") for source in p.values("src"))
    assert all(target.startswith("#") for target in p.values("href"))
    assert "http" not in render(e, pictures(e))
    assert len(p.values("id")) == len(set(p.values("id")))
    assert {target[1:] for target in p.values("href")} <= set(p.values("id"))


FASTER, CERTIFIED = "1.76 times as fast as your network", "at most 2% of answers differ, with 95% confidence"
NO_FASTER = "No faster: your network answers every request"
ROUNDED = {"served__epsilon": 0.02001, "served__delta": 0.05004}
EMPTY = {
    "exits": [{"exit": DEPTH, "hits": N, "hit_rate": 1.0, "agreement": 1.0, "interval": [0.99, 1.0]}],
    "cascade__agreement": 1.0,
    "confusions": [],
    "classes": [],
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, f"{FASTER}; {CERTIFIED}"),
        ({"cost": None}, f"Speed not measured; {CERTIFIED}"),
        ({"served": None}, f"{FASTER}; {CERTIFIED}"),
        # A bound is rounded up, a confidence down.
        (ROUNDED, f"{FASTER}; at most 2.01% of answers differ, with 94.99% confidence"),
        ({"served__epsilon": None}, f"{FASTER}; how often answers differ is not certified (0.8% did here)"),
        ({"certificate__certified": False}, f"{NO_FASTER}; 0.8% of answers differed here"),
        (EMPTY, f"{NO_FASTER}; its answers are unchanged"),
    ],
)  # fmt: skip
def test_the_headline_is_true(changes, sentence):
    assert headline(made_up(**changes)).sentence == sentence


@pytest.mark.parametrize(
    ("speedup", "said"),
    [
        (12.34, "12.3 times as fast"),
        (1.03, "About as fast as your network (1.03"),
        (0.5, "Slower than your network: 2.0"),
    ],
)
def test_the_headline_says_how_fast(speedup, said):
    cost = evaluation()["cost"]
    cost["measured"][0]["speedup"] = speedup
    assert headline(made_up(cost=cost)).sentence.startswith(said)


def test_the_headline_says_where_requests_leave():
    assert headline(made_up()).leaving == (
        "85% of requests leave early, most of them (35% of all) after block 2 of 8, with 18% of its computation done;"
        " 15% run through the whole network."
    )
    assert "no cache is on" in headline(made_up(**EMPTY)).leaving


GAP = AccuracyGap(n=2500, losses=17, gains=11, upper=0.0123, delta=0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"certificate__accuracy_gap": GAP}, "at most 1.23% less accurate than the base, with 90% confidence"),
        ({"certificate__accuracy_gap": GAP}, "17 right answers were lost and 11 gained (betting"),
        ({"certificate__plans": 3}, "plan 1% of 3 certified together"),
        ({"certificate__base_saw_data": True}, "The base was trained on the certify rows"),
        ({"certificate__holds": False}, "does not hold here: 0.8% of these 2,000 requests disagreed"),
        ({"certificate__certified": False}, "Nothing could be certified"),
        ({"base__accuracy": None}, "There are no labels"),
        ({"cost": None}, "Latency was not measured"),
        (EMPTY, "No answer changed"),
        ({"layout": None}, "drawn as if all took as long"),
    ],
)  # fmt: skip
def test_what_is_not_always_so_is_said_only_where_it_is(changes, said):
    assert said in page(**changes).words
    assert said not in page().words
    assert "None" not in page(**changes).text


def test_an_unsteady_speed_up_is_called_one():
    cost = evaluation()["cost"]
    cost["measured"][0]["spread"] = 1.12
    assert "the speed-up varied by 112%" in page(cost=cost).words
    assert "varied" not in page().words


def test_no_space_is_lost_between_sentences():
    for changes in ({}, EMPTY, {"certificate__accuracy_gap": GAP}, {"cost": None}):
        assert not re.findall(r"[a-z0-9)%][.;:][A-Z][a-z]", page(**changes).text)


def test_an_evaluation_of_an_older_version_is_a_page_too():
    old = {key: value for key, value in evaluation().items() if key not in {
        "layout", "path", "classes", "confusions", "samples", "commands", "served",
    }}  # fmt: skip
    for one in old["exits"]:
        del one["interval"]
    for name in ("full_each_ms", "cascade_each_ms"):
        del old["cost"]["measured"][0][name]
    p = Page(render(Evaluation.model_validate(old), NO_PICTURES))
    assert "Nothing to see." in p.text
    assert p.tags.count("svg") == 2 * len({"flow", "certificate"})


def hostile(value: object) -> object:
    """Replace every string that is no choice of a few in a tree."""
    if isinstance(value, dict):
        kept = {"driver", "backend", "full"} & value.keys()
        kept |= {"numerics"} & value.keys() if "driver" in value else set()
        return {k: v if k in kept else hostile(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [hostile(v) for v in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_strings_are_escaped_everywhere(tmp_path):
    found = hostile(evaluation())
    assert isinstance(found, dict)
    e = Evaluation.model_validate(found | {"versions": {HOSTILE: HOSTILE}})
    html = render(e, pictures(e))
    p = Page(html)
    assert "script" not in p.tags
    assert "<script" not in html
    assert p.tags == Page(render(Evaluation.model_validate(evaluation(versions={"a": "b"})), pictures(e))).tags
    assert p.text.count(HOSTILE) >= 20  # network, data, classes, caches, devices, commands, versions, ...
    write_report(tmp_path, e, pictures(e))  # the files are XML before they are pictures


def test_names_that_xml_has_no_place_for_are_written_out(tmp_path):
    e = made_up(
        classes=[{"index": 0, "name": CONTROL, "n": N, "exits": [hits for _, hits, _ in EXITS], "disagreements": 9}]
    )
    write_report(tmp_path, e, NO_PICTURES)
    assert "\\x00\\x1b" in (tmp_path / "report.html").read_text()


def shapes(name: str, kind: str, width: int = WIDE, **changes) -> list[ET.Element]:
    """The shapes of one class in a figure."""
    root = ET.fromstring(FIGURES[name].draw(made_up(**changes), width).svg(name, "title"))
    return [shape for shape in root.iter() if kind in shape.get("class", "").split()]


def number(shape: ET.Element, name: str) -> float:
    return float(shape.get(name, "nan"))


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_the_network_is_drawn_to_scale(width):
    blocks = [number(shape, "width") + 1 for shape in shapes("flow", "block", width)]
    assert np.array(blocks) / sum(blocks) == pytest.approx(np.array(BLOCKS_MS) / sum(BLOCKS_MS), abs=1e-3)
    (panel,) = shapes("flow", "panel", width)
    doors = [*shapes("flow", "cascade", width), *shapes("flow", "base", width)]
    assert [number(d, "height") / number(panel, "height") for d in doors] == pytest.approx(
        [hits / N for _, hits, _ in EXITS], abs=1e-3
    )
    until = [sum(BLOCKS_MS[:site]) / sum(BLOCKS_MS) for site, *_ in EXITS]
    at = [(number(d, "x") + 6 - number(panel, "x")) / number(panel, "width") for d in doors]
    assert at == pytest.approx(until, abs=2e-3)
    marks = [(number(m, "cx") - number(panel, "x")) / number(panel, "width") for m in shapes("flow", "cache", width)]
    assert marks == pytest.approx(until[:-1], abs=2e-3)


def test_the_flow_says_what_is_saved_and_what_leaves():
    labels = [shape.text for shape in shapes("flow", "label")]
    assert {"35%", "32%", "18%", "15%"} <= set(labels)
    running = sum(hits / N * sum(BLOCKS_MS[:site]) for site, hits, _ in EXITS) / sum(BLOCKS_MS)
    assert any(f"{1 - running:.0%} of computation saved" in (shape.text or "") for shape in shapes("flow", "small"))


def test_the_time_of_every_request_is_in_the_histograms():
    e = made_up()
    assert e.cost is not None
    first = e.cost.measured[0]
    high = max(np.quantile(first.full_each_ms, 0.99), np.quantile(first.cascade_each_ms, 0.99))
    for kind, times in (("base", first.full_each_ms), ("cascade", first.cascade_each_ms)):
        counts = [int((bar[0].text or "").split()[0]) for bar in shapes("latency", kind)]
        drawn, kept = sum(counts), int((np.array(times) <= high).sum())
        assert abs(drawn - kept) <= 1  # quantiles differ by how they interpolate
        assert drawn >= 0.97 * len(times)


def test_agreement_and_bound_stand_in_proportion():
    dots = shapes("agreement", "dot-cascade")
    values = [right / hits for _, hits, right in EXITS[:-1]]
    x = [number(dot, "cx") for dot in dots] + [number(shapes("agreement", "dot-base")[0], "cx")]
    slope, start = np.polyfit([*values, 1.0], x, 1)
    assert x == pytest.approx(slope * np.array([*values, 1.0]) + start, abs=0.02)
    (bound,) = shapes("agreement", "bound")
    assert number(bound, "x1") == pytest.approx(slope * 0.98 + start, abs=0.1)
    (line,) = shapes("certificate", "bound")
    certify, here = shapes("certificate", "dot-base"), shapes("certificate", "dot-cascade")
    zero = number(shapes("certificate", "panel")[0], "x")
    assert (number(certify[0], "cx") - zero) / (number(line, "x1") - zero) == pytest.approx(0.012 / 0.02, abs=1e-3)
    assert (number(here[0], "cx") - zero) / (number(line, "x1") - zero) == pytest.approx(0.008 / 0.02, abs=1e-3)


def test_the_plan_stands_on_its_path():
    e = made_up()
    (path,) = shapes("front", "path-agreement")
    points = np.array([list(map(float, part.split())) for part in path.get("d", "")[1:].split("L")])
    assert len(points) == len(e.path)
    plan = sorted(e.path, key=lambda point: point.ms).index(next(point for point in e.path if point.certified))
    dot = shapes("front", "dot-cascade")[0]
    assert (number(dot, "cx"), number(dot, "cy")) == pytest.approx(tuple(points[plan]), abs=0.02)
    assert shapes("front", "oracle")
    assert not shapes("front", "oracle", oracle=None)
    assert not shapes("front", "path-accuracy", path=[point | {"accuracy": None} for point in evaluation()["path"]])


def test_classes_are_divided_as_their_requests_are():
    bars = shapes("classes", "cascade") + shapes("classes", "base")
    counts: dict[str, int] = {}
    for bar in bars:
        name, hits = re.match(r"(\w+): (\d+) of", bar[0].text or "").groups()  # pyright: ignore[reportOptionalMemberAccess]
        counts[name] = counts.get(name, 0) + int(hits)
    assert counts == dict.fromkeys(NAMES, N // len(NAMES))


def test_figures_are_also_pictures_beside_the_page(tmp_path):
    e = made_up()
    write_report(tmp_path, e, pictures(e))
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == set(FIGURES)
    with Image.open(tmp_path / "figures" / "flow.png") as picture:
        assert picture.width == ZOOM * WIDE
        colours = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b, *_ in np.unique(np.asarray(picture).reshape(-1, 4), axis=0)}
    assert {LIGHT["cascade"], LIGHT["soft"], LIGHT["base"], LIGHT["paper"]} <= colours
    write_report(tmp_path, made_up(cost=None), NO_PICTURES)
    assert not (tmp_path / "figures" / "latency.png").exists()  # it would be another evaluation's


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_images_are_shown_with_their_own_pixels():
    images = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 3), np.uint8)
    wall = draw_wall(images, [2, 0])
    assert list(wall.pictures) == [2, 0]
    np.testing.assert_array_equal(decoded(wall.pictures[2]), images[2])
    digits = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1) // 4  # 0 to 15
    np.testing.assert_array_equal(decoded(draw_wall(digits, [0]).pictures[0]), digits[0, ..., 0] * 17)
    large = draw_wall(np.zeros((1, 300, 200, 3), np.float32), [0])
    assert decoded(large.pictures[0]).shape == (SIDE, SIDE * 2 // 3, 3)


def test_a_recording_is_shown_as_a_spectrogram():
    seconds = np.arange(16_000, dtype=np.float32) / 16_000
    tone = np.sin(2 * np.pi * 6_000 * seconds)[None]  # of 8,000 Hz at the top: three quarters up
    wall = draw_wall(tone, [0])
    assert wall.kind == "spectrogram"
    brightness = decoded(wall.pictures[0]).sum(axis=(1, 2))
    assert 1 - np.argmax(brightness) / len(brightness) == pytest.approx(0.75, abs=0.04)


@pytest.mark.parametrize(
    ("inputs", "why"),
    [(np.zeros((4, 128), np.int32), "tokens"), (np.zeros((4, 64), np.float32), "neither images nor recordings")],
)
def test_other_inputs_are_left_out_with_a_sentence(inputs, why):
    wall = draw_wall(inputs, [0, 1])
    assert not wall.pictures
    assert why in wall.missing
    assert why in Page(render(made_up(), wall)).text


def test_commands_are_shown_as_they_were_typed():
    module = ["/somewhere/train/evaluate.py", "--bundle", "a b"]
    assert cli.command_line(module) == "python -m train.evaluate --bundle 'a b'"
    assert cli.command_line(["gati-jax fit", "--config", "c.toml"]) == "gati-jax fit --config c.toml"


def test_scales_have_round_ticks_and_labels_keep_apart():
    assert Scale(0, 1.25, 0, 100).ticks(5) == pytest.approx([0, 0.5, 1.0])
    assert Scale(0.9, 30, 0, 100, log=True).ticks() == pytest.approx([1, 2, 5, 10, 20])
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)
    places = spread_out([10, 11, 12, 95], 8, 0, 100)
    assert all(after - before >= 8 for before, after in itertools.pairwise(places))
    assert min(places) >= 0
    assert max(places) <= 100
