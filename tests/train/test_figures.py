"""Figures of a reproduction: every number is drawn, once, at its place."""

import copy

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from tests.train.written_results import POLICIES, reproduction, texts
from train.reproduce import figures


@pytest.fixture
def result():
    return reproduction()


def test_every_policy_has_both_its_operating_points(result):
    axes = figures.front(result).axes[0]
    *policies, base = axes.lines
    assert [line.get_label() for line in policies] == list(POLICIES)
    for line, one, other in zip(policies, result["certified"]["rows"], result["accurate"]["rows"], strict=True):
        expected = [[r["mean_ms"], r["accuracy"]] for r in (one, other)]
        assert np.array_equal(line.get_xydata(), expected)
    assert np.array_equal(base.get_xydata(), [[12.0, 0.925]])


def test_only_the_plan_that_others_are_compared_with_has_our_colour(result):
    for name in ("default plan", "renamed"):
        result["certified"]["rows"][0]["policy"] = name
        lines = figures.front(result).axes[0].lines
        assert [line.get_label() for line in lines if line.get_color() == figures.OURS] == [name]


def test_bars_are_the_shares_of_requests(result):
    axes = figures.exits(result).axes[0]
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    heights = np.reshape([bar.get_height() for bar in bars], (3, 3))
    np.testing.assert_allclose(heights, [[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.9, 0.1, 0]])


def test_a_head_is_drawn_once_whatever_selects(result):
    lines = {line.get_label(): line.get_xydata() for line in figures.agreement(result).axes[0].lines}
    assert set(lines) == {"grid", "conv"}
    np.testing.assert_allclose(np.asarray(lines["grid"], float), [[1, 0.6], [2, 0.7]])


def test_every_candidate_is_a_point(result):
    drawn = figures.memory(result).axes[0].collections
    points = [tuple(point) for one in drawn for point in np.asarray(one.get_offsets())]
    expected = [(row["bytes"] / 1e6, row["hits"]) for row in result["explored"]["ranking"]]
    np.testing.assert_allclose(sorted(points), sorted(expected))


@pytest.mark.parametrize(("epsilon", "said"), [(0.02, "2 %"), (0.005, "0.5 %")])
def test_the_disagreement_is_the_one_of_the_run(result, epsilon, said):
    result["epsilon"] = epsilon
    assert f"at {said} disagreement" in figures.memory(result).axes[0].get_ylabel()
    legend = figures.exits(result).axes[0].get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert f"certified at {said}" in labels


def test_files_depend_on_the_result_alone(result, tmp_path):
    for name in ("one", "two"):
        figures.draw(copy.deepcopy(result), tmp_path / name)
    written = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert set(written) == {f"{name}.svg" for name in figures.FIGURES}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert set(POLICIES) <= texts(tmp_path / "one" / "front.svg")
    result["certified"]["rows"][1]["mean_ms"] += 1
    figures.draw(result, tmp_path / "three")
    changed = {path.name for path in (tmp_path / "three").iterdir() if path.read_bytes() != written[path.name]}
    assert changed == {"front.svg"}
