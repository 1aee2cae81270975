"""Bodies and tensors of the protocol <-> requests and NumPy arrays."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serve.protocol.codec import DTYPES, Incoming, Outgoing, decode, encode, to_array, to_bytes, to_json
from serve.protocol.messages import RequestError


def incoming(datatype, shape, **how):
    return Incoming("inputs[0]", "images", datatype, tuple(shape), **how)


@st.composite
def arrays(draw):
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(hnp.array_shapes(max_dims=4, max_side=4))
    elements = {"allow_nan": False, "allow_infinity": False} if datatype == "FP32" else None
    return datatype, draw(hnp.arrays(DTYPES[datatype], shape, elements=elements))


@given(arrays())
def test_bytes_come_in_without_a_copy_and_go_out_the_same(case):
    datatype, array = case
    raw = bytes(7) + array.tobytes()
    view = memoryview(raw)[7:]  # behind a JSON of any length: not aligned
    read = to_array(incoming(datatype, array.shape, raw=view))
    np.testing.assert_array_equal(read, array)
    assert np.shares_memory(read, np.frombuffer(raw, np.uint8))
    assert to_bytes(Outgoing("x", datatype, array.shape, read)) == array.tobytes()


@given(arrays(), st.booleans())
def test_numbers_come_in_flat_or_nested_and_go_out_flat(case, nested):
    datatype, array = case
    numbers = json.loads(json.dumps(array.tolist() if nested else array.ravel().tolist()))
    read = to_array(incoming(datatype, array.shape, numbers=numbers))
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)
    assert to_json(Outgoing("x", datatype, array.shape, read)) == array.ravel().tolist()


def test_strings_follow_their_lengths():
    out = Outgoing("class_name", "BYTES", (2,), ["élan".encode(), b""])
    assert to_bytes(out) == b"\x05\x00\x00\x00\xc3\xa9lan\x00\x00\x00\x00"
    assert to_json(out) == ["élan", ""]


def test_json_has_no_infinity_and_no_nan():
    values = np.array([np.inf, -np.inf, np.nan, 1.5], np.float32)
    largest = float(np.finfo(np.float32).max)
    numbers = to_json(Outgoing("score", "FP32", (4,), values))
    assert numbers == [largest, -largest, None, 1.5]
    json.dumps(numbers, allow_nan=False)


@pytest.mark.parametrize(
    ("datatype", "shape", "how", "message"),
    [
        ("UINT8", [2, 2], {"raw": b"abc"}, r"inputs\[0\]\.data: expected 4 bytes for UINT8\[2, 2\], got 3"),
        ("UINT8", [2, 2], {"raw": b"abcde"}, r"inputs\[0\]\.data: expected 4 bytes .* got 5"),
        ("FP32", [2], {"raw": bytes(7)}, r"inputs\[0\]\.data: expected 8 bytes"),
        ("UINT8", [2**31, 2**31, 2**31], {"raw": b"x"}, r"inputs\[0\]\.data: expected \d+ bytes"),
        ("UINT8", [-1, -4], {"raw": b"abcd"}, r"inputs\[0\]\.shape: expected no negative"),
        ("FP64", [1], {"raw": bytes(8)}, r"inputs\[0\]\.datatype: expected one of UINT8, INT32, FP32, got 'FP64'"),
        ("FP32", [1], {"raw": np.float32(np.nan).tobytes()}, r"inputs\[0\]\.data: expected finite"),
        ("FP32", [1], {"numbers": [math.inf]}, r"inputs\[0\]\.data: expected finite"),
        ("FP32", [1], {"numbers": [1e39]}, r"inputs\[0\]\.data: expected finite"),
        ("FP32", [1], {"numbers": ["1"]}, r"inputs\[0\]\.data: expected numbers for FP32"),
        ("FP32", [1], {"numbers": [True]}, r"inputs\[0\]\.data: expected numbers"),
        ("FP32", [1], {"numbers": [None]}, r"inputs\[0\]\.data: expected numbers"),
        ("FP32", [1], {"numbers": [{}]}, r"inputs\[0\]\.data: expected numbers"),
        ("UINT8", [1], {"numbers": [256]}, r"inputs\[0\]\.data: expected 0 to 255"),
        ("UINT8", [1], {"numbers": [-1]}, r"inputs\[0\]\.data: expected 0 to 255"),
        ("UINT8", [1], {"numbers": [1.5]}, r"inputs\[0\]\.data: expected whole numbers"),
        ("UINT8", [1], {"numbers": [10**30]}, r"inputs\[0\]\.data: expected whole numbers"),
        ("UINT8", [2, 2], {"numbers": [[1, 2], [3]]}, r"inputs\[0\]\.data: .* got a ragged list"),
        ("UINT8", [2, 2], {"numbers": [1, 2, 3]}, r"inputs\[0\]\.data: expected 4 numbers .* got shape \[3\]"),
        ("UINT8", [2, 3], {"numbers": [[1, 2], [3, 4], [5, 6]]}, r"inputs\[0\]\.data: .* got shape \[3, 2\]"),
        ("UINT8", [1], {"numbers": None}, r"inputs\[0\]\.data: .* got nothing"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(datatype, shape, how, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        to_array(incoming(datatype, shape, **how))


def test_text_among_numbers_takes_no_more_memory_than_the_body():
    """NumPy gives every element of a mixed list the width of its longest text: 64 x 100 kB of text x 4 bytes = 26 MB.

    Over sockets a body of 4 MB took 4 GB and blocked the event loop for a minute; a larger one is a MemoryError, a 500:
    2**22 elements as wide as 2**22 characters of 4 bytes are 2**46 bytes.
    """
    tracemalloc.start()
    try:
        with pytest.raises(RequestError):
            to_array(incoming("UINT8", [64], numbers=["a" * 100_000] + [1] * 63))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    with pytest.raises(RequestError):
        to_array(incoming("UINT8", [64], numbers=["a" * 2**22] + [1] * 2**22))


# Bodies: JSON, then bytes


def body(*sizes, rest=b"", data=None):
    inputs = [
        {"name": f"x{i}", "datatype": "UINT8", "shape": [size], "parameters": {"binary_data_size": size}}
        | ({} if data is None else {"data": data})
        for i, size in enumerate(sizes)
    ]
    text = json.dumps({"inputs": inputs}).encode()
    return text + rest, str(len(text))


def test_every_tensor_gets_its_part_of_the_bytes():
    request = decode(*body(2, 0, 3, rest=b"abcde"), model="m")
    assert [bytes(tensor.raw or b"") for tensor in request.inputs] == [b"ab", b"", b"cde"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (body(2, 3, rest=b"abcd"), r"inputs\[1\]\.parameters\.binary_data_size: .*got 3, and 2 bytes"),
        (body(2, rest=b"abc"), r"inputs: .* got 1 bytes more"),
        (body(2, rest=b"ab", data=[1]), r"inputs\[0\]\.parameters\.binary_data_size: .*got data beside it"),
        ((b"{}", "3"), r"Inference-Header-Content-Length: .*got '3' with a body of 2"),
        ((b"{}", "-1"), r"Inference-Header-Content-Length"),
        ((b"{}", "1e1"), r"Inference-Header-Content-Length"),
        ((b"{}", "²"), r"Inference-Header-Content-Length"),
        ((b"{}", "9" * 5000), r"Inference-Header-Content-Length"),
        ((b"{}", None), r"inputs: Field required"),
        ((b"{", None), r"body: Invalid JSON"),
        ((b"\xff", None), r"body: Invalid JSON"),
        ((b"[" * 100_000, None), r"body: Invalid JSON"),
        ((b"[]", None), r"body: Input should be"),
        ((b'{"inputs": [{"name": 1, "datatype": "UINT8", "shape": [1]}]}', None), r"inputs\[0\]\.name: Input should"),
        ((b'{"inputs": [{"name": "x", "datatype": "UINT8", "shape": ["1"]}]}', None), r"inputs\[0\]\.shape\[0\]: "),
        ((b'{"inputs": [{"name": "x", "datatype": "UINT8", "shape": [-1]}]}', None), r"inputs\[0\]\.shape\[0\]: "),
        ((b'{"inputs": [], "id": 3}', None), r"id: Input should"),
    ],
)
def test_bodies_whose_parts_do_not_fit_are_refused_by_name(made, message):
    with pytest.raises(RequestError, match=f"^{message}"):
        decode(*made, model="m")


@pytest.mark.parametrize("value", [b'"2"', b"true", b"2.0", b"-1", b"9" * 4000])
def test_the_size_of_a_binary_tensor_is_a_whole_number(value):
    text = b'{"inputs":[{"name":"x","datatype":"UINT8","shape":[2],"parameters":{"binary_data_size":%s}}]}' % value
    with pytest.raises(RequestError, match=r"^inputs\[0\]\.parameters\.binary_data_size"):
        decode(text + b"ab", str(len(text)), model="m")


def test_answers_are_json_with_bytes_behind_it():
    one = Outgoing("exit", "INT32", (2,), np.array([1, 2], np.int32), binary=True)
    other = Outgoing("score", "FP32", (1,), np.array([np.inf], np.float32), binary=False)
    sent, json_bytes = encode({"id": "a"}, [one, other, one])
    described = json.loads(sent[:json_bytes])["outputs"]
    assert [tensor.get("parameters", {}).get("binary_data_size") for tensor in described] == [8, None, 8]
    assert sent[json_bytes:] == b"\x01\0\0\0\x02\0\0\0" * 2
    sent, json_bytes = encode({}, [other])
    assert json_bytes is None
    assert json.loads(sent)["outputs"][0]["data"] == [float(np.finfo(np.float32).max)]
