"""Rows of a source that are read when they are needed, against arrays of the same rows."""

import dataclasses
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax import data
from gati_jax.errors import InputError
from tests.fitting import tiny

RNG = np.random.default_rng(0)
PIXELS, LABELS = RNG.integers(0, 256, (20, 6, 5, 3), np.uint8), np.arange(20)


class Counting:
    """A source that remembers how many rows were read, and by which threads."""

    def __init__(self, rows, labels=None):
        self.rows, self.labels, self.reads, self.threads = rows, labels, 0, set()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        assert type(index) is int
        self.reads += 1
        self.threads.add(threading.current_thread().name)
        return self.rows[index] if self.labels is None else (self.rows[index], self.labels[index])


@pytest.mark.parametrize(
    "rows",
    [slice(2, 9), 3, -1, np.array([5, 5, 0, 19]), np.arange(20) % 3 == 0, slice(0, 0), (slice(3, 5), 2), (4, 1)],
    ids=str,
)
def test_rows_are_indexed_as_an_array_is(rows):
    images = data.ImageRows(Counting(PIXELS)).take(np.arange(20)[::-1])
    assert images.shape == PIXELS.shape
    assert np.array_equal(images[rows], PIXELS[::-1][rows])
    assert np.array_equal(np.asarray(images), PIXELS[::-1])
    assert all(np.array_equal(*pair) for pair in zip(images, PIXELS[::-1], strict=True))


def test_batches_come_in_order_ahead_of_their_use_and_no_further():
    source = Counting(np.arange(1000, dtype=np.float32)[:, None])
    batches = data.read_batches((data.ImageRows(source), np.arange(1000)), data.full_batches(1000, 64))
    for i, (rows, numbers) in zip(range(5), batches, strict=False):
        assert np.array_equal(rows[:, 0], numbers)
        assert source.reads <= 1 + 64 * (i + 1 + 3)
    batches.close()
    assert len(source.threads) > 1
    last = list(data.read_batches((data.ImageRows(source),), data.full_batches(70, 64)))[-1][0]
    assert last[:, 0].tolist() == [64, 65, 66, 67, 68, 69, *[64] * 58]


def test_digests_labels_and_near_copies_of_a_stream_are_an_arrays():
    other = np.concatenate([RNG.integers(0, 256, (9, 6, 5, 3), np.uint8), PIXELS[3:7, :, ::-1] ^ 1])
    source = Counting(PIXELS, LABELS)
    rows, others = data.ImageRows(source), data.ImageRows(Counting(other))
    assert np.array_equal(data.row_digests(rows), data.row_digests(PIXELS))
    assert data.row_digests(rows.take(np.array([4, 1]))).tolist() == data.row_digests(PIXELS[[4, 1]]).tolist()
    assert np.asarray(rows.scan().labels).tolist() == LABELS.tolist()
    assert source.reads == 1 + 20  # of the shape, then once for all
    for one in (other, others):
        for two in (PIXELS, rows):
            assert data.count_near_copies(one, two) == 4
    assert data.count_near_copies(others) == data.count_near_copies(other) == 0


BROKEN = {
    "other shape": (lambda i: PIXELS[i, :4] if i == 15 else PIXELS[i], r"one size .*\(row 15\)"),
    "other dtype": (
        lambda i: PIXELS[i].astype(np.int32) if i == 15 else PIXELS[i],
        "dtype, got int32.* and uint8",
    ),
    "not finite": (lambda i: np.where(i == 15, np.nan, PIXELS[i].astype(np.float32)), "expected finite values"),
    "own error": (lambda i: {}[i] if i == 15 else PIXELS[i], r"row 15 of .* cannot be read: KeyError: 15"),
    "augmented": (
        lambda _: np.frombuffer(np.random.default_rng().bytes(90), np.uint8).reshape(6, 5, 3),
        "the same whenever it is read",
    ),
}


class Made:
    """A source whose rows come from a function."""

    def __init__(self, function):
        self.function = function

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return self.function(index)


def read_twice(rows):
    rows.scan()
    return rows[15]


@pytest.mark.parametrize("case", BROKEN)
def test_rows_that_differ_are_refused_in_one_line(case):
    function, message = BROKEN[case]
    rows = data.ImageRows(Made(function), name="images")
    with pytest.raises(InputError, match=f"images: .*{message}") as caught:
        read_twice(rows)
    assert "\n" not in str(caught.value)


def test_a_fit_and_a_replay_of_a_source_are_those_of_the_array():
    images, select = tiny.images()
    options = {"heads": [tiny.head(1, 2)], "config": dataclasses.replace(tiny.CONFIG, epochs=2), "progress": False}
    chain, labels = tiny.chain(), np.arange(len(select)) % tiny.CLASSES
    found = gati_jax.fit(chain, Counting(images), select=Counting(select), **options)
    expected = gati_jax.fit(chain, images, select=select, **options)
    for one, other in zip(found, expected, strict=True):
        assert all(np.array_equal(*leaves) for leaves in zip(*map(leaves_of, (one.params, other.params)), strict=True))
    table = gati_jax.replay(chain, found, Counting(select, labels))
    whole = gati_jax.replay(chain, expected, select, labels=labels)
    for column in ("answers", "classes", "scores", "rows", "labels"):
        assert np.array_equal(getattr(table, column), getattr(whole, column))
    with pytest.raises(InputError, match="expected images and fit disjoint"):
        gati_jax.replay(chain, found, Counting(images))
    with pytest.raises(InputError, match="expected select and fit disjoint"):
        gati_jax.fit(chain, Counting(images), select=Counting(images[:50]), **options)
    with pytest.raises(InputError, match=r"select: expected shape \[batch, 12\]"):
        gati_jax.fit(chain, Counting(images), select=Counting(select[:, :5]), **options)


def leaves_of(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_rows_run_in_pieces_where_activations_are_large(monkeypatch):
    """The same rows' results, to rounding, and none of more than a piece."""
    images, select = tiny.images()
    base = __import__("importlib").import_module("gati_jax.fitting.base")
    options = {"heads": [tiny.head(1)], "config": dataclasses.replace(tiny.CONFIG, epochs=2), "progress": False}
    whole = gati_jax.fit(tiny.chain(), images, select=select, **options)
    assert base.rows_at_once(tiny.chain(), 128) == 128
    each = 4 * (12 + 10 + 9)
    monkeypatch.setattr(base, "_SITE_BYTES", 9 * each)
    assert base.rows_at_once(tiny.chain(), 32) == 8
    sizes, run = [], base._run_base
    monkeypatch.setattr(base, "_run_base", lambda *a, **k: (sizes.append(len(a[1])), run(*a, **k))[1])
    found = gati_jax.fit(tiny.chain(), images, select=select, **options)
    assert set(sizes) == {8}
    for one, other in zip(leaves_of([c.params for c in found]), leaves_of([c.params for c in whole]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


STREAM = """
import resource
import jax, numpy as np
import gati_jax
from gati_jax import data
from tests.fitting import tiny

class Rows:
    def __init__(self, n, first):
        self.n, self.first = n, first
    def __len__(self):
        return self.n
    def __getitem__(self, index):
        row = np.full((64, 64, 3), self.first + index, np.uint32)
        return (row * np.arange(1, 4, dtype=np.uint32) * 2654435761 >> 8).astype(np.float32) / 2**24 - 0.5

def pool(params, x):
    return tiny.dense(params, x.mean((1, 2)))

rng = np.random.default_rng(0)
params = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 8), (8, 8), (8, 4))]
chain = gati_jax.Chain((pool, tiny.dense), tiny.linear, params, jax.ShapeDtypeStruct((64, 64, 3), np.float32))
def run(n):
    config = gati_jax.FitConfig(epochs=1, batch=64)
    found = gati_jax.fit(chain, Rows(n, 0), select=Rows(300, n), heads=[tiny.head(1)], config=config, progress=False)
    gati_jax.replay(chain, found, Rows(n, 10 * n))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
few = run(600)
print(run(16_000) - few)
"""


def test_memory_does_not_grow_with_the_rows_of_a_source():
    """16,000 rows of 49 kB, 786 MB, are fitted and replayed in hardly more memory than 600."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", STREAM], check=True, capture_output=True, text=True, env=environment)
    assert int(done.stdout.split()[-1]) < 200  # MB
