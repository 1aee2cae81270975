"""The calculations of training benchmarks, and the tables of a GPU run, by hand."""

import contextlib
import json

import pytest

from benchmarks import trained, training
from gati_jax import InputError


class Fake:
    """Is ready at once; its turns then take these seconds, one after another."""

    def __init__(self, *seconds: float) -> None:
        self.answers = ["ready", *seconds]

    def ask(self, line: str = "") -> object:
        del line
        return self.answers.pop(0)


def test_ratios_are_ours_over_theirs_round_by_round(monkeypatch):
    # The first turn of each is not counted: ours 1 s a turn, theirs 2, 4 and 3.
    fakes = {"gati-jax": Fake(9.0, 1.0, 1.0, 1.0), "torch eager": Fake(0.1, 2.0, 4.0, 3.0)}
    monkeypatch.setattr(training, "worker", lambda name, *_, **__: contextlib.nullcontext(fakes[name]))
    monkeypatch.setattr(training, "PAUSE_SECONDS", 0.0)
    arguments = training.parser().parse_args(["--batch", "10", "--steps", "6", "--rounds", "3"])
    ours, theirs = training.compare(arguments)["rows"]
    assert (ours["images_per_second"], theirs["images_per_second"]) == (60.0, 20.0)
    assert theirs["ratio"] == 3.0
    assert theirs["spread"] == pytest.approx(1 / 3)  # quartiles of 2, 3, 4: 2.5 and 3.5
    assert "ratio" not in ours


def test_a_contender_that_does_not_start_ends_the_run(monkeypatch):
    silent = Fake()
    silent.answers = [None]
    monkeypatch.setattr(silent, "last_words", lambda: "no torch here", raising=False)
    monkeypatch.setattr(training, "worker", lambda *_, **__: contextlib.nullcontext(silent))
    with pytest.raises(SystemExit, match="gati-jax did not start: no torch here"):
        training.compare(training.parser().parse_args([]))


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_tables_hold_what_was_run_and_dashes_for_the_rest(tmp_path, capsys):
    one, two = tmp_path / "cifar10_resnet50", tmp_path / "cifar10_vgg16"
    write(one, "base/base.json", {"accuracy": 0.95, "images_per_second": 1234.5, "train_seconds": 90.0})
    write(one, "eval/evaluation.json", {
        "certificate": {"holds": True, "epsilon": 0.01}, "cascade": {"agreement": 0.995},
        "cost": {"ideal_speedup": 2.5},
    })  # fmt: skip
    write(one, "reproduce/reproduction.json", {
        "base": {"accuracy": 0.95}, "accurate": {"rows": [{"accuracy": 0.9215}]},
        "measured": {"accurate": {"speedup": 1.8, "ideal": 2.0, "spread": 0.05}},
    })  # fmt: skip
    write(two, "base/base.json", {"accuracy": 0.93, "accuracy_with_flips": 0.935})
    trained.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| cifar10_resnet50 | 95.00% | - | 1234 | 90 | 1.00% | 99.50% | 2.50 |"
    assert lines[3] == "| cifar10_vgg16 | 93.00% | 93.50% | - | - | - | - | - |"
    assert lines[-1] == "| cifar10_resnet50 | 1.63 | 1.80 | 5% | 2.00 | 0.90 | 97.00% |"


def test_a_folder_without_bases_is_refused(tmp_path):
    with pytest.raises(InputError, match="folder: expected trained bases"):
        trained.main([str(tmp_path)])
