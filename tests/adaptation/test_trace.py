"""Recorded workloads: what is written comes back; whatever else a file of either version holds is refused unread."""

import dataclasses
import io
import json
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from gati_jax import InputError
from gati_jax.adaptation import Trace, load_trace, save_trace

GOOD = {
    "item": np.array([0, 1, 0], np.int32),
    "seconds": np.array([0, 0.5, 0.5]),
    "images": np.zeros((2, 4, 4, 3), np.uint8),
}


def header_of(version, **changed):
    return json.dumps({"format_version": version, "phases": ["all"], "about": {}} | changed).encode()


def npy(array, **changed):
    """Return an .npy file of the array; ``changed`` says otherwise in its header."""
    header = {"descr": np.asarray(array).dtype.str, "fortran_order": False, "shape": np.shape(array)} | changed
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + np.ascontiguousarray(array).tobytes()


def write(path, contents, header=None, compression=zipfile.ZIP_DEFLATED):
    """Write arrays (or for .npz, bytes of members) by the format that the name says."""
    contents = {name: content for name, content in contents.items() if content is not None}
    if path.suffix == ".safetensors":
        header = header_of(2) if header is None else header
        tensors = {name: np.ascontiguousarray(content) for name, content in contents.items()}
        safetensors.numpy.save_file(tensors, path, {"trace": header.decode()})
        return path
    contents = {"header": np.frombuffer(header_of(1) if header is None else header, np.uint8)} | contents
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.npy", content if isinstance(content, bytes) else npy(content))
    return path


def columns(n):
    return st.fixed_dictionaries(
        {
            "item": st.lists(st.integers(0, 4), min_size=n, max_size=n).map(lambda v: np.array(v, np.int32)),
            "seconds": st.lists(st.floats(0, 1e6), min_size=n, max_size=n).map(lambda v: np.sort(np.array(v))),
            "phase": st.lists(st.integers(0, 1), min_size=n, max_size=n).map(lambda v: np.array(v, np.int16)),
            "source": st.lists(st.integers(0, 32767), min_size=n, max_size=n).map(lambda v: np.array(v, np.int16)),
            "phases": st.tuples(st.text(max_size=20), st.text(max_size=20)),
            "about": st.dictionaries(st.text(max_size=5), st.integers(0, 9) | st.text(max_size=5) | st.none()),
            "images": st.none() | st.integers(0, 255).map(lambda v: np.full((5, 2, 3, 1), v, np.uint8)),
        }
    )


@given(content=st.integers(1, 20).flatmap(columns))
def test_what_is_written_comes_back(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("trace") / "t.safetensors"
    save_trace(path, Trace(**content))
    loaded = load_trace(path)
    for field in dataclasses.fields(Trace):
        np.testing.assert_equal(getattr(loaded, field.name), content[field.name])
    save_trace(path.with_name("again.safetensors"), loaded)
    assert path.with_name("again.safetensors").read_bytes() == path.read_bytes()


def test_a_file_of_version_1_is_still_read(tmp_path):
    header = np.frombuffer(header_of(1), np.uint8)
    np.savez_compressed(tmp_path / "t.npz", header=header, item=np.array([3, 4], np.int32), seconds=np.array([0.0, 1]))
    trace = load_trace(tmp_path / "t.npz")
    assert (trace.images, trace.phases, trace.item.tolist()) == (None, ("all",), [3, 4])
    assert trace.phase.tolist() == trace.source.tolist() == [0, 0]
    assert len(load_trace(write(tmp_path / "good.npz", GOOD))) == 3


BOTH = pytest.mark.parametrize("suffix", [".safetensors", ".npz"])


@BOTH
@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"item": None}, r"missing \['item'\]"),
        ({"more": np.zeros(3)}, r"unexpected \['more'\]"),
        ({"item": np.array([0, 1, 0])}, r"item is (<i8|I64)\[3\], not (<i4|I32) of 1 dim"),
        ({"item": np.array([0.0, 1, 0], np.float32)}, "item is (<f4|F32)"),
        ({"item": np.zeros((3, 1), np.int32)}, r"item is (<i4|I32)\[3, 1\]"),
        ({"images": np.zeros((1, 4, 4, 3), np.uint8)}, r"item in 0 \.\. 0, got 1"),
        ({"images": np.zeros((2, 0, 4, 3), np.uint8)}, "images of at least one value"),
        ({"item": np.zeros(0, np.int32), "seconds": np.zeros(0)}, "expected 1 .. 10000000 requests, got 0"),
        ({"item": np.zeros(2, np.int32)}, "one length"),
        ({"item": np.array([0, -1, 0], np.int32)}, "got -1"),
        ({"seconds": np.array([0, 1, 0.5])}, r"never fall, got seconds\[1\] = 1.0"),
        ({"seconds": np.array([0, 1, np.nan])}, r"got seconds\[2\] = nan"),
        ({"seconds": np.array([0, 1, np.inf])}, r"got seconds\[2\] = inf"),
        ({"seconds": np.array([-1, 1, 2.0])}, r"got seconds\[0\] = -1"),
        ({"phase": np.array([0, 1, 0], np.int16)}, "phase in 0 .. 0, got 1"),
        ({"source": np.array([0, -1, 0], np.int16)}, "source in 0 .. 32767, got -1"),
    ],
)
def test_a_bad_array_is_refused(tmp_path, suffix, changed, complaint):
    with pytest.raises(InputError, match=complaint):
        load_trace(write(tmp_path / f"t{suffix}", GOOD | changed))


@BOTH
@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b"{", "header of .* is damaged"),
        (b"", "header of .* is damaged"),
        (b"[" * 100_000, "header of .* is damaged"),
        (b" " * 2**21, "header has 2097[0-9]+ bytes, over"),
        (header_of(3), "damaged: format_version"),
        (header_of(2, phases=[]), "damaged: phases"),
        (header_of(2, phases=[1]), "damaged: phases.0"),
        (header_of(2, **{"import": "os"}), "damaged: import"),
        (b"[1]", "damaged"),
    ],
)
def test_a_bad_header_is_refused(tmp_path, suffix, header, complaint):
    with pytest.raises(InputError, match=complaint):
        load_trace(write(tmp_path / f"t{suffix}", GOOD, header))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"item": npy(np.zeros(3, ">i4"))}, "item is >i4"),
        ({"item": npy(np.zeros(3, np.int32), descr="|O")}, r"item is \|O"),
        ({"item": npy(np.zeros(3, np.int32), shape=(10**18,))}, "item has 4000000000000000000 bytes, over"),
        ({"item": npy(np.zeros(3, np.int32), shape=(4,))}, "item has 12 bytes, not the 16"),
        ({"item": npy(np.zeros(3, np.int32), shape=(2,))}, "item has 12 bytes, not the 8"),
        ({"item": npy(np.zeros(3, np.int32), shape=(-3,))}, "item has 12 bytes, not the -12"),
        ({"images": npy(np.zeros((2, 4, 4, 3), np.uint8), shape=(-2, -4, 4, 3))}, "trace: expected"),
        ({"images": npy(np.zeros(3, np.uint8), shape=(2**20, 2**20, 2**20, 3))}, "over 4294967296"),
        ({"images": npy(np.zeros(0, np.uint8), shape=(2**60, 2**60, 0, 3))}, "at least one value|too large|array"),
        ({"images": npy(np.zeros((2, 4, 4, 3), np.uint8), fortran_order=True)}, "columns first"),
        ({"item": b"\x93NUMPY\x02\x00" + b"\x00" * 20}, "format 1.0"),
        ({"item": b"nothing!"}, "magic"),
        ({"item": b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16}, "trace: expected"),
        ({"item": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535}, "trace: expected"),
    ],
)
def test_a_bad_member_of_version_1_is_refused(tmp_path, changed, complaint):
    with pytest.raises(InputError, match=complaint):
        load_trace(write(tmp_path / "t.npz", GOOD | changed))


@BOTH
def test_more_than_the_bound_is_refused_unread(tmp_path, suffix):
    images = np.zeros((100, 128, 128, 3), np.uint8)  # 5 MB of zeros; 5 kB when packed
    path = write(tmp_path / f"t{suffix}", GOOD | {"images": images})
    assert suffix != ".npz" or path.stat().st_size < 20_000
    with pytest.raises(InputError, match="images has 4915200 bytes, over 1000000"):
        load_trace(path, most_bytes=1_000_000)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def pickle_in_an_archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, item=np.array([Trap()], object), seconds=np.zeros(1), header=np.zeros(1))
    return file.getvalue()


@BOTH
@given(data=st.data())
def test_damage_is_refused(tmp_path_factory, suffix, data):
    """Cut off anywhere, or with any byte changed: a trace of whole, checked arrays, or a clear refusal."""
    folder = tmp_path_factory.mktemp("trace")
    good = write(folder / f"good{suffix}", GOOD).read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    changed = bytes([good[at] ^ data.draw(st.integers(1, 255))])
    bad = folder / f"bad{suffix}"
    bad.write_bytes(good[:at] + (b"" if data.draw(st.booleans()) else changed + good[at + 1 :]))
    try:
        loaded = load_trace(bad)
    except InputError:
        return
    assert (len(loaded), loaded.seconds.dtype) == (3, np.float64)
    if suffix == ".npz":  # which has checksums
        np.testing.assert_array_equal(loaded.item, GOOD["item"])
        np.testing.assert_array_equal(loaded.seconds, GOOD["seconds"])


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_member_packed_in_another_way_is_refused(tmp_path, method):
    """Their decompressors raise errors of their own, and take memory as they like."""
    with pytest.raises(InputError, match="packed in another way"):
        load_trace(write(tmp_path / "t.npz", GOOD, compression=method))


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\3\4nothing", b"{}", b"\x93NUMPY\x01\x00", struct.pack("<Q", 2**62) + b"{}",
     struct.pack("<Q", 3) + b"{x}", pickle_in_an_archive()],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(InputError, match="trace: expected"):
        load_trace(tmp_path / "t")


def test_names_are_checked(tmp_path):
    with pytest.raises(InputError, match="expected a file, got"):
        load_trace(tmp_path / "none.npz")
    with pytest.raises(InputError, match=r"\*.safetensors"):
        save_trace(tmp_path / "t.npz", Trace(item=np.zeros(1, np.int32), seconds=np.zeros(1)))
    assert not list(tmp_path.iterdir())
