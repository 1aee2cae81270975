"""Bulk scoring: what it writes is what evaluate and infer_batch say, once for every row, however often it is killed."""

import json

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from scipy.special import softmax

import gati_jax
from gati_jax import InputError, data
from tests.train.one_pass import TESTED, json_of
from train import score

ALL = ["--data.name", "digits", "--data.split", "all", "--rows", "250", "--ledger", "none"]


def scores(run, out, *options):
    return json_of(score.main, "--bundle", str(run.folder / "caches" / "bundle"), "--out", str(out), *options)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """All digits, scored without an interruption."""
    out = tmp_path_factory.mktemp("whole")
    return out, scores(run, out, *ALL)


def test_the_test_split_has_evaluate_s_numbers(run, tmp_path):
    found = scores(run, tmp_path, "--ledger", "none")
    evaluated = run.evaluation
    assert (found["n"], found["split"]) == (TESTED, evaluated["split"])
    assert found["accuracy"] == evaluated["cascade"]["accuracy"]
    hits = {str(e["exit"]): e["hits"] for e in evaluated["exits"] if e["hits"]}
    assert found["exits"] == hits
    assert json.loads((tmp_path / "score.json").read_text()) == found


def test_rows_are_those_of_infer_batch(run, whole):
    out, found = whole
    assert (found["n"], found["parts"]) == (1797, 8)
    table = ds.dataset(out, format="parquet", exclude_invalid_files=True).to_table().sort_by("id").to_pydict()
    assert table["id"] == list(range(1797))
    split = data.load("digits", "all")
    assert split.ids is not None
    assert split.labels is not None
    rows = slice(250, 500)
    expected = gati_jax.infer_batch(run.bundle, split.images[rows])
    at = [table["id"].index(row) for row in split.ids[rows]]
    for name, value in (("class", expected.class_index), ("exit", expected.exit), ("label", split.labels[rows])):
        assert [table[name][i] for i in at] == np.asarray(value).tolist()
    got = np.array([table["probabilities"][i] for i in at])
    np.testing.assert_allclose(got, softmax(np.asarray(expected.logits, np.float64), axis=1), rtol=1e-5, atol=1e-7)
    by_base = np.asarray(expected.exit) == len(run.bundle.chain)
    assert [table["score"][i] is None for i in at] == by_base.tolist()


def test_a_run_that_is_killed_three_times_scores_every_row_once(run, whole, tmp_path, monkeypatch):
    answer, calls = gati_jax.infer_batch, []

    def killed(bundle, images, **options):
        calls.append(len(images))
        if len(calls) in {3, 5, 8}:
            raise KeyboardInterrupt
        return answer(bundle, images, **options)

    monkeypatch.setattr(gati_jax, "infer_batch", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            scores(run, tmp_path, *ALL)
        (tmp_path / ".part-00003-of-00008.parquet.abc").write_bytes(b"half")
    again = scores(run, tmp_path, *ALL)
    assert sum(calls) - 3 * 250 == 1797
    assert not list(tmp_path.glob(".part-*"))
    changing = {"seconds", "rows_per_second"}
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in whole[1].items() if k not in changing
    }
    for file in sorted(whole[0].glob("part-*")):
        assert pq.read_table(tmp_path / file.name).equals(pq.read_table(file))
    calls[:] = [0] * 10
    assert scores(run, tmp_path, *ALL)["rows_per_second"] is None  # nothing was left
    assert len(calls) == 10


def test_top_keeps_the_likeliest_classes(run, tmp_path):
    scores(run, tmp_path, "--ledger", "none", "--top", "2")
    (file,) = tmp_path.glob("part-*")
    table = pq.read_table(file).to_pydict()
    assert [row[0] for row in table["top_classes"]] == table["class"]
    assert all(len(row) == 2 and row[0] >= row[1] for row in table["probabilities"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*ALL, "--top", "1"], "--out: expected parts of the same bundle, data and options, got others in"),
        ([*ALL[:-3], "500", "--ledger", "none"], "--out: expected the parts of this scoring, or none, got"),
        (["--data.name", "npz"], "data.dir: expected the folder or file of npz, got none"),
        (["--data.splitt", "all"], "unknown key data.splitt; did you mean data.split"),
    ],
    ids=["another option", "other parts", "no folder", "a typo"],
)
def test_what_does_not_belong_together_is_refused(run, whole, options, message):
    with pytest.raises(InputError, match=message):
        scores(run, whole[0], *options)


def test_a_picture_s_id_is_its_path(run, tmp_path):
    from PIL import Image  # noqa: PLC0415 (optional)

    (tmp_path / "photos").mkdir()
    for i, image in enumerate(data.load("digits", "all[:3]").images):
        Image.fromarray(image[..., 0] * 15).save(tmp_path / "photos" / f"{i}.png")
    source = ["--data.name", "folder", "--data.dir", str(tmp_path / "photos"), "--data.split", "all"]
    found = scores(run, tmp_path / "out", *source, "--data.channels", "1", "--ledger", "none")
    assert found["accuracy"] is None
    table = pq.read_table(tmp_path / "out" / "part-00000-of-00001.parquet")
    assert sorted(table["id"].to_pylist()) == [str(tmp_path / "photos" / f"{i}.png") for i in range(3)]
