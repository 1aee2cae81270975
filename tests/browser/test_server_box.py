"""The box of the server's page: which numbers it takes for pixels, what it refuses, and in which words."""

import io
import struct
import wave
from dataclasses import replace

import numpy as np
import pytest

from tests.browser.conftest import NARROW, overflows
from tests.browser.test_server_page import PATIENCE
from tests.serve import fake

SIZE = int(np.prod(fake.SHAPE))
PIXELS = np.arange(SIZE).reshape(fake.SHAPE)  # begins with 0: the fake engine says "cat"


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def wav(samples, *, channels=1):
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(np.asarray(samples, "<i2").tobytes())
    return file.getvalue()


def serving(**changes):
    """A front of another model than the fake engine's own."""
    front = fake.Front(ready=False)
    model = replace(fake.MODEL, **changes)
    front.loaded = front.entry.loaded = front.loaded._replace(model=model)
    front.warm_up()
    return front


def of_levels(levels):
    return serving(normalization={"mean": (0.5,), "std": (0.5,), "scale": 1 / levels})


def box(page):
    """Returns what the box says of a file: a verdict, or why there is none."""
    page.locator("#content").wait_for(timeout=PATIENCE)

    def ask(buffer, name="a.npy", kind=""):
        page.evaluate("document.querySelector('#answer').replaceChildren()")
        page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": buffer})
        said = page.locator("#answer .verdict, #answer .error")
        said.wait_for(timeout=PATIENCE)
        return said.inner_text().replace("\u00d7", "x").replace("\u2019", "'")

    return ask


@pytest.mark.parametrize("levels", [16, 255])
def test_the_same_pixels_are_answered_alike_whatever_their_datatype(address_of, visit, levels):
    front = of_levels(levels)
    ask = box(visit(address_of(front)))
    for kind in ("u1", "<i4", "<i8", "<u8", "<f4", "<f8"):
        for shape in (fake.SHAPE, (1, *fake.SHAPE), fake.SHAPE[:2], (SIZE,)):
            assert ask(npy(PIXELS.astype(kind).reshape(shape))).startswith("cat (class 0), left early"), (
                kind,
                shape,
            )
    sent = [call["images"] for call in front.engine.calls]
    assert len(sent) == 2 * 6 * 4
    for images in sent:
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images[0], PIXELS)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (PIXELS / 16, "whole numbers from 0 to 16, and this has 0.0625. Numbers that are normalised already"),
        (np.full(fake.SHAPE, np.nan, "f4"), "and this has NaN"),
        (PIXELS - 1, "whole numbers from 0 to 16, and this has -1."),
        (np.full(fake.SHAPE, 17.0), "whole numbers from 0 to 16, and this has 17."),
        (np.full(fake.SHAPE, 200, np.uint8), "whole numbers from 0 to 16, and this has 200."),
        (PIXELS.reshape(3, 2, 1), "The network takes 2 x 3 x 1 (6 numbers), and this is 3 x 2 x 1."),
        (np.stack([PIXELS, PIXELS]), "and this is 2 x 2 x 3 x 1."),
        (np.zeros((2000, 1000)), "and this is 2000 x 1000."),
        (np.asfortranarray(PIXELS.reshape(2, 3)), "Fortran's order"),
        (PIXELS.astype("c8"), "numbers of the kind <c8"),
        (PIXELS.astype(">i2"), "numbers of the kind >i2"),
    ],
)
def test_numbers_that_are_no_pixels_are_refused_before_they_are_sent(address_of, visit, array, said):
    front = of_levels(16)
    assert said in box(visit(address_of(front)))(npy(array))
    assert not front.engine.calls


def test_files_that_are_damaged_or_of_another_kind_are_refused_in_a_sentence(address_of, visit):
    front, good = of_levels(16), npy(PIXELS.astype("<f8"))
    files = [
        ("a.npy", good[:-1], "a.npy is damaged: it ends too early."),
        ("a.npy", good[:50], "a.npy is damaged: it ends too early."),
        ("a.npy", b"\x93NUMPY\x01\x00\xff\xff{", "a.npy is damaged: it ends too early."),
        ("a.npy", b"\x93NUM", "This is no array of NumPy, whatever its name says."),
        ("a.npy", good.replace(b"<f8", b"toS"), "numbers of the kind toS"),
        ("a.wav", wav(range(100)), "a.wav cannot be read. The network takes 2 x 3 x 1: whole numbers from 0 to 16."),
        ("a.png", b"garbage", "This browser cannot show a.png as a picture."),
        ("x" * 500 + ".bin", b"", "x… cannot be read. The network takes"),
    ]
    page = visit(address_of(front), width=NARROW)
    ask = box(page)
    for name, buffer, said in files:
        kind = {"png": "image/png", "wav": "audio/wav"}.get(name[-3:], "")
        assert said in ask(buffer, name, kind), name
        assert not overflows(page)
    for text, said in (
        ("1 2 x", "got x."),
        ("", "got none."),
        ("1 2 3", "and this is 3."),
        ("1 1 1 1 1 17", "has 17."),
    ):
        page.evaluate("([id, text]) => { document.getElementById(id).value = text; }", ["numbers", text])
        page.evaluate("document.getElementById('numbers-form').requestSubmit()")
        page.locator("#answer .error").get_by_text(said).wait_for(timeout=PATIENCE)
    assert ".wav" not in page.get_attribute("#file", "accept")
    assert not front.engine.calls


def test_a_network_of_one_row_takes_floats_and_sounds_as_they_are(address_of, visit):
    front = serving(input_shape=(SIZE, 1), datatypes=("FP32",), normalization=None)
    page = visit(address_of(front))
    ask = box(page)
    assert ".wav" in page.get_attribute("#file", "accept")
    floats = np.linspace(0.25, 0.75, SIZE)
    assert ask(npy(floats)).startswith("cat")
    assert ask(wav([2**14, 0] * 4, channels=2), "a.wav").startswith("cat")  # 4 samples, the mean of two channels
    damaged = bytearray(wav(range(100)))
    damaged[22:24] = struct.pack("<H", 0)
    assert "The sound has 0 channels of 16 bits" in ask(bytes(damaged), "a.wav")
    assert "finite numbers of 32 bits, and this has 2.5e+299" in ask(npy(floats * 1e300))
    first, second = (call["images"][0] for call in front.engine.calls[::2])
    np.testing.assert_allclose(first[:, 0], floats, rtol=1e-6)
    np.testing.assert_array_equal(second[:, 0], [0.25] * 4 + [0.0] * (SIZE - 4))


def test_a_body_that_the_server_would_not_read_is_refused_at_once(address_of, visit):
    front = serving(input_shape=(60, 60, 1))  # 3600 pixels, of which fake.LIMIT allows 4096 bytes with their head
    front.door.limits = replace(front.door.limits, max_body=3000)
    assert "it takes 3,000 bytes, and this is 3,7" in box(visit(address_of(front)))(npy(np.zeros((60, 60), "u1")))
