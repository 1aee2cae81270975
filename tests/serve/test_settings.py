"""The command line and the logs."""

import json
import logging
from pathlib import Path

import pytest

from gati_jax import InputError
from serve import logs
from serve.settings import Settings, parse, table

BUNDLE = ["--bundle", "b"]


def test_by_default_only_this_machine_can_connect():
    settings = parse(BUNDLE, {})
    assert settings == Settings(bundle=Path("b"))
    assert (settings.host, settings.loopback, settings.token) == ("127.0.0.1", True, None)
    assert not Settings(bundle=Path("b"), host="0.0.0.0").loopback


def test_only_the_environment_has_the_token_and_no_text_shows_it():
    settings = parse(BUNDLE, {"GATI_TOKEN": "s3cret"})
    assert settings.token == "s3cret"
    assert "s3cret" not in repr(settings)


def test_words_become_values():
    words = "--http-port 80 --timeout 1.5 --log-level debug --tls-key k --overlap --json --adapt --adapt-epsilon 0.02"
    with pytest.raises(InputError, match="--tls-cert: expected together with --tls-key"):
        parse([*BUNDLE, *words.split()], {})
    settings = parse([*BUNDLE, *words.replace("--tls-key k", "--adapt-dir d").split()], {})
    assert (settings.http_port, settings.timeout, settings.log_level) == (80, 1.5, "debug")
    assert (settings.overlap, settings.json_output, settings.reference) == (True, True, False)
    assert (settings.adapt_epsilon, settings.versions) == (0.02, Path("d"))
    assert parse([*BUNDLE, "--adapt"], {}).versions == Path("b-adapt").absolute()


def test_layers_are_also_known_by_their_former_names():
    words = [*BUNDLE, "--adapt", "--adapt-without"]
    assert parse([*words, "nearest", "exact", "refit"], {}).adapt_without == ("nearest", "exact", "refit")
    assert parse([*words, "points", "repeats"], {}).adapt_without == ("nearest", "exact")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "arguments: the following arguments are required: --bundle"),
        ([*BUNDLE, "--http-port", "65536"], "--http-port: expected a whole number from 0 to 65535, got 65536"),
        ([*BUNDLE, "--http-port", "-1"], "--http-port: expected a whole number from 0 to 65535, got -1"),
        ([*BUNDLE, "--http-port", "http"], "--http-port: expected a whole number from 0 to 65535, got http"),
        ([*BUNDLE, "--grpc-port", "9" * 5000], "--grpc-port: expected a whole number"),
        ([*BUNDLE, "--http-port", "9000", "--grpc-port", "9000"], "--grpc-port: expected another port"),
        ([*BUNDLE, "--max-body", "1000"], "--max-body: expected a whole number from 1024 to 2147483647, got 1000"),
        ([*BUNDLE, "--capacity", "0"], "--capacity: expected a whole number from 1 to 65536, got 0"),
        ([*BUNDLE, "--timeout", "nan"], "--timeout: expected a number from 0 to 86400, got nan"),
        ([*BUNDLE, "--drain", "-1"], "--drain: expected a number from 0 to 86400, got -1"),
        (
            [*BUNDLE, "--name", "stats"],
            "--name: expected letters, digits, dots, dashes and underscores, and not",
        ),
        ([*BUNDLE, "--name", "a/b"], "--name: expected letters"),
        ([*BUNDLE, "--log-level", "loud"], "--log-level: expected one of debug, info, warning, error, got loud"),
        ([*BUNDLE, "--tls-cert", "c.pem"], "--tls-cert: expected together with --tls-key"),
        ([*BUNDLE, "--tls-cert", "no.pem", "--tls-key", "no.pem"], "--tls-cert: expected a certificate"),
        ([*BUNDLE, "--adapt-share", "0.2"], "--adapt-share: expected together with --adapt, got it alone"),
        ([*BUNDLE, "--adapt", "--adapt-share", "1"], "--adapt-share: expected a number between 0 and 1, got 1"),
        (
            [*BUNDLE, "--adapt", "--adapt-without", "all"],
            "--adapt-without: expected some of nearest, exact, refit",
        ),
        ([*BUNDLE, "--token", "x"], "arguments: unrecognized arguments: --token x"),
    ],
)
def test_a_bad_command_line_is_one_sentence(words, message):
    with pytest.raises(InputError) as caught:
        parse(words, {})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", ["", " ", "two words", "ümlaut", "line\n"])
def test_a_token_that_no_header_can_carry_is_refused(token):
    with pytest.raises(InputError, match="GATI_TOKEN") as caught:
        parse(BUNDLE, {"GATI_TOKEN": token})
    assert "got something else" in str(caught.value)


def test_help_and_the_table_have_every_option(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"], {})
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "python -m serve --bundle runs/digits/caches/bundle" in text
    assert "(default: 8000)" in text
    assert "None" not in text
    rows = table().splitlines()[2:]
    assert "| `--http-port` | 8000 | 0 takes a free one |" in rows
    assert len(rows) == len(Settings.model_fields) - 1  # all but the token
    assert all(row.split("`")[1] in text for row in rows)


def test_logs_are_json_with_the_id_of_the_request():
    record = logging.makeLogRecord({"name": "serve", "levelname": "INFO", "msg": "a %s", "args": ("b",), "ms": 3})
    token = logs.request_id.set("me")
    try:
        line = json.loads(logs.JsonFormatter().format(record))
    finally:
        logs.request_id.reset(token)
    assert (line["message"], line["request_id"], line["ms"], line["level"]) == ("a b", "me", 3, "info")
    record.exc_info = (ValueError, ValueError("why"), None)
    text = logs.JsonFormatter().format(record)
    assert "\n" not in text
    assert "why" in json.loads(text)["exception"]
