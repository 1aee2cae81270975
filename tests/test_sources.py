"""Picture files, archives, and Hugging Face data sets against what was written; streams against arrays."""

import io
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest

from gati_jax import data
from gati_jax.data import pictures
from gati_jax.errors import InputError

Image = pytest.importorskip("PIL.Image", reason="needs the extra train")
RNG = np.random.default_rng(0)


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def folder_of(path, classes=("bee", "ant"), n=8, size=(9, 7), ending="png"):
    """Write class folders; the first pixel of each picture says its class and its number."""
    for c, name in enumerate(sorted(classes)):
        (path / name).mkdir(parents=True)
        for i in range(n):
            image = RNG.integers(0, 256, (*size, 3), np.uint8)
            image[0, 0] = c, i, 0
            (path / name / f"{i:03}.{ending}").write_bytes(encoded(image))
    return path


def ids(images):
    return [tuple(row) for row in np.asarray(images)[:, 0, 0, :2].tolist()]


# --- torchvision's evaluation transform -------------------------------------------------------------------------------

TRANSFORMS = [
    {"resize": 16, "crop": 14},
    {"resize": 40, "crop": 41},
    {"resize": (11, 23), "crop": (12, 8)},
    {"resize": 13, "interpolation": "bicubic"},
    {"crop": 9},
    {"crop": (80, 5)},
    {"resize": 15, "channels": 1, "interpolation": "lanczos"},
]


@pytest.mark.parametrize("size", [(31, 50), (50, 31), (24, 24), (25, 97)])
@pytest.mark.parametrize("options", TRANSFORMS, ids=str)
def test_pictures_are_torchvisions(options, size, torchvision):
    transforms = torchvision.transforms
    theirs = []
    if resize := options.get("resize"):
        filter_ = transforms.InterpolationMode(options.get("interpolation", "bilinear"))
        theirs.append(transforms.Resize(resize, interpolation=filter_))
    theirs += [transforms.CenterCrop(options["crop"])] if "crop" in options else []
    ours = pictures.Transform(**options)
    for kind, mode in (("jpeg", "RGB"), ("png", "RGBA"), ("png", "L"), ("png", "P"), ("jpeg", "CMYK"), ("webp", "RGB")):
        shape = {"L": size, "P": size, "RGB": (*size, 3)}.get(mode, (*size, 4))
        image = Image.frombytes(mode, size[::-1], RNG.integers(0, 256, shape, np.uint8).tobytes())
        if mode == "P":
            image.putpalette(RNG.integers(0, 256, 768, np.uint8).tobytes())
        file = encoded(image, kind)
        expected = Image.open(io.BytesIO(file)).convert("L" if options.get("channels") == 1 else "RGB")  # ImageFolder's
        expected = np.asarray(transforms.Compose(theirs)(expected)).reshape(-1)
        got = ours.picture(file, "x")
        assert got.shape[2] == options.get("channels", 3)
        assert np.abs(got.reshape(-1).astype(int) - expected).max() <= 1


# --- Folders and CSV files --------------------------------------------------------------------------------------------


def test_a_folder_is_shuffled_by_a_fixed_seed_and_labelled_by_its_sorted_folders(tmp_path):
    folder = folder_of(tmp_path)
    whole = data.load("folder", "all", folder)
    assert whole.class_names == ("ant", "bee")
    assert whole.labels is not None
    assert [c for c, _ in ids(whole.images)] == whole.labels.tolist()
    assert sorted(ids(whole.images)) == [(c, i) for c in range(2) for i in range(8)]
    halves = [data.load("folder", split, folder) for split in ("all[:50%]", "all[50%:]")]
    assert ids(halves[0].images) + ids(halves[1].images) == ids(whole.images)
    assert all(len({c for c, _ in ids(half.images)}) == 2 for half in halves)  # which a sorted one would not have
    assert whole.ids is not None
    for row, path in zip(whole.images, whole.ids.tolist(), strict=True):  # each is called by its own path
        np.testing.assert_array_equal(row, np.asarray(Image.open(path).convert("RGB")))
    in_order = data.load("folder", "all", folder, shuffle_seed="none")
    assert ids(in_order.images) == sorted(ids(whole.images))
    assert ids(data.load("folder", "all", folder, shuffle_seed=1).images) != ids(whole.images)


def test_folders_of_splits_share_their_classes(tmp_path):
    folder_of(tmp_path / "train", ("ant", "bee", "cat"))
    folder_of(tmp_path / "val", ("bee", "cat"))
    part = data.load("folder", "val", tmp_path)
    assert part.class_names == ("ant", "bee", "cat")
    assert part.labels is not None
    assert set(part.labels.tolist()) == {1, 2}
    for split in ("all", "test", "ant"):
        with pytest.raises(InputError, match=r"split: expected .*train.*val"):
            data.load("folder", split, tmp_path)


def test_pictures_without_folders_have_no_labels(tmp_path):
    (folder_of(tmp_path / "x", ["ant"]) / "ant").rename(tmp_path / "loose")
    assert data.load("folder", "all", tmp_path / "loose").labels is None


@pytest.mark.parametrize("named", [True, False])
def test_a_csv_names_files_labels_and_splits(tmp_path, named):
    folder = folder_of(tmp_path / "pictures")
    lines = ["split,label,path"]
    for i in range(8):
        lines.append(f"{'train' if i < 6 else 'test'},{'zoo' if named else 7},pictures/ant/{i:03}.png")
        lines.append(
            f"train,{'air, fresh' if named else 2},{folder}/bee/{i:03}.png".replace("air, fresh", '"air, fresh"')
        )
    table = tmp_path / "table.csv"
    table.write_text("\n".join(lines))
    train, test = (data.load("folder", split, table) for split in ("train", "test"))
    assert sorted(ids(test.images)) == [(0, 6), (0, 7)]
    assert len(train) == 14
    assert train.class_names == (("air, fresh", "zoo") if named else ())
    label_of = {0: 1, 1: 0} if named else {0: 7, 1: 2}
    for part in (train, test):
        assert part.labels is not None
        assert part.labels.tolist() == [label_of[c] for c, _ in ids(part.images)]


def bomb():
    """A PNG of 60,000 x 60,000 pixels that takes 60 bytes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(16))
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, body, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


NOISE = RNG.integers(0, 256, (40, 40, 3), np.uint8)
DAMAGED = {
    "cut": (encoded(NOISE, "jpeg")[:900], "003.png: expected a picture that can be read, got .*truncated"),
    "bits": (encoded(NOISE)[:60] + b"xxxx" + encoded(NOISE)[64:], "003.png: expected a picture that can be read, got"),
    "empty": (b"", "003.png: expected a picture JPEG, PNG or WebP, got another file"),
    "text": (b"hello, world", "003.png: expected a picture JPEG, PNG or WebP, got another file"),
    "deep": (
        encoded(RNG.integers(0, 65536, (40, 40), np.uint16)),
        "003.png: expected 8 bits a channel, for Pillow would clip more, got a picture of mode I",
    ),
    "gif": (encoded(NOISE, "gif"), "003.png: expected a picture JPEG, PNG or WebP, got another file"),
    "bomb": (bomb(), "003.png: expected .*(pixels|bomb)"),
    "other size": (
        encoded(NOISE),
        r"one size, got \[.*\] in .*\.png, others have \[.*\]: set data.resize and data.crop",
    ),
}


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_file_is_named_in_one_line(tmp_path, case, streamed):
    content, message = DAMAGED[case]
    folder = folder_of(tmp_path)
    (folder / "bee" / "003.png").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        data.row_digests(data.load("folder", "all", folder, memory_mb=0 if streamed else 512).images)
    assert "\n" not in str(caught.value)


def test_spaces_behind_commas_and_other_columns_change_nothing(tmp_path, caplog):
    folder = folder_of(tmp_path / "pictures")
    (table := tmp_path / "table.csv").write_text("path, label, camera\npictures/ant/000.png, 3, 7\n")
    loaded = data.load("folder", "all", table)
    assert loaded.labels is not None
    assert (loaded.labels.tolist(), len(loaded)) == ([3], 1)
    assert "other columns than path, label and split are left out: camera" in caplog.text
    for file in (folder / "bee").iterdir():
        file.unlink()
    assert data.load("folder", "all", folder).class_names == ("ant", "bee")
    assert "no picture of class bee" in caplog.text


def test_what_holds_images_is_described_in_a_line():
    rows = data.ImageRows(PIXELS)
    assert repr(rows) == f"ImageRows(uint8{[*PIXELS.shape]})"
    described = repr(data.Dataset(images=PIXELS, class_names=("a", "b")))
    assert described == f"Dataset(uint8{[*PIXELS.shape]} without labels; 2 classes)"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    folder = folder_of(tmp_path)
    os.mkfifo(folder / "ant" / "pipe.png")
    (folder / "bee" / "link.png").symlink_to(folder / "bee" / "000.png")
    with pytest.raises(InputError, match=r"pipe\.png: expected a regular file"):
        data.load("folder", "all", folder)
    (folder / "ant" / "pipe.png").unlink()
    assert len(data.load("folder", "all", folder)) == 17


TABLES = {
    "no path": "file\na.png",
    "gap": "path,label\na.png,1\nb.png,",
    "short": "label,path\n1,a.png\n2",
    "nul": "path\na\0b.png",
    "latin": "path\n\xe9",
    "fractions": "path,label\na.png,2.0\nb.png,10.0",
    "unlabelled": "path,label\na.png,-1\nb.png,2",
    "superscript": "path,label\na.png,\xb2\nb.png,2",
    "wide": "path,label\nb.png,cat,dog",
    "twice": "path,path\na.png,b.png",
    "semicolons": "path;label\na.png;cat",
    "headed": "path,label\n",
}


def odd_folders(path):
    folder_of(path / "mixed")
    (path / "mixed" / "loose.png").write_bytes(encoded(NOISE))
    folder_of(path / "deep" / "train")
    folder_of(path / "deep" / "train" / "bee" / "deeper")
    (path / "none").mkdir()
    for name, text in TABLES.items():
        (path / f"{name}.csv").write_text(text, encoding="latin-1")


ODD = {"deep": "train"} | dict.fromkeys(["mixed", "none", "nowhere"] + [f"{name}.csv" for name in TABLES], "all")


@pytest.mark.parametrize("name", ODD)
def test_other_layouts_are_refused_in_one_line(tmp_path, name):
    odd_folders(tmp_path)
    with pytest.raises(InputError) as caught:
        data.load("folder", ODD[name], tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value) or "b.png" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"resize": 0}, "resize"),
        ({"crop": [1, 2, 3]}, "crop"),
        ({"filter": "box"}, "filter"),
        ({"channels": 2}, "channels"),
    ],
)
def test_bad_options_are_one_line(tmp_path, options, key):
    with pytest.raises(InputError, match=f"data: {key}") as caught:
        data.load("folder", "all", tmp_path, **options)
    assert "\n" not in str(caught.value)


# --- Archives ---------------------------------------------------------------------------------------------------------

PIXELS, LABELS = RNG.integers(0, 256, (20, 6, 5, 3), np.uint8), np.arange(20)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", ["one", "prefixes", "files"])
@pytest.mark.parametrize("streamed", [True, False])
def test_archives_hold_what_was_saved(tmp_path, save, layout, streamed):
    if layout == "files":
        save(tmp_path / "train.npz", images=PIXELS, labels=LABELS)
    elif layout == "one":
        save(tmp_path / "x.npz", images=PIXELS, labels=LABELS)
    else:
        save(tmp_path / "x.npz", train_images=PIXELS, train_labels=LABELS, test_images=PIXELS[:3])
    split, place = "all" if layout == "one" else "train", tmp_path if layout == "files" else tmp_path / "x.npz"
    options = {"memory_mb": 0} if streamed else {}
    parts = [data.load("npz", f"{split}{part}", place, **options) for part in ("[:30%]", "[30%:]")]
    labels = np.concatenate([part.labels for part in parts if part.labels is not None])
    assert sorted(labels.tolist()) == LABELS.tolist()
    assert labels.tolist() != LABELS.tolist()
    assert np.array_equal(np.concatenate([np.asarray(part.images) for part in parts]), PIXELS[labels])
    assert np.array_equal(data.load("npz", split, place, shuffle_seed="none", **options).images, PIXELS)


def archive(path, method, header, body):
    text = f"{header}\n".encode()
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body)


HEADERS = {
    "objects": ({"descr": "|O", "fortran_order": False, "shape": (2, 2)}, b"\x80\x04K\x01."),
    "larger than it is": ({"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**9)}, bytes(100)),
    "negative": ({"descr": "|u1", "fortran_order": False, "shape": (-10, -10)}, bytes(100)),
    "one number": ({"descr": "|u1", "fortran_order": False, "shape": ()}, bytes(1)),
    "text": ({"descr": "<U1", "fortran_order": False, "shape": (5, 5)}, bytes(100)),
    "code": ("__import__('os').abort()", b""),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("case", HEADERS)
def test_archives_of_anything_but_numbers_are_refused(tmp_path, case, method):
    archive(tmp_path / "x.npz", method, *HEADERS[case])
    with pytest.raises(InputError, match=r"data\.dir: expected an array") as caught:
        data.load("npz", "all", tmp_path / "x.npz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 30, 500, 1500])
def test_a_cut_archive_is_one_line(tmp_path, kept):
    np.savez(tmp_path / "x.npz", images=PIXELS)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:kept])
    with pytest.raises(InputError, match=r"data\.dir: expected an .npz file"):
        data.load("npz", "all", tmp_path / "x.npz")


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["saved", "saved splits", "parquet"])
def test_hugging_faces_data_sets_are_what_was_written(tmp_path, kind, monkeypatch):
    library = pytest.importorskip("datasets", reason="needs the extra huggingface")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = library.Features(
        {"id": library.Value("int64"), "img": library.Image(), "fine": library.ClassLabel(names=["a", "b"])}
    )
    rows = {"id": list(range(12)), "img": [{"bytes": encoded(PIXELS[i], "png"), "path": None} for i in range(12)]}
    table = library.Dataset.from_dict(rows | {"fine": [i % 2 for i in range(12)]}, features=features)
    place = tmp_path / "data"
    if kind == "parquet":
        place.mkdir()
        table.to_parquet(place / "train-00000-of-00001.parquet")
    else:
        (table if kind == "saved" else library.DatasetDict(train=table)).save_to_disk(place)
    split = "all" if kind == "saved" else "train"
    for options in ({}, {"memory_mb": 0, "image_column": "img", "label_column": "fine"}):
        loaded = data.load("huggingface", split, place, shuffle_seed="none", **options)
        assert np.array_equal(np.asarray(loaded.images), PIXELS[:12])
        assert loaded.labels is not None
        assert loaded.labels.tolist() == [0, 1] * 6
        assert loaded.class_names == ("a", "b")
    for bad, message in (
        ({"label_column": "none"}, "label_column: expected one of"),
        ({"repository": "a/b"}, "one of them"),
    ):
        with pytest.raises(InputError, match=message):
            data.load("huggingface", split, place, **bad)
    with pytest.raises(InputError, match="split: expected one of"):
        data.load("huggingface", "validation", place)


def test_a_folder_of_something_else_is_not_given_to_datasets(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra huggingface")
    (tmp_path / "x.py").write_text("raise SystemExit")
    with pytest.raises(InputError, match="expected a folder of parquet files"):
        data.load("huggingface", "all", tmp_path)
    with pytest.raises(InputError, match="repository"):
        data.load("huggingface", "all", repository="../../etc x")
