"""Bundles: round trips bit for bit, damage and malice that end in a BundleError, saves that are interrupted or killed.

Run as a script, this file is the victim of the kill test: see ``main``.
"""

import functools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import gati_jax
from gati_jax import BundleError, Candidate, Certificate, Chain, CostTable, InputError, Normalization, Plan, bundle
from gati_jax._folder import digests, previous
from gati_jax._manifest import PlanEntry, Plans, Provenance, read_json, write_json
from gati_jax.caches import FullyConnected, Grid, LinearSelector, SortedSelector
from gati_jax.models import ResNet, fold, init, to_chain

WIDTH, CLASSES = 4, 3


def block(params, x):
    return jnp.tanh(x @ params["w"])


def classify(params, x):
    return x @ params["w"]


@functools.cache
def cache_shapes(hidden: int) -> Any:
    """Shapes of a cache's parameters: tracing is enough, so the victim of the kill test starts no device."""
    predictor, selector, key = FullyConnected(CLASSES, hidden=hidden), SortedSelector(), jax.random.key
    return jax.eval_shape(
        lambda: {
            "predictor": predictor.init(key(0), jnp.zeros((1, WIDTH))),
            "selector": selector.init(key(0), jnp.zeros((1, CLASSES))),
        }
    )


def drawn(rng: np.random.Generator, make_tree: Callable[[], Any]) -> Any:
    """Random values in the shapes that ``make_tree`` would give, which is traced but not compiled."""
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), jax.eval_shape(make_tree))


def cache(rng: np.random.Generator, name: str, site: int, hidden: int = 5) -> Candidate:
    """A cache with random parameters, biases and statistics included."""
    params = drawn(rng, lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), cache_shapes(hidden)))
    return Candidate(name, site, FullyConnected(CLASSES, hidden=hidden), SortedSelector(), params)


def own_chain(rng: np.random.Generator, width: int = WIDTH) -> Chain:
    params = [{"w": rng.normal(size=(width, width)).astype(np.float32)} for _ in range(3)]
    params.append({"w": rng.normal(size=(width, CLASSES)).astype(np.float32)})
    return Chain((block,) * 3, classify, params, jax.ShapeDtypeStruct((width,), np.dtype("float32")))


def make_plan(caches: tuple[Candidate, ...], depth: int = 3, threshold: float = 2.0) -> Plan:
    """Two caches opened one after the other."""
    path = np.array([[np.inf, np.inf], [threshold, np.inf], [threshold, threshold]], np.float32)
    return Plan(
        names=tuple(c.name for c in caches),
        sites=tuple(c.site for c in caches),
        depth=depth,
        path=path,
        disagreement=np.array([0.0, 0.01, 1 / 3]),
        mean_ms=np.array([3.0, 2.5, 0.1]),
        n=2,
        rows=np.array([1, 2**64 - 1], np.uint64),
    )


def make_certificate(plan: Plan, step: int = 2) -> Certificate:
    return Certificate(
        epsilon=0.1, delta=0.05, step=step, n=100, disagreements=2, p_value=0.01, plan_hash=plan.hash,
        data_fingerprint="ab" * 16, stays_off=("a sentence",),
    )  # fmt: skip


Parts = tuple[Chain, tuple[Candidate, ...], Plan, Certificate]


def make(seed: int) -> Parts:
    """What ``save_bundle`` takes, made by hand: three blocks, caches at sites 1 and 2."""
    rng = np.random.default_rng(seed)
    chain = own_chain(rng)
    caches = (cache(rng, "fc@1", 1), cache(rng, "fc@2", 2))
    plan = make_plan(caches)
    return chain, caches, plan, make_certificate(plan)


REQUESTS = np.random.default_rng(9).normal(size=(32, WIDTH)).astype(np.float32)
COSTS = CostTable(device="test", batch=1, blocks_ms=(1.0, 0.1, 1 / 3), lookup_ms={"fc@1": 0.05, "fc@2": 1e-9})


def in_memory(parts: Parts) -> bundle.Bundle:
    chain, caches, plan, certificate = parts
    return bundle.Bundle(chain=chain, caches=caches, plan=plan, certificate=certificate)


def answers(b: bundle.Bundle, requests: np.ndarray = REQUESTS) -> list[bytes]:
    """Classes, exits, scores and logits as bytes: equal only if every bit is."""
    return [np.asarray(column).tobytes() for column in gati_jax.infer_batch(b, requests)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A bundle that no test changes."""
    path = tmp_path_factory.mktemp("saved") / "bundle"
    gati_jax.save_bundle(path, *make(1), costs=[COSTS])
    return path


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "bundle")


def load(path: Path) -> bundle.Bundle:
    """Load with the structure of the chain, but none of the saved parameters."""
    return gati_jax.load_bundle(path, chain=make(77)[0])


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file holds; ``change`` may return something else to write instead."""
    value = json.loads(file.read_bytes())
    replacement = change(value)
    file.write_text(json.dumps(value if replacement is None else replacement))


def sign(folder: Path) -> None:
    """Make the list of digests true again, as whoever forges a bundle would."""
    files = {k: v for k, v in digests(folder).items() if k != "manifest.json" and not k.startswith("tuning/")}
    edit(folder / "manifest.json", lambda manifest: manifest.update(files=files))


# --- Round trips ------------------------------------------------------------------------------------------------------


def test_own_chain_answers_bit_for_bit(saved):
    loaded, original = load(saved), in_memory(make(1))
    assert len(set(np.asarray(gati_jax.infer_batch(original, REQUESTS).exit).tolist())) == 3  # every exit is tested
    assert answers(loaded) == answers(original)
    assert answers(loaded) != answers(in_memory(make(9)))


@pytest.fixture(scope="module")
def residual() -> Parts:
    """A small ResNet with random weights, with a projection and a normalization, and random caches."""
    network = ResNet(stages=(1, 1), widths=(4, 8), shortcut="B", classes=5, input_shape=(8, 8, 3))
    normalization = Normalization(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), scale=1 / 256)
    rng = np.random.default_rng(3)
    params = drawn(rng, lambda: fold(init(network, jax.random.key(0))))
    chain = to_chain(network, params, normalization)
    caches = []
    for site, selector in ((0, LinearSelector()), (1, SortedSelector(hidden=3, top=2))):
        predictor = Grid(5, cells=2, hidden=6)
        parts = {
            "predictor": (predictor, (1, *chain.site_specs[site].shape)),
            "selector": (selector, (1, 5)),
        }
        params = {
            part: drawn(rng, lambda module=module, shape=shape: module.init(jax.random.key(0), jnp.zeros(shape)))
            for part, (module, shape) in parts.items()
        }
        caches.append(Candidate(f"grid@{site}", site, predictor, selector, params))
    plan = make_plan(tuple(caches), depth=2)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    scores = gati_jax.replay(chain, caches, pixels).scores
    path = np.array([[np.inf, np.inf], np.median(scores, axis=1)], np.float32)  # about half of the requests hit
    plan = Plan(**{**vars(plan), "path": path, "disagreement": plan.disagreement[:2], "mean_ms": plan.mean_ms[:2]})
    return chain, tuple(caches), plan, make_certificate(plan, step=1)


def test_residual_network_loads_without_its_chain(residual, tmp_path):
    gati_jax.save_bundle(tmp_path / "b", *residual)
    loaded = gati_jax.load_bundle(tmp_path / "b")
    assert loaded.chain.normalization == residual[0].normalization
    assert loaded.chain.network == residual[0].network
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    assert len(set(np.asarray(gati_jax.infer_batch(loaded, pixels).exit).tolist())) > 1
    assert answers(loaded, pixels) == answers(in_memory(residual), pixels)
    one, many = gati_jax.infer(loaded, pixels[3]), gati_jax.infer_batch(loaded, pixels)
    assert (int(one.exit), int(one.class_index)) == (int(many.exit[3]), int(many.class_index[3]))


def test_what_is_known_beside_the_arrays_round_trips(tmp_path):
    parts = make(1)
    provenance = Provenance(
        created="now", versions={"jax": "0"}, seed=3, data_fingerprints={"fit": "é"}, command=["a b"],
        config={"nested": {"list": [1, 2.5, None, "x"]}},
    )  # fmt: skip
    other = CostTable(device="other-device", batch=8, blocks_ms=(0.0,), lookup_ms={}, spread=0.25)
    names = ("one", "<two>", "drei ß")
    gati_jax.save_bundle(tmp_path / "b", *parts, class_names=names, provenance=provenance, costs=[COSTS, other])
    loaded = load(tmp_path / "b")
    assert loaded.class_names == names
    assert loaded.provenance == provenance
    assert sorted(loaded.costs, key=lambda table: table.device) == [other, COSTS]
    assert loaded.certificate == parts[3]
    assert same_plan(loaded.plan, parts[2])


def same_plan(one: Plan, other: Plan) -> bool:
    def values(plan: Plan) -> list[Any]:
        return [v.tobytes() if isinstance(v, np.ndarray) else v for v in vars(plan).values()]

    return values(one) == values(other) and one.hash == other.hash


def test_cost_tables_of_one_device_at_two_batch_sizes_are_both_kept(tmp_path):
    tables = [CostTable(device="test", batch=b, blocks_ms=(float(b),), lookup_ms={}) for b in (1, 8)]
    gati_jax.save_bundle(tmp_path / "b", *make(1), costs=tables)
    assert sorted(load(tmp_path / "b").costs, key=lambda table: table.batch) == tables


thresholds = st.one_of(st.just(math.inf), st.floats(width=32, allow_nan=False, allow_infinity=False))


@settings(max_examples=60, deadline=None)
@given(
    path=hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(0, 4)), elements=thresholds),
    rows=hnp.arrays(np.uint64, st.integers(0, 5)),
    data=st.data(),
)
def test_plan_file_round_trips(path, rows, data, tmp_path_factory):
    steps, m = path.shape
    seen = data.draw(hnp.arrays(np.float64, (2, steps), elements=st.floats(0, 1e9)))
    plan = Plan(
        names=tuple(f"c{i}" for i in range(m)), sites=tuple(range(m)), depth=m + 1, path=path, disagreement=seen[0],
        mean_ms=seen[1], n=len(rows), rows=rows,
    )  # fmt: skip
    file = tmp_path_factory.mktemp("plan") / "plans.json"
    write_json(file, Plans(plans=(PlanEntry.of(plan),)))
    assert same_plan(read_json(file, Plans).plans[0].plan(), plan)


@pytest.mark.parametrize("threshold", [-np.inf, np.nan, np.float64(0.1)], ids=["-inf", "nan", "float64"])
def test_no_plan_is_saved_that_cannot_be_loaded(tmp_path, threshold):
    chain, caches, plan, _ = make(1)
    path = np.array([[np.inf, np.inf], [threshold, np.inf]], np.asarray(threshold).dtype)
    try:
        plan = Plan(**{**vars(plan), "path": path, "disagreement": np.zeros(2), "mean_ms": np.zeros(2)})
        gati_jax.save_bundle(tmp_path / "b", chain, caches, plan, make_certificate(plan, step=1))
    except InputError:
        return  # refusing is fine, too
    loaded = load(tmp_path / "b").plan
    np.testing.assert_array_equal(loaded.path, path.astype(np.float32))


def test_uncertified_bundle_lets_the_base_answer(tmp_path):
    chain, caches, plan, _ = make(1)
    gati_jax.save_bundle(tmp_path / "b", chain, caches, plan, make_certificate(plan, step=-1))
    prediction = gati_jax.infer_batch(load(tmp_path / "b"), REQUESTS)
    assert set(np.asarray(prediction.exit).tolist()) == {3}
    np.testing.assert_array_equal(prediction.class_index, np.argmax(chain(jnp.asarray(REQUESTS)), -1))


def test_only_caches_of_the_certified_step_run(tmp_path):
    chain, caches, plan, _ = make(1)
    gati_jax.save_bundle(tmp_path / "b", chain, caches, plan, make_certificate(plan, step=1))
    loaded = load(tmp_path / "b")
    assert [c.name for c in loaded.caches] == ["fc@1", "fc@2"]
    assert [c.name for c in loaded.cascade.caches] == ["fc@1"]


def widen(params, x):
    return jnp.tanh(x @ params["w"].astype(x.dtype))


def test_parameters_keep_their_dtype(tmp_path):
    chain, caches, plan, certificate = make(1)
    params = [{"w": jnp.asarray(chain.params[0]["w"], dtype)} for dtype in ("bfloat16", "float16", "int8")]
    mixed = Chain((widen,) * 3, classify, [*params, chain.params[3]], chain.input_spec)
    gati_jax.save_bundle(tmp_path / "b", mixed, caches, plan, certificate)
    loaded = gati_jax.load_bundle(tmp_path / "b", chain=jax.tree.map(jnp.zeros_like, mixed))
    assert _bits(loaded.chain.params) == _bits(mixed.params)
    with pytest.raises(BundleError, match=r"3 misshapen: base/0/w .*expected float32"):
        load(tmp_path / "b")


def _bits(tree: Any) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    "params",
    [2.0, {"a": {"b": np.ones(1, np.float32)}, "a/b": np.zeros(1, np.float32)}],
    ids=["a Python number", "names that collide"],
)
def test_odd_parameters_are_kept_or_refused(tmp_path, params):
    chain, caches, plan, certificate = make(1)
    odd = Chain((lambda _, x: x, block, block), classify, (params, *chain.params[1:]), chain.input_spec)
    try:
        gati_jax.save_bundle(tmp_path / "b", odd, caches, plan, certificate)
    except InputError:
        return
    loaded = gati_jax.load_bundle(tmp_path / "b", chain=odd)
    values = [[np.asarray(leaf).item() for leaf in jax.tree.leaves(tree)] for tree in (loaded.chain.params[0], params)]
    assert values[0] == values[1]


def test_infer_is_a_function_whichever_name_is_used_first():
    """A module of the name of a function takes its place in the package as soon as anything imports it."""
    script = "import gati_jax; gati_jax.infer_batch; print(callable(gati_jax.infer))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"


# --- Refused at save --------------------------------------------------------------------------------------------------


def test_certificate_of_another_plan_is_refused(tmp_path):
    chain, caches, plan, _ = make(1)
    other = make_certificate(make_plan(caches, threshold=0.5))
    with pytest.raises(InputError, match="certificate: expected that of this plan"):
        gati_jax.save_bundle(tmp_path / "b", chain, caches, plan, other)
    assert not list(tmp_path.iterdir())


class Odd(FullyConnected):
    """A predictor of which the library knows nothing."""


def test_a_cache_that_no_bundle_can_hold_is_refused(tmp_path):
    chain, caches, plan, certificate = make(1)
    odd = Candidate("fc@1", 1, Odd(CLASSES, hidden=5), SortedSelector(), caches[0].params)
    with pytest.raises(InputError, match=r"a bundle can hold .*FullyConnected.*got Odd"):
        gati_jax.save_bundle(tmp_path / "b", chain, (odd, caches[1]), plan, certificate)
    assert not list(tmp_path.iterdir())


def test_a_plan_without_its_candidate_is_refused(tmp_path):
    chain, caches, plan, certificate = make(1)
    with pytest.raises(InputError, match="candidates: expected fc@2"):
        gati_jax.save_bundle(tmp_path / "b", chain, caches[:1], plan, certificate)


def test_a_candidate_at_another_site_than_the_plan_says_is_refused(tmp_path):
    chain, caches, plan, certificate = make(1)
    moved = Candidate("fc@1", 0, caches[0].predictor, caches[0].selector, caches[0].params)
    with pytest.raises(InputError, match="site"):
        gati_jax.save_bundle(tmp_path / "b", chain, (moved, caches[1]), plan, certificate)


def test_what_is_no_bundle_is_not_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(InputError, match="path: expected a bundle or nothing"):
        gati_jax.save_bundle(tmp_path / "thesis", *make(1))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_a_file_is_not_overwritten(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="path: expected"):
        gati_jax.save_bundle(tmp_path / "notes", *make(1))
    assert (tmp_path / "notes").read_text() == "mine"


def test_an_empty_folder_and_a_bundle_are_replaced(tmp_path):
    (tmp_path / "b").mkdir()
    for seed in (1, 2):
        gati_jax.save_bundle(tmp_path / "b", *make(seed))
        assert answers(load(tmp_path / "b")) == answers(in_memory(make(seed)))
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_device_name_cannot_leave_the_bundle():
    with pytest.raises(InputError, match="device"):
        CostTable(device="../../escaped", batch=1, blocks_ms=(1.0,), lookup_ms={})


# --- Damaged ----------------------------------------------------------------------------------------------------------


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] or b"no longer empty")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes() or b"\0")
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [remove, truncate, flip])
def test_damage_to_any_listed_file_is_found(saved, tmp_path, damage):
    files = [name for name in digests(saved) if name != "manifest.json" and not name.startswith("tuning/")]
    assert {"plans.json", "certificates.json"} < set(files)
    assert sum(name.startswith("arrays/") for name in files) >= 3
    for i, name in enumerate(files):
        folder = shutil.copytree(saved, tmp_path / str(i))
        damage(folder / name)
        with pytest.raises(BundleError, match=re.escape(name)):
            load(folder)


@pytest.mark.parametrize("length", [0, 1, 0.5, 0.999])
def test_truncated_manifest_is_refused(folder, length):
    content = (folder / "manifest.json").read_bytes().strip()
    (folder / "manifest.json").write_bytes(content[: int(length if length == 1 else length * len(content))])
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load(folder)


@pytest.mark.parametrize("damage", [truncate, lambda file: file.write_bytes(file.read_bytes()[:40])])
def test_truncated_costs_are_refused(folder, damage):
    file = folder / "tuning" / "test.json"
    file.write_bytes(file.read_bytes().strip())
    damage(file)
    with pytest.raises(BundleError, match=r"test\.json"):
        load(folder)


def test_costs_are_optional(folder):
    shutil.rmtree(folder / "tuning")
    assert load(folder).costs == ()


@settings(max_examples=60, deadline=None)
@given(
    at=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255), file=st.sampled_from(["manifest", "tuning/test"])
)
def test_changed_bytes_of_an_unsigned_file_load_or_are_refused(saved, tmp_path_factory, at, bits, file):
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("flipped") / "b")
    content = bytearray((folder / f"{file}.json").read_bytes())
    content[int(at * len(content))] ^= bits
    (folder / f"{file}.json").write_bytes(content)
    try:
        loaded = load(folder)
    except InputError:
        return
    # What still loads may have other names, times or normalization, never other arrays, thresholds or caches.
    assert same_plan(loaded.plan, make(1)[2])
    assert answers(loaded) == answers(in_memory(make(1)))


@pytest.mark.parametrize("name", ["manifest.json", "plans.json", "certificates.json", "tuning/test.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"not JSON", b"[]", b"null", b"3", b"\xff\xfe", b'{"a": 1', b"[" * 100_000, b"9" * 10_000],
    ids=["empty", "text", "list", "null", "number", "bytes", "open", "deep", "long number"],
)
def test_json_files_of_any_content_are_refused(folder, name, content):
    (folder / name).write_bytes(content)
    if name in {"plans.json", "certificates.json"}:
        sign(folder)
    with pytest.raises(BundleError, match=re.escape(Path(name).name)):
        load(folder)


@pytest.mark.parametrize("make_path", [lambda p: p / "nothing", lambda p: p, lambda p: p / "file"])
def test_what_is_no_bundle_is_refused(tmp_path, make_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match=r"expected a bundle folder with a manifest\.json"):
        gati_jax.load_bundle(make_path(tmp_path))


# --- Forged -----------------------------------------------------------------------------------------------------------


def set_in(*keys: str | int, value: object) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


def swap_sites(manifest: Any) -> None:
    one, two = manifest["caches"]
    one["site"], two["site"] = two["site"], one["site"]


DIGEST = "1 " + "0" * 64
FORGED_MANIFESTS = {
    "newer version": (set_in("format_version", value=2), "format version 2.*up to 1"),
    "much newer version": (lambda _: {"format_version": 99, "all": "different"}, "format version 99"),
    "version of another type": (set_in("format_version", value="two"), "format_version"),
    "no version": (lambda m: m.pop("format_version") and None, "format_version"),
    "unknown key": (set_in("surprise", value=1), "surprise"),
    "unknown key of a cache": (set_in("caches", 0, "module", value="os"), "caches.0.*module"),
    "unknown key of the provenance": (set_in("provenance", "x", value="os"), "provenance.x"),
    "traversal": (set_in("files", "../outside", value=DIGEST), r"'\.\./outside'.*no file of the bundle"),
    "absolute path": (set_in("files", "/etc/passwd", value=DIGEST), "/etc/passwd"),
    "file with a NUL in its name": (set_in("files", "a\0b", value=DIGEST), "files|a.*b"),
    "file with too long a name": (set_in("files", "a" * 300, value=DIGEST), "aaa"),
    "empty digest": (set_in("files", "plans.json", value=""), "files|plans.json"),
    "digest that is no number": (set_in("files", "plans.json", value="x y"), "files|plans.json"),
    "digest without a hash": (set_in("files", "plans.json", value="1"), "plans.json"),
    "listed file that is not there": (set_in("files", "gone.json", value=DIGEST), "gone.json is missing"),
    "unknown predictor": (set_in("caches", 0, "predictor", value={"kind": "os.system"}), "caches.0.predictor"),
    "unknown selector": (set_in("caches", 1, "selector", value={"kind": "eval"}), "caches.1.selector"),
    "other predictor": (
        set_in("caches", 0, "predictor", value={"kind": "pool", "size": 2, "hidden": 5}),
        "misshapen: caches/fc@1",
    ),
    "absurd width": (set_in("caches", 0, "predictor", "hidden", value=10**12), "caches.0.predictor.*hidden"),
    "large width": (set_in("caches", 0, "predictor", "hidden", value=65_536), "misshapen.*65536"),
    "zero width": (set_in("caches", 0, "predictor", "hidden", value=0), "caches.0.predictor.*hidden"),
    "kernel larger than its input": (
        set_in("caches", 0, "predictor", value={"kind": "conv", "kernel": 60_000}),
        "fc@1",
    ),
    "absurd site": (set_in("caches", 1, "site", value=10**12), "caches.1.site"),
    "site behind the network": (set_in("caches", 1, "site", value=3), r"fc@2 is at site 3.*0 to 2|inconsistent"),
    "negative site": (set_in("caches", 1, "site", value=-1), "caches.1.site"),
    "caches at each other's sites": (swap_sites, "inconsistent"),
    "cache at another site": (set_in("caches", 0, "site", value=0), "inconsistent"),
    "no caches": (set_in("caches", value=[]), "inconsistent"),
    "absurd input": (set_in("input_shape", value=[10**12]), "input_shape"),
    "other input": (set_in("input_shape", value=[5]), r"chain: expected inputs float32\[5\], got float32\[4\]"),
    "other dtype": (set_in("input_dtype", value="object"), r"expected inputs object\[4\]"),
    "division by zero": (
        set_in("normalization", value={"mean": [0.0], "std": [0.0], "scale": 1.0}),
        "normalization",
    ),
    "nameless cache": (set_in("caches", 0, "name", value=""), "caches.0.name"),
}


@pytest.mark.parametrize("case", FORGED_MANIFESTS)
def test_forged_manifest_is_refused(folder, case):
    change, message = FORGED_MANIFESTS[case]
    edit(folder / "manifest.json", change)
    with pytest.raises(BundleError, match=message):
        load(folder)


def ragged(plans: Any) -> None:
    plans["plans"][0]["path"][1] = [0.0]


def narrow(plans: Any) -> None:
    plans["plans"][0]["path"] = [[None], [0.0], [0.0]]


FORGED_FILES = {
    "ragged path": ("plans.json", ragged, "path|plans.json|inconsistent"),
    "path of one cache": ("plans.json", narrow, "path|plans.json|inconsistent"),
    "no path": ("plans.json", set_in("plans", 0, "path", value=[]), "path|plans.json|inconsistent"),
    "other thresholds": ("plans.json", set_in("plans", 0, "path", 2, 1, value=-9.0), "inconsistent"),
    "rows that are no digests": ("plans.json", set_in("plans", 0, "rows", value="zz"), "plans.0.rows"),
    "absurd plan site": ("plans.json", set_in("plans", 0, "sites", 0, value=10**12), "plans.0.sites.0"),
    "two plans": ("plans.json", lambda p: p["plans"].append(p["plans"][0]), "plans"),
    "no plan": ("plans.json", set_in("plans", value=[]), "plans"),
    "unknown key of a plan": ("plans.json", set_in("plans", 0, "code", value="x"), "plans.0.code"),
    "two certificates": (
        "certificates.json",
        lambda c: c["certificates"].append(c["certificates"][0]),
        "certificates",
    ),
    "certificate of another plan": (
        "certificates.json",
        set_in("certificates", 0, "plan_hash", value="0" * 64),
        "inconsistent",
    ),
    "step behind the path": ("certificates.json", set_in("certificates", 0, "step", value=3), "inconsistent"),
    "step before the path": (
        "certificates.json",
        set_in("certificates", 0, "step", value=-2),
        "certificate: expected counts",
    ),
    "step of another type": (
        "certificates.json",
        set_in("certificates", 0, "step", value="two"),
        "certificates.0.step",
    ),
    "certificate without a field": (
        "certificates.json",
        lambda c: c["certificates"][0].pop("epsilon") and None,
        "certificates.0.epsilon",
    ),
    "unknown key of a certificate": (
        "certificates.json",
        set_in("certificates", 0, "surprise", value=1),
        "certificates.0.surprise",
    ),
    "epsilon of 700 %": ("certificates.json", set_in("certificates", 0, "epsilon", value=7), "epsilon"),
    "negative time": ("tuning/test.json", set_in("costs", 0, "blocks_ms", 0, value=-1), "test.json.*milliseconds"),
    "unknown key of costs": ("tuning/test.json", set_in("costs", 0, "surprise", value=1), "test.json.*surprise"),
}


@pytest.mark.parametrize("case", FORGED_FILES)
def test_forged_and_signed_file_is_refused(folder, case):
    name, change, message = FORGED_FILES[case]
    edit(folder / name, change)
    sign(folder)
    with pytest.raises(BundleError, match=message):
        load(folder)


FORGED_NETWORKS = {
    "unknown key": (set_in("network", "surprise", value=1), "network.*surprise"),
    "absurd stage": (set_in("network", "stages", 0, value=10**9), "network.*stages.0"),
    "absurd width": (set_in("network", "widths", 0, value=10**9), "network.*widths.0"),
    "absurd input": (set_in("network", "input_shape", 0, value=10**9), "network.*input_shape"),
    "a width too few": (set_in("network", "widths", value=[4]), "widths: expected one for each of 2 stages"),
    "more stages": (
        lambda m: m["network"].update(stages=[1, 1, 1], widths=[4, 8, 8]),
        "chain: expected 2 blocks",
    ),
    "other input than the manifest says": (set_in("network", "input_shape", value=[9, 9, 3]), "chain: expected inputs"),
    "shrinking stages, no projection": (
        lambda m: m["network"].update(widths=[8, 4], shortcut="A"),
        "bundle|network",
    ),
    "other number of classes": (set_in("network", "classes", value=6), "misshapen.*base/2"),
    "normalization of two channels": (
        set_in("normalization", value={"mean": [0.0, 0.0], "std": [1.0, 1.0], "scale": 1.0}),
        "normalization",
    ),
    "no network": (set_in("network", value=None), r"pass it as load_bundle\(path, chain=my_chain\)"),
}


@pytest.fixture(scope="module")
def saved_residual(residual, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("residual") / "bundle"
    gati_jax.save_bundle(path, *residual)
    return path


@pytest.mark.parametrize("case", FORGED_NETWORKS)
def test_forged_network_is_refused(saved_residual, tmp_path, case):
    change, message = FORGED_NETWORKS[case]
    folder = shutil.copytree(saved_residual, tmp_path / "b")
    edit(folder / "manifest.json", change)
    with pytest.raises(BundleError, match=message):
        gati_jax.load_bundle(folder)


def test_arrays_of_another_network_are_listed(folder, tmp_path):
    rng = np.random.default_rng(5)
    caches = (cache(rng, "fc@1", 1, hidden=7), cache(rng, "zz@2", 2))
    plan = make_plan(caches)
    gati_jax.save_bundle(tmp_path / "other", own_chain(rng), caches, plan, make_certificate(plan))
    shutil.rmtree(folder / "arrays")
    shutil.copytree(tmp_path / "other" / "arrays", folder / "arrays")
    sign(folder)
    with pytest.raises(BundleError) as caught:
        load(folder)
    leaves = sorted(leaf_names(cache_shapes(5)))
    changed = [name for name in leaves if leaf_names(cache_shapes(5))[name] != leaf_names(cache_shapes(7))[name]]
    assert {"predictor/params/hidden/kernel", "predictor/params/out/kernel"} <= set(changed)
    wide = [
        f"caches/fc@1/{name} (expected float32{leaf_names(cache_shapes(5))[name]},"
        f" got float32{leaf_names(cache_shapes(7))[name]})"
        for name in changed
    ]
    assert str(caught.value).endswith(
        f"{len(leaves)} missing: {', '.join(f'caches/fc@2/{leaf}' for leaf in leaves)}; "
        f"{len(leaves)} unexpected: {', '.join(f'caches/zz@2/{leaf}' for leaf in leaves)}; "
        f"{len(wide)} misshapen: {', '.join(wide)}"
    )


def leaf_names(tree: Any, prefix: str = "") -> dict[str, list[int]]:
    """The shapes of nested dictionaries by path."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: list(tree.shape)}
    return {k: v for name, below in tree.items() for k, v in leaf_names(below, f"{prefix}{name}/").items()}


def test_own_chain_must_be_given(saved):
    with pytest.raises(BundleError, match=r"load_bundle\(path, chain=my_chain\)"):
        gati_jax.load_bundle(saved)


def test_chain_of_another_input_is_refused(saved):
    other = own_chain(np.random.default_rng(0), width=6)
    with pytest.raises(BundleError, match=r"chain: expected inputs float32\[4\], got float32\[6\]"):
        gati_jax.load_bundle(saved, chain=other)


def test_chain_of_another_depth_is_refused(saved):
    chain = make(1)[0]
    deeper = Chain((block,) * 4, classify, (chain.params[0], *chain.params), chain.input_spec)
    with pytest.raises(BundleError, match="chain: expected 3 blocks"):
        gati_jax.load_bundle(saved, chain=deeper)


@pytest.mark.parametrize("gone", ["arrays", "arrays/state", "arrays/_CHECKPOINT_METADATA"])
def test_arrays_that_are_neither_there_nor_listed_are_missed(folder, gone):
    shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()
    sign(folder)
    with pytest.raises(BundleError, match="arrays"):
        load(folder)


# Orbax leaves the tasks of a load that failed to the garbage collector, which complains.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_and_signed_arrays_are_refused(saved, tmp_path):
    names = [name for name in digests(saved) if name.startswith("arrays/") and (saved / name).stat().st_size]
    for i, name in enumerate(names):
        folder = shutil.copytree(saved, tmp_path / str(i))
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        sign(folder)
        try:
            loaded = load(folder)
        except BundleError:
            continue
        assert answers(loaded) == answers(in_memory(make(1))), name  # Orbax does not need every file that it writes


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_nothing_in_a_bundle_is_executed(folder, tmp_path, monkeypatch):
    mark = tmp_path / "executed"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists()  # the bomb is live
    mark.unlink()
    for name in ("evil.pkl", "arrays/evil.pkl", "arrays/state/checkpoint", "tuning/evil.pkl", "plans.pkl"):
        (folder / name).write_bytes(bomb)
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    for name in ("evil.py", "sitecustomize.py", "arrays/__init__.py", "__init__.py"):
        (folder / name).write_text(code)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(BundleError, match="does not list"):
        load(folder)
    sign(folder)  # as whoever planted them would
    assert answers(load(folder)) == answers(in_memory(make(1)))
    assert not mark.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("name", ["manifest.json", "plans.json", "certificates.json", "tuning/test.json"])
def test_a_pickle_in_place_of_json_is_refused_unread(folder, tmp_path, name):
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    if name in {"plans.json", "certificates.json"}:
        sign(folder)
    with pytest.raises(BundleError, match=re.escape(Path(name).name)):
        load(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", ["evil", "evil:Predictor", "evil.Predictor"])
def test_a_kind_is_never_imported(folder, monkeypatch, kind):
    (folder / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(folder))
    edit(folder / "manifest.json", set_in("caches", 0, "predictor", value={"kind": kind}))
    with pytest.raises(BundleError, match="predictor"):
        load(folder)
    assert "evil" not in sys.modules


# --- Interrupted and killed -------------------------------------------------------------------------------------------


def make_mortal(strike: Callable[[], None], patch: Callable[[object, str, object], None]) -> None:
    """Call ``strike`` before and after every step that saving takes."""

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            strike()
            result = function(*args, **kwargs)
            strike()
            return result

        return call

    patch(bundle.ocp, "save", around(bundle.ocp.save))
    patch(bundle, "write_json", around(bundle.write_json))
    patch(bundle, "digests", around(bundle.digests))
    patch(Path, "rename", around(Path.rename))
    patch(Path, "chmod", around(Path.chmod))
    patch(shutil, "rmtree", around(shutil.rmtree))


def count_strikes(path: Path) -> int:
    """Return how often a save over an existing bundle is struck at."""
    gati_jax.save_bundle(path, *make(1), costs=[COSTS])
    strikes = 0

    def strike() -> None:
        nonlocal strikes
        strikes += 1

    with pytest.MonkeyPatch.context() as patch:
        make_mortal(strike, patch.setattr)
        gati_jax.save_bundle(path, *make(9), costs=[COSTS])
    return strikes


def check_old_or_new(path: Path, moment: object) -> bool:
    """Check that one of the two bundles is there as a whole; tell whether it is the new one."""
    loaded = load(path)
    old, new = answers(in_memory(make(1))), answers(in_memory(make(9)))
    assert answers(loaded) in (old, new), moment
    assert loaded.costs == (COSTS,), moment
    return answers(loaded) == new


def test_a_save_that_fails_anywhere_leaves_a_bundle(saved, tmp_path):
    total = count_strikes(tmp_path / "counted")
    assert total >= 18  # arrays, four files, digests, chmod, two renames, rmtree: before and after
    new = []
    for moment in range(1, total + 1):
        path = shutil.copytree(saved, tmp_path / str(moment) / "b")
        left, error = moment, OSError("disk full") if moment % 2 else KeyboardInterrupt()

        def strike(error: BaseException = error) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise error

        with pytest.MonkeyPatch.context() as patch:
            make_mortal(strike, patch.setattr)
            with pytest.raises(type(error)):
                gati_jax.save_bundle(path, *make(9), costs=[COSTS])
        new.append(check_old_or_new(path, moment))
        gati_jax.save_bundle(path, *make(9), costs=[COSTS])
        assert check_old_or_new(path, f"saved again after {moment}")
        assert [p.name for p in path.parent.iterdir()] == ["b"], moment
    assert new == sorted(new)  # old up to some moment, new from there on
    assert new[0] is False


def test_a_first_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(bundle, "digests", fail)
    with pytest.raises(OSError, match="full"):
        gati_jax.save_bundle(tmp_path / "b", *make(1))
    assert not list(tmp_path.iterdir())


def test_a_save_killed_anywhere_leaves_a_bundle(saved, tmp_path):
    total = count_strikes(tmp_path / "counted")
    moments = range(1, total + 1)
    paths = [shutil.copytree(saved, tmp_path / str(moment) / "b") for moment in moments]
    arguments = [sys.executable, __file__, *map(str, paths)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=120)
    assert result.stdout.split() == [str(-signal.SIGKILL)] * total, result.stderr
    new = [check_old_or_new(path, moment) for moment, path in zip(moments, paths, strict=True)]
    assert new == sorted(new)
    assert (new[0], new[-1]) == (False, True)
    aside = [path for path in paths if not path.exists()]
    assert aside  # some died between the two renames
    for path in aside:
        assert previous(path).is_dir()
        gati_jax.save_bundle(path, *make(9), costs=[COSTS])
        assert check_old_or_new(path, "saved again")
        assert not previous(path).exists()


def main(paths: list[str]) -> None:
    """Save over each of the bundles, killed at the first moment, the second, and so on; print how each ended.

    Forks before JAX starts its threads, so that Python and JAX are imported once.
    """
    for moment, path in enumerate(paths, start=1):
        child = os.fork()
        if child == 0:
            left = moment

            def strike() -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            make_mortal(strike, setattr)
            gati_jax.save_bundle(Path(path), *make(9), costs=[COSTS])
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
