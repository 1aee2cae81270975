"""What the scripts show while they work."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from gati_jax import InputError
from train import cli

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "train": ["train.base", "--config", str(ROOT / "configs/digits.toml"), "--out"],
    "serve": [
        *("serve", "--http-port", "0", "--grpc-port", "0", "--admin-port", "0"),
        *("--bundle", str(ROOT / "tests/fixtures/v1/bundle"), "--drain"),
    ],
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU here")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_platform_that_is_not_here_is_one_line(tmp_path, command):
    last = str(tmp_path / "out") if command == "train" else "1"
    done = subprocess.run(
        [sys.executable, "-m", *COMMANDS[command], last],
        env=os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "JAX_PLATFORMS: expected a device that is here, got cuda" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("cause", [RuntimeError("no backend"), AssertionError(), ValueError("another")])
def test_a_network_of_the_user_s_own_that_finds_no_device_says_so(capsys, monkeypatch, cause):
    def main():
        raise InputError("--chain: mine:network failed") from cause

    for name in ("basicConfig", "captureWarnings"):
        monkeypatch.setattr(cli.logging, name, lambda **_: None)
    monkeypatch.setattr(cli, "missing_device", lambda: "JAX_PLATFORMS: expected a device that is here")
    with pytest.raises(SystemExit, match="2"):
        cli.run(main)
    reason = "--chain: mine:network failed" if isinstance(cause, ValueError) else "JAX_PLATFORMS: expected a device"
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {reason}")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_is_drawn_on_a_terminal_only(capsys, monkeypatch, terminal):
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    assert list(cli.track(range(0, 10, 4), "answering")) == [0, 4, 8]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("answering" in printed.err) == terminal
    assert terminal or printed.err == ""


def test_brackets_in_names_are_printed(capsys):
    cli.show("a [bold] title", ("name",), [("[red]cache[/red]",), ("[/]",)])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("a [bold] title", "[red]cache[/red]", "[/]"))
