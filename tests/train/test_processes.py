"""The scripts as processes: help, exit codes, kills. Run as a script, this file is the victim of the kill test."""

import logging
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.train.one_pass import DIGITS, ROOT, SMALLEST, small_and_repeatable
from train import base


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False, timeout=300
    )


@pytest.mark.parametrize("script", ["base", "caches", "evaluate"])
def test_help_shows_an_example(script):
    result = start("-m", f"train.{script}", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"python -m train.{script} --" in result.stdout.split("example:")[1]


def test_bad_input_ends_a_process_with_code_2_and_one_line(tmp_path):
    result = start("-m", "train.base", *DIGITS, "--out", str(tmp_path), "--fit.epoch", "3")
    expected = "error: config: unknown key fit.epoch; did you mean fit.epochs?\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected)


RESUMED = [
    *DIGITS, "--data.base_trained_on", '["all[:192]"]', "--data.splits.test", "all[1497:1527]",
    "--base.training.epochs", "3", "--base.training.checkpoint_seconds", "0", "--base.training.average", "0.9",
    "--base.training.cutout", "2",
]  # fmt: skip


def victim(arguments: list[str]) -> None:
    """Train a base with a checkpoint behind every epoch, and die behind the second of three, which is not saved."""
    report = base.report

    def mortal(*given: Any) -> None:
        report(*given)
        if given[-1].epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.config.architecture", lambda *_, **__: SMALLEST)
        patch.setattr(base, "report", mortal)
        base.main(arguments)


def test_a_killed_base_resumes_to_the_same_bits(tmp_path, caplog):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    result = start("-m", "tests.train.test_processes", *RESUMED, "--out", str(killed))
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (killed / "base.safetensors").exists()
    with caplog.at_level(logging.INFO, logger="gati_jax.fitting.loop"), small_and_repeatable(SMALLEST):
        base.main([*RESUMED, "--out", str(killed)])
        base.main([*RESUMED, "--out", str(whole)])
    assert "resumed at step 3 of 9" in caplog.text
    one, other = (load_file(folder / "base.safetensors") for folder in (killed, whole))
    assert one.keys() == other.keys()
    assert [name for name in one if one[name].tobytes() != other[name].tobytes()] == []
    assert not (killed / "checkpoints").exists()


if __name__ == "__main__":
    victim(sys.argv[1:])
