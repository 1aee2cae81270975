"""The benchmark's calculations by hand, and one contender in its own process."""

import json
from typing import Any

import numpy as np
import pytest

import gati_jax
from benchmarks import compare, front, table
from benchmarks.compare import report, time_batches, worker
from benchmarks.contenders import CONTENDERS
from gati_jax import data


class Fake:
    """Takes ``factor`` milliseconds for an image; keeps the commands."""

    def __init__(self, factor: float) -> None:
        self.factor, self.asked = factor, []

    def ask(self, line: str = "") -> list[float]:
        self.asked.append(line)
        _, _, size, calls = line.split()
        return [self.factor * int(size)] * int(calls)


def test_contenders_take_turns_on_the_same_images():
    one, other = Fake(1.0), Fake(3.0)
    times = time_batches({"one": one, "other": other}, 4, 3)  # pyright: ignore[reportArgumentType] (a fake)
    assert one.asked == other.asked
    assert one.asked[-3:] == ["time 0 4 16", "time 64 4 16", "time 128 4 16"]  # other images every time
    np.testing.assert_array_equal(times["other"], np.full((3, 16), 12.0))


def test_ratios_are_to_the_first_and_agreement_is_with_the_reference():
    rounds = {"ours": [[1.0], [2.0], [3.0]], "jax.jit full": [[2.0], [2.0], [3.0]],
              "gati-jax cascade": [[0.5, 1.5], [0.0, 2.0], [1.0, 1.0]]}  # fmt: skip
    classes = ([1, 1, 0, 0], 10.0)
    answers = {"ours": classes, "jax.jit full": ([1, 1, 1, 0], 20.0), "gati-jax cascade": classes}
    times = {name: {2: np.array(ms)} for name, ms in rounds.items()}
    ours, full, cascade = report(times, answers, np.array([1, 0, 0, 0, 9]), "resnet20", {2: 4.0})["rows"]
    assert (cascade["ideal"], cascade["conversion"]) == (4.0, 0.5)  # twice as fast as the full network
    assert "conversion" not in ours
    assert (ours["accuracy"], ours["agreement"], ours["peak_mib"]) == (0.75, 0.75, 10.0)
    assert (full["accuracy"], full["agreement"], full["ratio"]) == (0.5, 1.0, 1.0)
    assert (full["p50_ms"], full["images_per_second"]) == (2.0, 1000.0)
    assert (cascade["mean_ms"], cascade["p50_ms"]) == (1.0, 1.0)
    assert (ours["spread"], full["spread"]) == (0.0, pytest.approx(0.5))  # ratios 2, 1, 1: quartiles 1 and 1.5


@pytest.mark.parametrize("item", ["foo", "=weights", "resnet20="])
def test_a_smaller_network_needs_weights(item):
    with pytest.raises(gati_jax.InputError, match=f"--smaller: expected NETWORK=WEIGHTS, .* got '{item}'"):
        compare.parser().parse_args(["--bundle", "b", "--smaller", item])
    given = compare.parser().parse_args(["--bundle", "b", "--smaller", "resnet20=a=b"])
    assert given.smaller == [("resnet20", "a=b")]


def test_help_names_the_contenders_and_the_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")  # nothing is broken at a hyphen
    text = " ".join(compare.parser().format_help().split())
    assert all(name in text for name in CONTENDERS)
    with pytest.raises(SystemExit):
        front.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m benchmarks.front ")


def test_every_cell_that_is_shown_has_its_heading(monkeypatch):
    shown = []
    monkeypatch.setattr(compare.cli, "show", lambda _, columns, rows: shown.append((columns, list(rows))))
    times = {name: {2: np.array([[ms]])} for name, ms in (("gati-jax cascade", 1.0), ("jax.jit full", 4.0))}
    result = report(times, dict.fromkeys(times, ([1, 1], 10.0)), np.array([1, 0]), "resnet20", {2: 8.0})
    compare.show(result)
    ((columns, (ours, full)),) = shown
    assert len(columns) == len(ours) == len(full)
    cells = dict(zip(columns, ours, strict=True))
    assert (cells["mean ms"], cells["agreement"], cells["conversion"], cells["peak MiB"]) == (
        "1.00", "100.00%", "0.50", "10",
    )  # fmt: skip
    assert dict(zip(columns, full, strict=True))["conversion"] == ""


def test_a_contender_in_its_own_process_answers_as_the_library(run):
    path, rows = run.folder / "caches" / "bundle", 20
    with worker("gati-jax cascade", str(path), "resnet20", "unused", str(rows)) as one:
        assert one.ask() == "ready"
        assert [ms > 0 for ms in one.ask("time 0 3 2")] == [True, True]
        classes, peak = one.ask("answers")
    config = run.bundle.provenance.config["data"]
    images = data.load(config["name"], config["splits"]["test"]).images[:rows]
    assert classes == np.asarray(gati_jax.infer_batch(run.bundle, images).class_index).tolist()
    assert peak > 1


def test_a_contender_that_cannot_start_answers_null(run):
    with worker("gati-jax cascade", str(run.folder / "nothing"), "resnet20", "unused", "5") as one:
        assert one.ask() is None


def test_a_result_can_be_written_out_and_drawn(tmp_path):
    rounds = {"gati-jax cascade": [1.0, 1.0, 2.0], "onnxruntime full": [4.0, 5.0, 4.0]}
    times = {name: {2: np.array([ms]).T} for name, ms in rounds.items()}
    answers = dict.fromkeys(times, ([1, 1], 10.0))
    result: dict[str, Any] = report(times, answers, np.array([1, 0]), "resnet20", {}) | {"images": 2}
    head, _, ours, _ = table.table(result["rows"])
    assert head == "| contender | batch 2 | accuracy | agreement | peak MiB |"
    # Ratios 0.25, 0.2 and 0.5: the quartiles lie half way to the outer two.
    assert ours == "| gati-jax cascade | 1.0 ms (0.25 +- 60%) | 50.0% | 100.0% | 10 |"
    older = [{key: value for key, value in row.items() if key != "round_ms"} for row in result["rows"]]
    assert table.table(older)[2] == "| gati-jax cascade | 1.0 ms (0.25) | 50.0% | 100.0% | 10 |"
    (tmp_path / "result.json").write_text(json.dumps(result))
    front.main([str(tmp_path / "result.json"), "--out", str(tmp_path / "figure.svg")])
    assert "gati-jax cascade" in (tmp_path / "figure.svg").read_text()
