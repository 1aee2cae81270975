"""Lines of the log: what they say, how many are written, and readers that stall."""

import json
import logging
import threading

import pytest

from serve import logs

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Reader:
    """Takes lines, unless it stalls or is gone."""

    def __init__(self):
        self.lines, self.entered, self.reads, self.gone = [], threading.Event(), threading.Event(), False
        self.reads.set()

    def write(self, data: bytes):
        self.entered.set()
        assert self.reads.wait(30)
        if self.gone:
            raise BrokenPipeError
        self.lines += data.decode().splitlines()


def record(level=logging.WARNING, name="uvicorn.error", line=1, **extra):
    return logging.makeLogRecord(
        {"name": name, "levelno": level, "levelname": logging.getLevelName(level), "pathname": "a.py", "lineno": line}
        | {"msg": "m"}
        | extra
    )


def formatted(**extra):
    return json.loads(logs.JsonFormatter().format(record(**extra)))


# Readers


def test_a_reader_that_stalls_keeps_nobody_and_what_was_dropped_is_counted_and_reported():
    reader = Reader()
    reader.reads.clear()
    writer = logs.Writer(reader.write, most_bytes=100)
    writer.put("first")
    assert reader.entered.wait(30)  # the thread is in a write that does not return
    for i in range(1000):
        writer.put(f"{i:09}")  # ten bytes with its end
    assert writer.dropped == 990
    assert not writer.flush(0.01)
    reader.reads.set()
    assert writer.flush(30)
    reports = [line for line in reader.lines if "dropped" in line]
    assert [json.loads(line)["dropped"] for line in reports] == [990]
    assert [line for line in reader.lines if line not in reports] == ["first", *(f"{i:09}" for i in range(10))]
    writer.put("later")
    assert writer.flush(30)
    assert reader.lines[-1] == "later"  # reported once


def test_lines_without_a_reader_are_counted_and_the_next_reader_gets_the_next_ones():
    reader = Reader()
    reader.gone = True
    writer = logs.Writer(reader.write)
    writer.put("lost")
    assert writer.flush(30)
    assert writer.dropped == 1
    reader.gone = False
    writer.put("kept")
    assert writer.flush(30)
    assert (reader.lines[0], json.loads(reader.lines[1])["dropped"]) == ("kept", 1)


def test_a_line_longer_than_the_queue_is_dropped_and_no_other():
    reader = Reader()
    writer = logs.Writer(reader.write, most_bytes=100)
    writer.put("x" * 1000)
    writer.put("short")
    assert writer.flush(30)
    assert (reader.lines[0], writer.dropped) == ("short", 1)


# Repeats


def test_repeated_warnings_are_left_out_and_counted():
    now = 0.0
    repeats = logs.Repeats(lambda: now)
    passed = [one for one in (record() for _ in range(100)) if repeats.filter(one)]
    assert len(passed) == 20
    assert "left out" in vars(passed[-1])["note"]
    assert repeats.left_out == 80
    assert repeats.filter(record(line=2))  # another place in the code
    now = 10.0
    after = record()
    assert repeats.filter(after)
    assert vars(after)["left_out"] == 80
    again = record()
    assert repeats.filter(again)
    assert "left_out" not in vars(again)


@pytest.mark.parametrize(
    ("level", "name"), [(logging.ERROR, "serve.http"), (logging.INFO, "serve.access"), (logging.DEBUG, "serve")]
)
def test_a_line_about_one_request_always_passes(level, name):
    repeats = logs.Repeats()
    assert all(repeats.filter(record(level, name)) for _ in range(100))
    assert repeats.left_out == 0


def test_a_warning_from_within_the_filter_does_not_wait_for_itself():
    class Path(str):
        """Warns when it is hashed, as garbage may that is collected then."""

        def __hash__(self):
            repeats.filter(record(line=2))
            return super().__hash__()

    repeats, one = logs.Repeats(), record()
    one.pathname = Path("x")
    filtering = threading.Thread(target=repeats.filter, args=(one,), daemon=True)
    filtering.start()
    filtering.join(10)
    assert not filtering.is_alive()


def test_places_are_forgotten_before_they_fill_the_memory():
    repeats = logs.Repeats()
    for line in range(10_000):
        assert repeats.filter(record(line=line))
    assert len(repeats._seen) <= 1000


# Lines


def test_a_trace_and_an_id_are_in_the_lines_of_their_request_only():
    def request():
        assert logs.begin("me", f"00-{TRACE}-{SPAN}-01") == "me"
        return formatted()

    lines = []
    for target in (request, formatted):  # threads start without the context of others
        thread = threading.Thread(target=lambda work=target: lines.append(work()))
        thread.start()
        thread.join(30)
    assert [(line.get("request_id"), line.get("trace_id"), line.get("span_id")) for line in lines] == [
        ("me", TRACE, SPAN),
        (None, None, None),
    ]


@pytest.mark.parametrize(
    ("traceparent", "known"),
    [
        (f"00-{TRACE}-{SPAN}-00", True),
        (f"01-{TRACE}-{SPAN}-01-more", True),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        (f"00-{TRACE}-{SPAN}", False),
        (f"01-{TRACE}-{SPAN}-01-" + "x" * 1000, False),
        ("\n", False),
        ("", False),
        (None, False),
    ],
)
def test_a_trace_is_taken_as_the_standard_has_it_or_not_at_all(traceparent, known):
    lines = []

    def request():
        logs.begin(None, traceparent)
        lines.append(formatted())

    thread = threading.Thread(target=request)
    thread.start()
    thread.join(30)
    assert (lines[0].get("trace_id") == TRACE) == known
    assert len(lines[0]["request_id"]) == 32


def test_every_line_is_json_and_of_bounded_length():
    assert formatted(ms=float("inf"))["ms"] == "inf"
    assert formatted(msg="a\nb\ud800\x00")["message"] == "a\nb\ud800\x00"
    assert len(json.dumps(formatted(msg="x" * 10**6))) < 20_000
    line = formatted(exc_info=(ValueError, ValueError("x" * 10**6 + "the end"), None))
    assert len(line["exception"]) <= 16_000
    assert line["exception"].endswith("the end")
