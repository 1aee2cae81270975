"""train.adapt from the command line, on the digits."""

import json

import numpy as np
import pytest

from gati_jax import InputError, Ledger, data
from gati_jax.adaptation import Trace, load_trace, save_trace
from gati_jax.bundle import Versions
from tests.train.one_pass import json_of
from train import adapt
from train.results import Adaptation, MechanismsResult


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Digits that the bundle has not seen, each asked for several times; then inverted ones."""
    images = np.asarray(data.load("digits", "all[1497:1577]").images)
    n = len(images)
    item = np.concatenate([np.tile(np.arange(n), 5), np.arange(n, 2 * n)])
    path = tmp_path_factory.mktemp("trace") / "digits.safetensors"
    made = Trace(
        item=item.astype(np.int32),
        seconds=np.arange(len(item)) / 10.0,
        images=np.concatenate([images, (16 - images).astype(np.uint8)]),
        phase=np.repeat([0, 1], [5 * n, n]).astype(np.int16),
        phases=("quiet", "inverted"),
    )
    save_trace(path, made)
    return path


def test_every_mechanism_is_a_row_and_the_windows_add_up(run, trace, tmp_path, capsys):
    ledger = tmp_path / "looks.json"
    arguments = [
        "--ledger",
        str(ledger),
        "--bundle",
        str(run.folder / "caches" / "bundle"),
        "--trace",
        str(trace),
        "--out",
        str(tmp_path),
    ]
    result = json_of(adapt.main, *arguments)
    written = tmp_path / "adaptation.json"
    assert result == json.loads(written.read_text()) == Adaptation.read(written).as_json()
    assert [row["name"] for row in result["mechanisms"]] == [
        "static caches behind the first block",
        "+ site 0",
        "+ monitor and trials",
        "+ nearest cache",
        "+ refitted heads",
        "+ exact cache",
    ]
    shown = load_trace(trace).images
    assert shown is not None
    assert not len(Ledger(ledger).still_open(data.row_digests(shown)))  # what was shown is closed
    n = result["trace"]["n"]
    assert sum(count for window in result["windows"] for count in window["exits"].values()) == n == 480
    assert sum(phase["n"] for phase in result["phases"]) == n
    last = result["mechanisms"][-1]
    assert sum(window["exits"].get("exact", 0) for window in result["windows"]) > 0  # computation holds measured times
    overall = sum(p["n"] * p["disagreement"] for p in result["phases"]) / n
    assert last["disagreement"] == pytest.approx(overall)
    assert all(text in (tmp_path / "adaptation.svg").read_text() for text in ("promised", "exact"))
    assert Versions(tmp_path / "versions").history == () or last["swaps"]
    adapt.main([*arguments, "--one", "--without", "exact"])
    said = capsys.readouterr().out
    assert "everything" in said
    assert "inverted" in said


def test_a_result_in_the_old_words_is_read():
    same = {"name": "all", "computation": 2.0, "disagreement": 0.0, "worst_window": 0.0, "shadow_share": 0.1,
            "full_ms": 3.0, "alarms": 0, "swaps": 1}  # fmt: skip
    read = MechanismsResult.model_validate(same | {"front_ms": 0.5, "with_background": 1.5, "background_seconds": 4.0})
    assert (read.controller_ms, read.with_recovery, read.recovery_seconds) == (0.5, 1.5, 4.0)


def test_a_trace_that_names_rows_alone_is_refused(run, tmp_path):
    path = tmp_path / "rows.safetensors"
    save_trace(path, Trace(item=np.zeros(3, np.int32), seconds=np.zeros(3)))
    with pytest.raises(InputError, match="--trace: expected images"):
        adapt.main(["--bundle", str(run.folder / "caches" / "bundle"), "--trace", str(path), "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("bad", "message"),
    [(["--share", "0"], "argument --share: expected a number above 0"), (["--epsilon", "x"], "argument --epsilon")],
)
def test_bad_words_are_refused(bad, message):
    with pytest.raises(InputError, match=message):
        adapt.main(["--bundle", "b", "--trace", "t", "--out", "o", *bad])
