"""What the scripts show while they work."""

import io
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from gati_jax import InputError
from gati_jax.display import terminal
from gati_jax.fitting.loop import progress_bar
from train import cli
from train.watch import Watch, watching

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
    with progress_bar(wanted=True) as bar:
        assert list(bar.track(range(0, 10, 4), description="answering")) == [0, 4, 8]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("answering" in printed.err) == terminal
    assert terminal or printed.err == ""


def test_brackets_in_names_are_printed(capsys):
    cli.show("a [bold] title", ("name",), [("[red]cache[/red]",), ("[/]",)])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("a [bold] title", "[red]cache[/red]", "[/]"))


LONG = "costs: " + "the base's times spread by 69%, where 10% are allowed, " * 5


def test_off_a_terminal_a_record_is_a_line_and_a_table_is_whole(tmp_path):
    script = tmp_path / "long.py"
    script.write_text(
        "import logging\nfrom train import cli\n"
        f"log = logging.getLogger('train.long')\ncli.run(lambda: (log.info({LONG!r}), log.warning({LONG!r}), "
        "cli.show('Table', ('name', 'value'), [('x' * 150, 1.0)])))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    lines = [line for line in done.stderr.splitlines() if "still at it" not in line]
    assert [line.split(" ", 3)[2:] for line in lines] == [["INFO", LONG], ["WARNING", LONG]]
    assert "x" * 150 in done.stdout
    assert done.stdout.isascii()  # no frame


def record(text: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("train", level, "", 0, text, (), None)


def test_in_a_pipe_silence_is_broken_every_thirty_seconds(capsys):
    now = [0.0]
    watch = Watch(clock=lambda: now[0])
    watch.emit(record("training: compiling"))
    spoken = []
    for now[0] in range(1, 100):
        watch.speak()
        if text := capsys.readouterr().err:
            spoken.append((now[0], text.split("INFO ")[1].strip()))
    assert spoken == [(s, f"still at it, {s} s: training: compiling") for s in (30, 60, 90)]
    now[0] = 110
    watch.emit(record("beware", logging.WARNING))  # a line, but not what is being done
    now[0] = 139
    watch.speak()
    assert capsys.readouterr().err == ""
    now[0] = 140
    watch.speak()
    assert "still at it, 140 s: training: compiling" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def _new_terminal():
    """A console that asks anew what standard error is."""
    terminal.cache_clear()
    yield
    terminal.cache_clear()


@pytest.mark.usefixtures("_new_terminal")
def test_on_a_terminal_a_line_moves_until_results_are_printed(monkeypatch):
    shown, printed = Terminal(), Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr("sys.stdout", printed)
    monkeypatch.setenv("TERM", "xterm")
    with watching() as watch:
        watch.emit(record("certify: [bold] step 3 of 7"))
        _until(lambda: len(re.findall(r"\d s  certify: \[bold\] step 3 of 7", shown.getvalue())) >= 3)
        with progress_bar(wanted=True) as bar:
            bar.add_task("measuring", total=7)
            _until(lambda: "0/7" in shown.getvalue())
        print("the result")  # noqa: T201
        before = shown.getvalue()
        assert not re.search(r"certify.{0,20}$", before[-60:])  # erased before anything is printed
    assert printed.getvalue() == "the result\n"
    assert sys.stdout is printed


def _until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within 30 s")
