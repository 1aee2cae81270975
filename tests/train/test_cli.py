"""What the scripts show while they work."""

import pytest

from train import cli


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
