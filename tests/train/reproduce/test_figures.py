"""Figures of a reproduction: every number is drawn once, at its place."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from tests.train.reproduce.written_results import POLICIES, reproduction, texts
from train.reproduce import figures
from train.reproduce.results import Reproduction


def record(**changes) -> Reproduction:
    return Reproduction.model_validate(reproduction() | changes)


@pytest.mark.parametrize("name", ["default plan", "renamed"])
def test_every_policy_has_both_its_operating_points_and_only_the_default_plan_its_colour(name):
    changed = reproduction()["certified"]
    changed["rows"][0]["policy"] = name
    result = record(certified=changed)
    *policies, base = figures.front(result).axes[0].lines
    assert [line.get_label() for line in policies] == [name, *POLICIES[1:]]
    assert [line.get_label() for line in policies if line.get_color() == figures.OURS] == [name]
    for line, pair in zip(policies, zip(result.certified.rows, result.accurate.rows, strict=True), strict=True):
        assert np.array_equal(line.get_xydata(), [[one.mean_ms, one.accuracy] for one in pair])
    assert np.array_equal(base.get_xydata(), [[12.0, 0.925]])


def test_bars_are_the_shares_of_requests():
    axes = figures.exits(record()).axes[0]
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    heights = np.reshape([bar.get_height() for bar in bars], (3, 3))
    np.testing.assert_allclose(heights, [[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.9, 0.1, 0]])


def test_a_head_is_drawn_once_whatever_its_selectors():
    lines = {line.get_label(): line.get_xydata() for line in figures.agreement(record()).axes[0].lines}
    assert set(lines) == {"grid", "conv"}
    np.testing.assert_allclose(np.asarray(lines["grid"], float), [[1, 0.6], [2, 0.7]])


def test_every_candidate_is_a_point():
    result = record()
    drawn = figures.memory(result).axes[0].collections
    points = [tuple(point) for one in drawn for point in np.asarray(one.get_offsets())]
    expected = [(row.bytes / 1e6, row.hits) for row in result.explored.ranking]
    np.testing.assert_allclose(sorted(points), sorted(expected))


@pytest.mark.parametrize(("epsilon", "text"), [(0.02, "2 %"), (0.005, "0.5 %")])
def test_labels_give_the_epsilon_of_the_run(epsilon, text):
    result = record(epsilon=epsilon)
    assert f"at {text} disagreement" in figures.memory(result).axes[0].get_ylabel()
    legend = figures.exits(result).axes[0].get_legend()
    assert legend is not None
    assert f"certified at {text}" in [label.get_text() for label in legend.get_texts()]


def test_files_depend_on_the_result_alone(tmp_path):
    for name in ("one", "two"):
        figures.draw(record(), tmp_path / name)
    written = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert set(written) == {f"{name}.svg" for name in figures.FIGURES}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert set(POLICIES) <= texts(tmp_path / "one" / "front.svg")
    slower = reproduction()["certified"]
    slower["rows"][1]["mean_ms"] += 1
    figures.draw(record(certified=slower), tmp_path / "three")
    changed = {path.name for path in (tmp_path / "three").iterdir() if path.read_bytes() != written[path.name]}
    assert changed == {"front.svg"}
