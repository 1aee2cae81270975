"""The figures and pictures of the evaluation page: to scale, with the numbers that they show, and never too long."""

import base64
import io
import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from tests.train.made_up import BLOCKS_MS, EXITS, NAMES, N, Page, evaluation, made_up, shapes
from train.report import draw_wall
from train.report.page import NARROW, WIDE, render
from train.report.pictures import SIDE
from train.report.svg import Scale, spread_out, text_width


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
    assert any(f"{1 - running:.0%} of computation skipped" in (shape.text or "") for shape in shapes("flow", "small"))


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
    x = [number(dot, "cx") for dot in dots]
    slope, start = np.polyfit(values, x, 1)
    assert x == pytest.approx(slope * np.array(values) + start, abs=0.02)
    (bound,) = shapes("agreement", "bound")
    assert number(bound, "x1") == pytest.approx(slope * 0.98 + start, abs=0.1)
    assert not shapes("agreement", "dot-base")  # it always agrees with itself
    (line,) = shapes("certificate", "bound")
    certify, here = shapes("certificate", "dot-base"), shapes("certificate", "dot-cascade")
    zero = number(shapes("certificate", "panel")[0], "x")
    assert (number(certify[0], "cx") - zero) / (number(line, "x1") - zero) == pytest.approx(0.012 / 0.02, abs=1e-3)
    assert (number(here[0], "cx") - zero) / (number(line, "x1") - zero) == pytest.approx(0.008 / 0.02, abs=1e-3)


def test_an_exit_of_one_request_does_not_press_the_others_together():
    exits = evaluation()["exits"]
    exits[0].update(hits=1, agreement=1.0, interval=[0.025, 1.0])
    exits[1].update(agreement=0.5, interval=[0.4, 0.6])
    arrows = [shape for shape in shapes("agreement", "cascade", exits=exits) if shape.tag == "path"]
    bars = shapes("agreement", "interval", exits=exits)
    assert (len(arrows), len(bars)) == (2, 3)
    edge = min(number(bar, "x1") for bar in bars)
    (bound,) = shapes("agreement", "bound", exits=exits)
    assert number(bound, "x1") - edge > 0.5 * (number(bars[0], "x2") - edge)
    assert len(shapes("agreement", "dot-cascade", exits=exits)) == 2  # 50% lies below; its number is written
    assert "50%" in [shape.text for shape in shapes("agreement", "strong", exits=exits)]


def test_the_plan_stands_on_its_path():
    e = made_up()
    (path,) = [shape for shape in shapes("front", "path-agreement") if shape.tag == "path"]
    points = np.array([list(map(float, part.split())) for part in path.get("d", "")[1:].split("L")])
    assert len(points) == len(e.path)
    plan = sorted(e.path, key=lambda point: point.ms).index(next(point for point in e.path if point.certified))
    dot = shapes("front", "dot-cascade")[0]
    assert (number(dot, "cx"), number(dot, "cy")) == pytest.approx(tuple(points[plan]), abs=0.02)
    assert shapes("front", "oracle")
    assert not shapes("front", "oracle", oracle=None)
    assert not shapes("front", "path-accuracy", path=[point | {"accuracy": None} for point in evaluation()["path"]])


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("oracle", [None, {"saved_share": 0.6, "ms": 3.2}, {"saved_share": 0.6, "ms": 2.0}])
def test_no_line_of_the_path_runs_through_a_label(width, oracle):
    """Labels that may touch a line stand on a rim of the paper's colour; none touches another or the oracle's dot."""
    marks = shapes("front", "halo", width, oracle=oracle)
    assert {mark.text for mark in marks} == {"base alone", "the plan"} | ({"oracle"} if oracle else set())
    boxes = []
    for mark in marks:
        wide = text_width(mark.text or "")
        left = number(mark, "x") - (wide if mark.get("text-anchor") == "end" else 0)
        boxes.append((left, left + wide, number(mark, "y") - 11, number(mark, "y") + 3))
    for one, other in itertools.combinations(boxes, 2):
        assert one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] or other[3] <= one[2]
    for dot in shapes("front", "oracle", width, oracle=oracle):
        x, y = number(dot, "cx"), number(dot, "cy")
        assert not any(box[0] - 4 < x < box[1] + 4 and box[2] - 4 < y < box[3] + 4 for box in boxes)
    keys = [
        shape for shape in shapes("front", "small", width, oracle=oracle) if shape.text in {"agreement", "accuracy"}
    ]
    points = [shape for shape in shapes("front", "path-agreement", width, oracle=oracle) if shape.tag == "path"]
    top = min(float(part.split()[1]) for part in (points[0].get("d") or "")[1:].split("L"))
    assert all(number(key, "y") < top - 10 for key in keys)


def test_classes_are_divided_as_their_requests_are():
    bars = shapes("classes", "cascade") + shapes("classes", "base")
    counts: dict[str, int] = {}
    for bar in bars:
        name, hits = re.match(r"(\w+): (\d+) of", bar[0].text or "").groups()  # pyright: ignore[reportOptionalMemberAccess]
        counts[name] = counts.get(name, 0) + int(hits)
    assert counts == dict.fromkeys(NAMES, N // len(NAMES))


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


def test_a_short_recording_and_a_row_of_features_are_shown_as_lines():
    rising = np.linspace(0, 1, 1024, dtype=np.float32)[None, :, None]
    counts = np.random.default_rng(0).poisson(1.0, (2, 4000)).astype(np.float32)  # a bag of words is no recording
    noise = np.random.default_rng(0).normal(size=(2, 4000)).astype(np.float32)  # nor is an embedding
    assert [draw_wall(rows, [0]).kind for rows in (rising, counts, noise)] == ["line"] * 3
    picture = decoded(draw_wall(rising, [0]).pictures[0])[..., 3]
    tops = picture.argmax(axis=0)
    assert (np.diff(tops) <= 0).all()
    assert (tops[0], tops[-1]) == pytest.approx((picture.shape[0] - 1, 0), abs=1)


def test_tokens_are_shown_as_numbers():
    tokens = np.array([[101, 7, 0, 12, 102, 0, 0], [5] * 7])
    wall = draw_wall(np.concatenate([tokens] * 50), [0, 1])
    assert wall.texts == {0: "101 7 0 12 102", 1: "5 5 5 5 5 5 5"}
    e = made_up(samples=[sample | {"row": 0} for sample in evaluation()["samples"]])
    p = Page(render(e, wall))
    assert "101 7 0 12 102" in p.text
    assert "a bundle holds no vocabulary" in p.words
    assert "img" not in p.tags
    long = draw_wall(np.ones((1, 500), np.int32), [0]).texts[0]
    assert long.endswith("… (500 in all)")
    assert len(long) < 200


def test_other_inputs_are_left_out_with_a_sentence():
    wall = draw_wall(np.zeros((4, 64), np.float32), [0, 1])
    assert not wall.pictures
    assert "neither images, recordings nor tokens" in wall.missing
    assert wall.missing in Page(render(made_up(), wall)).text


def test_scales_have_round_ticks_and_labels_keep_apart():
    assert Scale(0, 1.25, 0, 100).ticks(5) == pytest.approx([0, 0.5, 1.0])
    assert Scale(0.9, 30, 0, 100, log=True).ticks() == pytest.approx([1, 2, 5, 10, 20])
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)
    places = spread_out([10, 11, 12, 95], 8, 0, 100)
    assert all(after - before >= 8 for before, after in itertools.pairwise(places))
    assert min(places) >= 0
    assert max(places) <= 100
