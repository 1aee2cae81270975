"""Rows, splits and digests against Python sets; loaded images against their sources."""

import contextlib
import io
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


BAD = [
    "",
    "test[",
    "test[1]",
    "test[-5:]",
    "test[%:5%]",
    "test[:%]",
    "../test",
    "train+test",
    "test[1:2:3]",
    " test",
    "test[a:b]",
    "[1:2]",
]


@pytest.mark.parametrize("text", BAD)
def test_parse_refuses_other_notations(text):
    with pytest.raises(InputError) as caught:
        Rows.parse(text)
    assert str(caught.value).startswith("split: expected a form like")
    assert str(caught.value).endswith(f"got {text!r}")


MIXED = {
    "test[10%:50]": "row numbers or percentages, got both in",
    "test[10:50%]": "row numbers or percentages, got both in",
    "test[:101%]": "percentages up to 100%, got",
    "test[50%:50%]": "at least one row, got",
}


@pytest.mark.parametrize("text", MIXED)
def test_parse_refuses_percentages_that_mean_no_rows(text):
    with pytest.raises(InputError, match=f"split: expected {MIXED[text]}"):
        Rows.parse(text)


@given(st.integers(1, 1000), st.lists(st.integers(0, 100), min_size=2, max_size=5, unique=True))
def test_percentages_divide_a_split_without_gaps_and_overlaps(n, cuts):
    """As TFDS has them: rounded to the nearest row."""
    cuts.sort()
    rows, splits = [], [f"all[{a}%:{b}%]" for a, b in itertools.pairwise(cuts)]
    for text in splits:
        with contextlib.suppress(InputError):  # of few rows, a part may have none
            part = Rows.parse(text).within(n)
            rows += range(part.start, part.stop)
    assert rows == list(range(round(n * cuts[0] / 100), round(n * cuts[-1] / 100)))
    data.check_disjoint({text: text for text in splits})


@pytest.mark.parametrize("other", ["all[50%:]", "all[:1%]"])
def test_rows_and_percentages_of_one_split_count_as_overlapping(other):
    assert Rows.parse("all[:5]").overlaps(Rows.parse(other))
    assert not Rows.parse("train[:5]").overlaps(Rows.parse(other))
    with pytest.raises(InputError, match="row numbers and percentages of one split cannot be compared"):
        data.check_disjoint({"fit": "all[:5]", "test": other})


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
    info = SimpleNamespace(splits=splits, features={"image": None, "label": SimpleNamespace(names=["a", "b"])})
    parts = {"as_data_source": lambda split: source[: len(split)], "is_prepared": lambda: True}
    builder, asked = SimpleNamespace(info=info, **parts), []
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


# --- Folders that TFDS wrote ------------------------------------------------------------------------------------------


def png(height=4, value=0):
    file = io.BytesIO()
    pytest.importorskip("PIL.Image").fromarray(np.full((height, 4, 3), value, np.uint8)).save(file, "png")
    file.seek(0)
    return file


def write(tfds, folder, features, rows, name="pictures"):
    """Write a data set with TFDS's own writer, as version 1.0.0 with the split test."""
    features = tfds.features.FeaturesDict(features)
    with tfds.core.registered.skip_registration():

        class Builder(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, _):
                return {"test": self._generate_examples()}

            def _generate_examples(self):
                yield from enumerate(rows)

    Builder.name = name
    Builder(data_dir=folder, file_format="array_record").download_and_prepare()


def load_written(tfds, folder, features, rows):
    write(tfds, folder, features, rows)
    return data.load("pictures", "test", folder)


def test_images_without_labels_are_loaded(tmp_path, tfds):
    rows = [{"image": png(value=i)} for i in range(3)]
    loaded = load_written(tfds, tmp_path, {"image": tfds.features.Image()}, rows)
    assert sorted(loaded.images[:, 0, 0, 0].tolist()) == [0, 1, 2]
    assert (loaded.images.shape, loaded.labels, loaded.class_names) == ((3, 4, 4, 3), None, ())


def test_a_split_whose_labels_are_withheld_has_none(tmp_path, tfds):
    rows = [{"image": png(), "label": -1} for _ in range(3)]
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["a", "b"])}
    assert load_written(tfds, tmp_path, features, rows).labels is None


def test_plain_integers_are_labels_without_names(tmp_path, tfds):
    rows = [{"image": png(value=i), "label": 7 - i} for i in range(3)]
    loaded = load_written(tfds, tmp_path, {"image": tfds.features.Image(), "label": np.int64}, rows)
    assert loaded.labels is not None
    assert (loaded.labels + loaded.images[:, 0, 0, 0]).tolist() == [7, 7, 7]
    assert loaded.class_names == ()


OTHER_FEATURES = {
    "names": ({"picture": "image", "label": np.int64}, "expected features image and, if .*, label; pictures has"),
    "float labels": ({"image": "image", "label": np.float32}, "expected an integer as label, pictures has float"),
    "text labels": ({"image": "image", "label": "text"}, "expected an integer as label, pictures has"),
    "several labels": ({"image": "image", "label": "pair"}, r"expected an integer as label, pictures has int64\[2\]"),
    "sizes": ({"image": "image of any height"}, r"images of one size .*got uint8\[4, 4, 3\] and uint8\[5, 4, 3\]"),
    "vectors": ({"image": "pair"}, r"expected images uint8\[height, width, channels\], pictures has int64\[2\]"),
}


@pytest.mark.parametrize("case", OTHER_FEATURES)
def test_other_features_are_refused_in_one_line(tmp_path, tfds, case):
    kinds, message = OTHER_FEATURES[case]
    known = {
        "image": (tfds.features.Image(), lambda _: png()),
        "image of any height": (tfds.features.Image(shape=(None, 4, 3)), lambda i: png(4 + i)),
        "text": (tfds.features.Text(), str),
        "pair": (tfds.features.Tensor(shape=(2,), dtype=np.int64), lambda i: np.array([i, i])),
        np.int64: (np.int64, int),
        np.float32: (np.float32, float),
    }
    rows = [{name: known[kind][1](i) for name, kind in kinds.items()} for i in range(2)]
    with pytest.raises(InputError, match=rf"data\.name: .*{message}") as caught:
        load_written(tfds, tmp_path, {name: known[kind][0] for name, kind in kinds.items()}, rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "expected"), [("cifar10", r"3\.\d+\.\d+"), ("cifar10:2.0.0", r"2\.0\.0")])
def test_a_folder_of_another_version_is_refused(tmp_path, tfds, name, expected):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=10)}
    write(tfds, tmp_path, features, [{"image": png(), "label": 1}], name="cifar10")
    with pytest.raises(InputError, match=rf"data\.dir: expected cifar10 in version {expected}, got 1\.0\.0;"):
        data.load(name, "test", tmp_path)
    assert len(data.load("cifar10:1.0.0", "test", tmp_path)) == 1


def test_a_folder_without_random_access_is_refused(tmp_path, tfds):
    write(tfds, tmp_path, {"image": tfds.features.Image()}, [{"image": png()}])
    info = tmp_path / "pictures" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match=r"data\.dir: expected .* \(array_record\), got pictures in tfrecord$"):
        data.load("pictures", "test", tmp_path)


# --- What a network takes ---------------------------------------------------------------------------------------------

IMAGES = np.zeros((2, 4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [(8, None, "10 classes, got 8 class names"), (11, [0, 1], "got 11 class names"), (0, [0, 10], "got label 10")],
)
def test_a_network_without_an_output_for_every_class_is_refused(names, labels, message):
    given = None if labels is None else np.array(labels, np.int32)
    dataset = data.Dataset(images=IMAGES, labels=given, class_names=tuple(map(str, range(names))))
    with pytest.raises(InputError, match=f"data.splits.fit: the network has .*{message}"):
        dataset.check("data.splits.fit", (4, 5, 3), 10)


@pytest.mark.parametrize("shape", [(3, 4, 5), (5, 4, 3), (4, 5, 1), (60,)])
def test_a_network_of_another_layout_is_refused(shape):
    data.Dataset(images=IMAGES).check("fit", (4, 5, 3), 10)
    with pytest.raises(InputError, match=r"fit: the network takes .*, got images \(4, 5, 3\)"):
        data.Dataset(images=IMAGES).check("fit", shape, 10)


# --- Near copies ------------------------------------------------------------------------------------------------------

NOISE = {
    "one level": lambda images: np.minimum(images, 254) + 1,
    "random levels": lambda images: images ^ np.random.default_rng(1).integers(0, 2, images.shape, np.uint8),
    "recompressed": lambda images: (images // 4 * 4 + 2).astype(np.uint8),
}


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 7, 3), (3, 2, 1)])
def test_near_copies_are_counted(noise, mirrored, shape):
    """13 of 50 images are among 200 others, but for noise; two of the 13 are the same."""
    rng = np.random.default_rng(0)
    other, fresh = (rng.integers(0, 256, (n, *shape), np.uint8) for n in (200, 37))
    taken = other[[*range(20, 32), 20]]
    copies = NOISE[noise](taken[:, :, ::-1] if mirrored else taken)
    assert data.count_near_copies(np.concatenate([fresh, copies]), other) == 13
    assert data.count_near_copies(fresh, other) == 0
    assert data.count_near_copies(np.concatenate([fresh, other, taken[:12], copies[:1]])) == 25


def test_digits_have_no_near_copies():
    images = data.load("digits", "all").images
    assert data.count_near_copies(images[:900], images[900:]) == 0
    assert data.count_near_copies(np.minimum(images[:50] + 1, 16)[:, :, ::-1], images) == 50


def test_few_images_of_cifar10_are_near_copies(shared):
    """Real ones: the same picture, recompressed."""
    train, test = (data.load("cifar10", split, shared / "tfds").images for split in ("train[:2000]", "test[:2000]"))
    assert data.count_near_copies(test, train) <= 1


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
