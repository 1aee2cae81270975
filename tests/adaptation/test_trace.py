"""Recorded workloads: what is written comes back, and whatever else a file holds is refused before it is unpacked."""

import dataclasses
import io
import json
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gati_jax import InputError
from gati_jax.adaptation import Trace, load_trace, save_trace

HEADER = {"format_version": 1, "phases": ["all"], "about": {}}


def npy(array, **changed):
    """Return an .npy file of the array; ``changed`` says otherwise in its header."""
    header = {"descr": np.asarray(array).dtype.str, "fortran_order": False, "shape": np.shape(array)} | changed
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + np.ascontiguousarray(array).tobytes()


def members(**changed):
    """Return the members of a good file of three requests, and other ones."""
    header = np.frombuffer(json.dumps(changed.pop("header_says", HEADER)).encode(), np.uint8)
    good = {
        "header": npy(header),
        "item": npy(np.array([0, 1, 0], np.int32)),
        "seconds": npy(np.array([0, 0.5, 0.5])),
        "images": npy(np.zeros((2, 4, 4, 3), np.uint8)),
    }
    return {name: content for name, content in (good | changed).items() if content is not None}


def write(path, contents, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.npy", content)
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
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    save_trace(path, Trace(**content))
    loaded = load_trace(path)
    for field in dataclasses.fields(Trace):
        np.testing.assert_equal(getattr(loaded, field.name), content[field.name])
    save_trace(path.with_name("again.npz"), loaded)
    assert path.with_name("again.npz").read_bytes() == path.read_bytes()


def test_a_file_may_be_written_by_hand(tmp_path):
    header = np.frombuffer(json.dumps(HEADER).encode(), np.uint8)
    np.savez(tmp_path / "t.npz", header=header, item=np.array([3, 4], np.int32), seconds=np.array([0.0, 1.0]))
    trace = load_trace(tmp_path / "t.npz")
    assert (trace.images, trace.phases, trace.item.tolist()) == (None, ("all",), [3, 4])
    assert trace.phase.tolist() == trace.source.tolist() == [0, 0]


def test_the_good_file_is_good(tmp_path):
    assert len(load_trace(write(tmp_path / "t.npz", members()))) == 3


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"item": None}, r"missing \['item'\]"),
        ({"more": npy(np.zeros(3))}, r"unexpected \['more'\]"),
        ({"item": npy(np.array([0, 1, 0]))}, r"item is <i8\[3\], not <i4 of 1 dim"),
        ({"item": npy(np.array([0.0, 1, 0], np.float32))}, "item is <f4"),
        ({"item": npy(np.zeros((3, 1), np.int32))}, r"item is <i4\[3, 1\]"),
        ({"item": npy(np.zeros(3, ">i4"))}, "item is >i4"),
        ({"item": npy(np.zeros(3, np.int32), descr="|O")}, r"item is \|O"),
        ({"item": npy(np.zeros(3, np.int32), shape=(10**18,))}, "item has 4000000000000000000 bytes, over"),
        ({"item": npy(np.zeros(3, np.int32), shape=(4,))}, "item has 12 bytes, not the 16"),
        ({"item": npy(np.zeros(3, np.int32), shape=(2,))}, "item has 12 bytes, not the 8"),
        ({"item": npy(np.zeros(3, np.int32), shape=(-3,))}, "not as NumPy writes"),
        ({"images": npy(np.zeros(3, np.uint8), shape=(2**20, 2**20, 2**20, 3))}, "over 4294967296"),
        ({"images": npy(np.zeros(0, np.uint8), shape=(2**60, 2**60, 0, 3))}, "at least one value|too large|array"),
        ({"images": npy(np.zeros((2, 4, 4, 3), np.uint8), fortran_order=True)}, "rows before columns"),
        ({"images": npy(np.zeros((1, 4, 4, 3), np.uint8))}, r"item in 0 \.\. 0, got 1"),
        ({"item": b"\x93NUMPY\x02\x00" + b"\x00" * 20}, "format 1.0"),
        ({"item": b"nothing"}, "format 1.0"),
        ({"item": b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16}, "not as NumPy writes"),
        ({"item": npy(np.zeros(0, np.int32)), "seconds": npy(np.zeros(0))}, "expected 1 .. 10000000 requests, got 0"),
        ({"item": npy(np.zeros(2, np.int32))}, "one length"),
        ({"item": npy(np.array([0, -1, 0], np.int32))}, "got -1"),
        ({"seconds": npy(np.array([0, 1, 0.5]))}, r"never fall, got seconds\[1\] = 1.0"),
        ({"seconds": npy(np.array([0, 1, np.nan]))}, r"got seconds\[2\] = nan"),
        ({"seconds": npy(np.array([0, 1, np.inf]))}, r"got seconds\[2\] = inf"),
        ({"seconds": npy(np.array([-1, 1, 2.0]))}, r"got seconds\[0\] = -1"),
        ({"phase": npy(np.array([0, 1, 0], np.int16))}, "phase in 0 .. 0, got 1"),
        ({"source": npy(np.array([0, -1, 0], np.int16))}, "source in 0 .. 32767, got -1"),
        ({"header": npy(np.frombuffer(b"{", np.uint8))}, "header of .* is damaged"),
        ({"header": npy(np.frombuffer(b"[" * 100_000, np.uint8))}, "header of .* is damaged"),
        ({"header": npy(np.zeros(2**21, np.uint8))}, "header has 2097152 bytes, over"),
        ({"header_says": HEADER | {"format_version": 2}}, "damaged: format_version"),
        ({"header_says": HEADER | {"phases": []}}, "damaged: phases"),
        ({"header_says": HEADER | {"phases": [1]}}, "damaged: phases.0"),
        ({"header_says": HEADER | {"import": "os"}}, "damaged: import"),
        ({"header_says": [1]}, "damaged"),
    ],
)
def test_a_bad_member_is_refused(tmp_path, changed, complaint):
    with pytest.raises(InputError, match=complaint):
        load_trace(write(tmp_path / "t.npz", members(**changed)))


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    bomb = members(images=npy(np.zeros((100, 512, 512, 3), np.uint8)))  # 79 MB of zeros in 80 kB
    path = write(tmp_path / "t.npz", bomb)
    assert path.stat().st_size < 200_000
    with pytest.raises(InputError, match="images has 78643200 bytes, over 1000000"):
        load_trace(path, most_bytes=1_000_000)


def test_pickles_are_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    np.savez(tmp_path / "t.npz", item=np.array([Trap()], object), seconds=np.zeros(1), header=np.zeros(1))
    with pytest.raises(InputError, match="trace: expected"):
        load_trace(tmp_path / "t.npz")


@given(data=st.data())
def test_no_damage_gets_through(tmp_path_factory, data):
    """Cut off anywhere, or with any byte changed: the trace that was written, or a clear refusal."""
    folder = tmp_path_factory.mktemp("trace")
    good = write(folder / "good.npz", members()).read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    changed = bytes([good[at] ^ data.draw(st.integers(1, 255))])
    bad = good[:at] + (b"" if data.draw(st.booleans()) else changed + good[at + 1 :])
    (folder / "bad.npz").write_bytes(bad)
    try:
        loaded = load_trace(folder / "bad.npz")
    except InputError:
        return
    np.testing.assert_array_equal(loaded.item, [0, 1, 0])
    np.testing.assert_array_equal(loaded.seconds, [0, 0.5, 0.5])


@pytest.mark.parametrize("content", [b"", b"PK\3\4nothing", b"{}", b"\x93NUMPY\x01\x00"])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "t.npz").write_bytes(content)
    with pytest.raises(InputError, match="trace: expected"):
        load_trace(tmp_path / "t.npz")


def test_names_are_checked(tmp_path):
    with pytest.raises(InputError, match="expected a file, got"):
        load_trace(tmp_path / "none.npz")
    with pytest.raises(InputError, match=r"\*.npz"):
        save_trace(tmp_path / "t.json", Trace(item=np.zeros(1, np.int32), seconds=np.zeros(1)))
    assert not list(tmp_path.iterdir())
