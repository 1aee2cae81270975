"""Groups of rows from every source that can have them: no split divides one."""

import itertools

import numpy as np
import pytest

from gati_jax import data
from gati_jax.errors import InputError

N = 60
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 4, 4, 1), np.uint8)
LABELS = np.arange(N)
SIZES = [1, 2, 3, 4, 5, 10, 15, 20]
NUMBERS = np.repeat(np.arange(len(SIZES)), SIZES)
NAMES = np.array([f"recording {number}" for number in NUMBERS])
PARTS = ["all[:40%]", "all[40%:55%]", "all[55%:]"]


def returned(labels: np.ndarray | None = LABELS, groups=NUMBERS):
    return lambda: (PIXELS, labels, groups)


def loaded(source, part, tmp_path, groups):
    if source == "function":
        return data.load_function(returned(groups=groups), part)
    if source == "npz":
        np.savez(tmp_path / "x.npz", images=PIXELS, labels=LABELS, groups=groups)
        return data.load("npz", part, tmp_path / "x.npz")
    if source == "compressed":
        np.savez_compressed(tmp_path / "x.npz", images=PIXELS, labels=LABELS, groups=groups)
        return data.load("npz", part, tmp_path / "x.npz", memory_mb=0)
    if source == "csv":
        image = pytest.importorskip("PIL.Image", reason="needs the extra train")
        for i, pixels in enumerate(PIXELS):
            image.fromarray(pixels[..., 0]).save(tmp_path / f"{i}.png")
        rows = [f"{i}.png,{i},{group}" for i, group in enumerate(groups)]
        (tmp_path / "x.csv").write_text("\n".join(["path,label,speaker", *rows]))
        return data.load("folder", part, tmp_path / "x.csv", channels=1, group_column="speaker")
    library = pytest.importorskip("datasets", reason="needs the extra huggingface")
    rows = {"image": PIXELS.tolist(), "label": LABELS.tolist(), "speaker": groups.tolist()}
    form = {"image": library.Array3D((4, 4, 1), "uint8"), "label": library.Value("int64")}
    form["speaker"] = library.Value("string" if groups.dtype.kind == "U" else "int64")
    library.Dataset.from_dict(rows, features=library.Features(form)).save_to_disk(tmp_path / "x")
    return data.load("huggingface", part, tmp_path / "x", image_column="image", group_column="speaker")


@pytest.mark.parametrize("groups", [NUMBERS, NAMES], ids=["numbers", "names"])
@pytest.mark.parametrize("source", ["function", "npz", "compressed", "csv", "huggingface"])
def test_rows_keep_their_groups_and_splits_take_whole_ones(source, groups, tmp_path):
    parts = [loaded(source, part, tmp_path, groups) for part in PARTS]
    found = []
    for part in parts:
        assert part.groups is not None
        assert part.labels is not None
        assert np.array_equal(np.asarray(part.images), PIXELS[part.labels])
        assert part.groups.astype(str).tolist() == groups[part.labels].astype(str).tolist()
        found += part.labels.tolist()
    assert sorted(found) == LABELS.tolist()  # nothing lost, nothing twice
    assert found != LABELS.tolist()
    for one, other in itertools.combinations(parts, 2):
        assert one.groups is not None
        assert other.groups is not None
        assert not set(one.groups.tolist()) & set(other.groups.tolist())
    data.check_whole_groups({str(i): part.groups for i, part in enumerate(parts)})
    assert "8 groups" in repr(loaded(source, "all", tmp_path, groups))


def test_rows_without_groups_are_split_as_they_were():
    alone = data.load_function(lambda: (PIXELS, LABELS), "all[:20]")
    assert alone.groups is None
    assert alone.labels is not None
    assert alone.labels.tolist() == np.random.default_rng(0).permutation(N)[:20].tolist()
    unlabelled = data.load_function(returned(labels=None), "all")
    assert unlabelled.labels is None
    assert unlabelled.groups is not None


def test_a_group_in_two_splits_is_refused():
    spread = np.arange(N) % 7
    parts = {
        name: data.load_function(returned(groups=spread), part, shuffle_seed="none").groups
        for name, part in {"fit": "all[:30]", "certify": "all[30:]"}.items()
    }
    with pytest.raises(
        InputError, match=r"groups: expected every group in one split, got 0 in fit and certify \(7 such"
    ):
        data.check_whole_groups(parts)
    with pytest.raises(
        InputError, match="groups: expected them for every split or for none, got them for fit, not for"
    ):
        data.check_whole_groups(parts | {"certify": None})
    with pytest.raises(InputError, match=r"groups: expected independent rows, .* got 30 rows of fit in 7 groups"):
        data.check_no_groups(parts)


def test_impossible_groups_are_refused_in_one_line(tmp_path):
    np.savez(tmp_path / "short.npz", images=PIXELS, groups=NUMBERS[1:])
    np.savez(tmp_path / "real.npz", images=PIXELS, groups=NUMBERS * 0.5)
    (tmp_path / "gap.csv").write_text("path,speaker\na.png,anna\nb.png,")
    cases = [
        (lambda: data.load("npz", "all", tmp_path / "short.npz"), r"groups in .*short\.npz: expected .* 60 rows, got"),
        (
            lambda: data.load("npz", "all", tmp_path / "real.npz"),
            "expected an array of numbers or names, got groups in",
        ),
        (
            lambda: data.load_function(returned(groups=NUMBERS[1:]), "all"),
            r"expected .* each of 60 rows, got int64\[59\]",
        ),
        (lambda: data.load_function(returned(), "all[:1]"), "split: expected at least one whole group"),
        (lambda: data.load_function(returned(), "all", group_column="x"), "group_column: expected .* to return groups"),
        (lambda: data.load("digits", "all", group_column="x"), "group_column: expected huggingface or a CSV file"),
        (lambda: data.load("npz", "all", tmp_path, group_column="x"), "group_column: expected huggingface or a CSV"),
        (lambda: data.load("folder", "all", tmp_path, group_column="x"), "group_column: expected huggingface or a CSV"),
        (
            lambda: data.load("folder", "all", tmp_path / "gap.csv", group_column="x"),
            "expected a column of .*gap.csv but",
        ),
        (
            lambda: data.load("folder", "all", tmp_path / "gap.csv", group_column="speaker"),
            "expected a speaker in every",
        ),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
