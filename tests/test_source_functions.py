"""Images from functions of the user's own, against what they return; what else they may do is refused in one line."""

import sys
from typing import Any

import numpy as np
import pytest

from gati_jax import data
from gati_jax.errors import InputError

Image = pytest.importorskip("PIL.Image", reason="needs the extra train")
RNG = np.random.default_rng(0)
PIXELS, LABELS = RNG.integers(0, 256, (20, 6, 5, 3), np.uint8), np.arange(20)


def test_a_function_gives_images_with_labels_or_a_source():
    pairs = [(PIXELS[i], int(LABELS[i])) for i in range(20)]
    by_name = [{"image": PIXELS[i], "label": LABELS[i]} for i in range(20)]
    options: dict[str, Any]
    for function in (lambda: (PIXELS, LABELS), lambda split: {"all": pairs}[split], lambda: by_name):
        for options in ({}, {"memory_mb": 0}):
            loaded = data.load_function(function, "all[5:15]", **options)
            assert loaded.labels is not None
            assert np.array_equal(np.asarray(loaded.images), PIXELS[loaded.labels])
    resized = data.load_function(lambda: PIXELS, "all", resize=(3, 4), shuffle_seed="none")
    assert resized.labels is None
    expected = Image.fromarray(PIXELS[7]).resize((4, 3), Image.Resampling.BILINEAR)
    assert np.array_equal(resized.images[7], np.asarray(expected))


class Sized:
    """A source that says that it has so many rows, of 20."""

    def __init__(self, n, *, leaves=False):
        self.n, self.leaves = n, leaves

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if self.leaves:
            sys.exit(4)
        return PIXELS[index]


BAD_FUNCTIONS = {
    "no split": (lambda: PIXELS, "train", "split: expected all"),
    "nothing": (lambda: None, "all", "expected images, .* got NoneType"),
    "labels": (lambda: (PIXELS, LABELS[:3]), "all", "expected 20 labels"),
    "names": (lambda: (PIXELS, ["a"] * 20), "all", "expected an integer as label"),
    "text": (lambda: "images", "all", "expected images, .* got str"),
    "no rows": (lambda: PIXELS[:0], "all", "expected at least one row, got none"),
    "failing": (
        lambda: {}["images"],
        "all",
        r"data.name: mine:images failed: KeyError: 'images' \(.*test_source_functions.py, line",
    ),
    "leaving": (lambda: sys.exit(3), "all", "data.name: mine:images failed: SystemExit: 3"),
    "ragged labels": (lambda: (PIXELS, [[1], [2, 3]]), "all", "data.name: expected an array, got rows of different"),
    "less than no rows": (
        lambda: Sized(-1),
        "all",
        "expected a source of which len.. is the number of rows, got Value",
    ),
    "half a row": (lambda: Sized(0.5), "all", "expected a source of which len.. is the number of rows, got TypeError"),
    "too many": (lambda: Sized(10**12), "all", "data.name: expected at most 268435456 rows, got 1000000000000"),
    "fewer than it says": (lambda: Sized(21), "all", "row 20 of Sized cannot be read: IndexError: "),
    "leaving at a row": (lambda: Sized(20, leaves=True), "all", "cannot be read: SystemExit: 4"),
    "objects": (lambda: [object()] * 3, "all", "expected an array of numbers"),
}


@pytest.mark.parametrize("case", BAD_FUNCTIONS)
def test_what_else_a_function_gives_is_refused_in_one_line(case):
    function, split, message = BAD_FUNCTIONS[case]
    with pytest.raises(InputError, match=message) as caught:
        data.load_function(function, split, name="mine:images")
    assert "\n" not in str(caught.value)
