"""Rows, splits and digests against Python sets; loaded images against their sources."""

import itertools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gati_jax import data
from gati_jax.data import Rows
from gati_jax.errors import InputError

N = 12  # rows of the source that sets enumerate; None stands for its end
bound = st.none() | st.integers(0, N)


def text_of(split, start, stop):
    return f"{split}[{'' if start is None else start}:{'' if stop is None else stop}]"


@st.composite
def parts(draw):
    split, start, stop = draw(st.sampled_from(["train", "test"])), draw(bound), draw(bound)
    rows = range(N)[start:stop]
    assume(len(rows) > 0)
    return text_of(split, start, stop), {(split, row) for row in rows}


@given(st.from_regex(r"\w{1,8}", fullmatch=True), bound, bound)
def test_parse_reads_what_slices_mean(split, start, stop):
    if stop is not None and stop <= (start or 0):
        with pytest.raises(InputError, match="split: expected at least one row, got"):
            Rows.parse(text_of(split, start, stop))
    else:
        assert Rows.parse(text_of(split, start, stop)) == Rows(split, start or 0, stop)
    assert Rows.parse(split) == Rows.parse(f"{split}[:]") == Rows(split, 0, None)


BAD = ["", "test[", "test[1]", "test[-5:]", "test[:50%]", "train+test", "test[1:2:3]", " test", "test[a:b]", "[1:2]"]


@pytest.mark.parametrize("text", BAD)
def test_parse_refuses_other_notations(text):
    with pytest.raises(InputError) as caught:
        Rows.parse(text)
    assert str(caught.value).startswith("split: expected a form like")
    assert str(caught.value).endswith(f"got {text!r}")


@given(parts(), parts())
def test_overlaps_as_sets_do(one, other):
    expected = bool(one[1] & other[1])
    assert Rows.parse(one[0]).overlaps(Rows.parse(other[0])) == expected
    assert Rows.parse(other[0]).overlaps(Rows.parse(one[0])) == expected


@given(st.lists(parts(), max_size=4))
def test_check_disjoint_agrees_with_sets(drawn):
    splits = {f"split{i}": text for i, (text, _) in enumerate(drawn)}
    clash = any(one & other for (_, one), (_, other) in itertools.combinations(drawn, 2))
    if clash:
        with pytest.raises(InputError, match="splits: expected disjoint splits, got"):
            data.check_disjoint(splits)
    else:
        data.check_disjoint(splits)


def test_check_disjoint_names_the_two_splits():
    message = r"splits: expected disjoint splits, got select=test\[:2501\] overlapping certify=test\[2500:5000\]"
    with pytest.raises(InputError, match=message):
        data.check_disjoint({"fit": "train", "select": "test[:2501]", "certify": "test[2500:5000]"})


@given(st.lists(st.binary(min_size=3, max_size=3), min_size=1, max_size=12))
def test_digests_are_equal_where_rows_are(rows):
    images = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 3)
    digests = data.row_digests(images)
    assert digests.shape == (len(rows),)
    equal = images[:, None] == images[None]
    assert np.array_equal(digests[:, None] == digests, equal.all(-1))


def test_digests_depend_on_every_bit_and_neither_on_memory_layout_nor_position():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
    digests = data.row_digests(images)
    assert np.array_equal(data.row_digests(np.asfortranarray(images)), digests)
    assert np.array_equal(data.row_digests(images[::-1]), digests[::-1])
    assert np.array_equal(data.row_digests(images[2:3]), digests[2:3])
    images[5, 3, 3, 2] ^= 1
    assert (data.row_digests(images) != digests).tolist() == [False] * 5 + [True]
    assert data.row_digests(images[:0]).shape == (0,)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_fingerprint_is_equal_for_equal_sequences_only(one, other):
    prints = [data.fingerprint(np.array(digests, np.uint64)) for digests in (one, other)]
    assert (prints[0] == prints[1]) == (one == other)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 300), st.booleans())
def test_distinct_rows_are_counted_as_sets(n, m, start, repeated):
    """In either order. Repeats count in the smaller split only."""
    one, other = np.arange(n, dtype=np.uint64), np.arange(start, start + m, dtype=np.uint64)
    shared = len(set(range(n)) & set(range(start, start + m)))
    few = min(n, m)
    if repeated and n != m:  # the larger one's first row
        one, other = (np.append(a, [a[0]] * 5) if len(a) > few else a for a in (one, other))
    for splits in ((one, other), (other, one)):
        if shared * 100 > few:  # over 1 %
            with pytest.raises(InputError, match=f"disjoint, got {shared} rows of"):
                data.check_distinct_rows(*splits, names=("fit", "test"))
        else:
            data.check_distinct_rows(*splits, names=("fit", "test"))


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 5))
def test_batches_are_a_permutation_without_the_incomplete_rest(n, size, seed):
    found = list(data.batches(n, size, seed=(seed, 1)))
    assert len(found) == n // size
    assert all(batch.shape == (size,) for batch in found)
    rows = [int(row) for batch in found for row in batch]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(n))


def test_batches_follow_their_seed():
    epoch = lambda *seed: np.concatenate(list(data.batches(100, 10, seed=seed))).tolist()  # noqa: E731
    assert epoch(0, 1) == epoch(0, 1)
    assert len({tuple(epoch(*seed)) for seed in ((0, 1), (0, 2), (1, 1))}) == 3
    assert epoch(0, 1) != sorted(epoch(0, 1))


def test_digits_are_those_of_scikit_learn_and_parts_are_slices():
    source = pytest.importorskip("sklearn.datasets").load_digits()
    loaded = data.load("digits", "all")
    assert loaded.labels is not None
    assert (loaded.images.shape, loaded.images.dtype) == ((1797, 8, 8, 1), np.uint8)
    assert loaded.class_names == tuple("0123456789")
    assert len(loaded) == 1797
    theirs = sorted(
        (*image.astype(int).ravel(), int(label)) for image, label in zip(source.images, source.target, strict=True)
    )
    ours = sorted((*image.astype(int).ravel(), int(y)) for image, y in zip(loaded.images, loaded.labels, strict=True))
    assert ours == theirs
    parts = [("all[:100]", slice(100)), ("all[100:103]", slice(100, 103)), ("all[1790:]", slice(1790, None))]
    for split, part in parts:
        some = data.load("digits", split)
        assert some.labels is not None
        assert np.array_equal(some.images, loaded.images[part])
        assert np.array_equal(some.labels, loaded.labels[part])


@pytest.mark.parametrize("split", ["all[:1798]", "all[1797:]", "all[5000:6000]"])
def test_rows_beyond_the_digits_and_other_splits_are_refused(split):
    with pytest.raises(InputError, match=r"split: expected rows of all, got \[.*; all has 1797 rows"):
        data.load("digits", split)
    with pytest.raises(InputError, match="split: expected all, the only split of digits, got 'train'"):
        data.load("digits", split.replace("all", "train"))


@pytest.fixture
def tfds():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of its dependencies, at import
        return pytest.importorskip("tensorflow_datasets")


@pytest.mark.parametrize(("split", "start", "stop"), [("test[100:140]", 100, 140), ("train[49990:]", 49990, 50000)])
def test_slices_of_cifar10_equal_random_access(shared, tfds, split, start, stop):
    loaded = data.load("cifar10", split, shared / "tfds")
    source = tfds.data_source("cifar10", split=split.split("[")[0], data_dir=shared / "tfds")
    assert loaded.labels is not None
    assert len(loaded) == stop - start
    assert loaded.images.dtype == np.uint8
    assert len(set(loaded.labels.tolist())) > 1
    for i in range(start, stop):
        assert np.array_equal(loaded.images[i - start], source[i]["image"])
        assert loaded.labels[i - start] == source[i]["label"]
    assert loaded.class_names == tuple(source.dataset_info.features["label"].names)


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar10_corrupted/brightness_1", "mnist_corrupted/identity:1.0.0", "mnist:3.*.*"]
)
def test_a_name_with_config_and_version_is_what_tfds_is_asked_for(tmp_path, tfds, monkeypatch, name):
    """A stand-in for the builder: one image of class 1."""
    source = [{"image": np.ones((2, 2, 1), np.uint8), "label": 1}]
    splits = {"test": SimpleNamespace(num_examples=1)}
    info = SimpleNamespace(splits=splits, features={"label": SimpleNamespace(names=["a", "b"])})
    builder, asked = SimpleNamespace(info=info, as_data_source=lambda split: source[: len(split)]), []
    monkeypatch.setattr(tfds, "builder", lambda *given, **options: asked.append((given, options)) or builder)
    (tmp_path / name.partition(":")[0]).mkdir(parents=True)
    labels = data.load(name, "test", tmp_path).labels
    assert labels is not None
    assert labels.tolist() == [1]
    assert asked == [((name,), {"data_dir": tmp_path})]


BAD_NAMES = [
    "", "../cifar10", "/cifar10", "a/../b", "a/.b", "namespace:cifar10", "kaggle:cats", "huggingface:x", "a:1", "a=b",
    "a b", "a/b/c", "a\n",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_be_a_path_or_code_is_refused(tmp_path, tfds, name):
    del tfds
    with pytest.raises(InputError, match=r"data\.name: expected digits or a TensorFlow Datasets name"):
        data.load(name, "test", tmp_path)


@pytest.mark.parametrize(("name", "exists"), [("cifar10", False), ("cifar10", True), ("my_pictures", True)])
def test_a_folder_without_the_data_set_is_refused(tmp_path, tfds, name, exists):
    del tfds
    if exists:
        (tmp_path / name).mkdir()
    folder = f"data\\.dir: expected a TensorFlow Datasets folder with {name}/ in it, got"
    for path in (tmp_path,) if exists else (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=None if exists else folder):
            data.load(name, "test", path)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("validation", "split: expected one of test, train of cifar10, got 'validation'"),
        ("validation[:5]", "split: expected one of test, train of cifar10, got 'validation'"),
        ("test[:10001]", r"split: expected rows of test, got \[0:10001\]; test has 10000 rows"),
        ("test[10000:]", r"split: expected rows of test, got \[10000:\]; test has 10000 rows"),
    ],
)
def test_splits_and_rows_that_cifar10_does_not_have_are_refused(shared, split, message):
    with pytest.raises(InputError, match=message):
        data.load("cifar10", split, shared / "tfds")
