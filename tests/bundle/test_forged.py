"""Bundles forged to harm their reader: all are refused, and nothing in them is run."""

import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax import BundleError, Chain
from gati_jax.bundle.manifest import Plans, read_json
from gati_jax.caches import FullyConnected, SortedSelector
from tests.bundle.made import (
    CLASSES,
    answers,
    assert_refused,
    at,
    block,
    cache,
    cache_shapes,
    classify,
    edit,
    in_memory,
    listed,
    load,
    make,
    make_certificate,
    make_plan,
    own_chain,
    sign,
)


def swap_sites(manifest: Any) -> None:
    one, two = manifest["caches"]
    one["site"], two["site"] = two["site"], one["site"]


DIGEST = "1 " + "0" * 64
FORGED_MANIFESTS = {
    "newer version": (at("format_version", 2), "format version 2.*up to 1"),
    "much newer version": (lambda _: {"format_version": 99, "all": "different"}, "format version 99"),
    "version of another type": (at("format_version", "two"), "format_version"),
    "no version": (lambda m: m.pop("format_version") and None, "format_version"),
    "unknown key": (at("surprise", 1), "surprise"),
    "unknown key of a cache": (at("caches 0 module", "os"), "caches.0.*module"),
    "unknown key of the provenance": (at("provenance x", "os"), "provenance.x"),
    "traversal": (at("files ../outside", DIGEST), r"'\.\./outside'.*no file of the bundle"),
    "absolute path": (at("files /etc/passwd", DIGEST), "/etc/passwd"),
    "file with a NUL in its name": (at("files a\0b", DIGEST), "files|a.*b"),
    "file with too long a name": (at("files " + "a" * 300, DIGEST), "aaa"),
    "empty digest": (at("files plans.json", ""), "files|plans.json"),
    "digest that is no number": (at("files plans.json", "x y"), "files|plans.json"),
    "digest without a hash": (at("files plans.json", "1"), "plans.json"),
    "listed file that is not there": (at("files gone.json", DIGEST), "gone.json is missing"),
    "unknown predictor": (at("caches 0 predictor", {"kind": "os.system"}), "caches.0.predictor"),
    "unknown selector": (at("caches 1 selector", {"kind": "eval"}), "caches.1.selector"),
    "other predictor": (at("caches 0 predictor", {"kind": "pool", "size": 2, "hidden": 5}), "misshapen: caches/fc@1"),
    "absurd width": (at("caches 0 predictor hidden", 10**12), "caches.0.predictor.*hidden"),
    "large width": (at("caches 0 predictor hidden", 65_536), "misshapen.*65536"),
    "zero width": (at("caches 0 predictor hidden", 0), "caches.0.predictor.*hidden"),
    "kernel larger than its input": (at("caches 0 predictor", {"kind": "conv", "kernel": 60_000}), "fc@1"),
    "absurd site": (at("caches 1 site", 10**12), "caches.1.site"),
    "site behind the network": (at("caches 1 site", 3), r"fc@2 is at site 3.*0 to 2|inconsistent"),
    "negative site": (at("caches 1 site", -1), "caches.1.site"),
    "caches at each other's sites": (swap_sites, "inconsistent"),
    "cache at another site": (at("caches 0 site", 0), "inconsistent"),
    "no caches": (at("caches", []), "inconsistent"),
    "absurd input": (at("input_shape", [10**12]), "input_shape"),
    "other input": (at("input_shape", [5]), r"chain: expected inputs float32\[5\], got float32\[4\]"),
    "other dtype": (at("input_dtype", "object"), r"expected inputs object\[4\]"),
    "division by zero": (at("normalization", {"mean": [0.0], "std": [0.0], "scale": 1.0}), "normalization"),
    "nameless cache": (at("caches 0 name", ""), "caches.0.name"),
}


@pytest.mark.parametrize("case", FORGED_MANIFESTS)
def test_forged_manifest_is_refused(folder, case):
    assert_refused(folder, "manifest.json", *FORGED_MANIFESTS[case])


PLANS, CERTIFICATES, TUNING = "plans.json", "certificates.json", "tuning/test.json"
FORGED_FILES = {
    "ragged path": (PLANS, at("plans 0 path 1", [0.0]), "path|plans.json|inconsistent"),
    "path of one cache": (PLANS, at("plans 0 path", [[None], [0.0], [0.0]]), "path|plans.json|inconsistent"),
    "no path": (PLANS, at("plans 0 path", []), "path|plans.json|inconsistent"),
    "other thresholds": (PLANS, at("plans 0 path 2 1", -9.0), "inconsistent"),
    "rows that are no digests": (PLANS, at("plans 0 rows", "zz"), "plans.0.rows"),
    "absurd plan site": (PLANS, at("plans 0 sites 0", 10**12), "plans.0.sites.0"),
    "two plans": (PLANS, lambda p: p["plans"].append(p["plans"][0]), "plans"),
    "no plan": (PLANS, at("plans", []), "plans"),
    "unknown key of a plan": (PLANS, at("plans 0 code", "x"), "plans.0.code"),
    "more requests than there are": (CERTIFICATES, at("certificates 0 n", 10**30), "certificate"),
    "two certificates": (CERTIFICATES, lambda c: c["certificates"].append(c["certificates"][0]), "certificates"),
    "certificate of another plan": (CERTIFICATES, at("certificates 0 plan_hash", "0" * 64), "inconsistent"),
    "step behind the path": (CERTIFICATES, at("certificates 0 step", 3), "inconsistent"),
    "step before the path": (CERTIFICATES, at("certificates 0 step", -2), "certificate: expected counts"),
    "step of another type": (CERTIFICATES, at("certificates 0 step", "two"), "certificates.0.step"),
    "no epsilon": (CERTIFICATES, lambda c: c["certificates"][0].pop("epsilon") and None, "certificates.0.epsilon"),
    "unknown key of a certificate": (CERTIFICATES, at("certificates 0 surprise", 1), "certificates.0.surprise"),
    "epsilon of 700 %": (CERTIFICATES, at("certificates 0 epsilon", 7), "epsilon"),
    "negative time": (TUNING, at("costs 0 blocks_ms 0", -1), "test.json.*milliseconds"),
    "unknown key of costs": (TUNING, at("costs 0 surprise", 1), "test.json.*surprise"),
}


@pytest.mark.parametrize("case", FORGED_FILES)
def test_forged_and_signed_file_is_refused(folder, case):
    assert_refused(folder, *FORGED_FILES[case])


FORGED_NETWORKS = {
    "unknown key": (at("network surprise", 1), "network.*surprise"),
    "absurd stage": (at("network stages 0", 10**9), "network.*stages.0"),
    "absurd width": (at("network widths 0", 10**9), "network.*widths.0"),
    "absurd input": (at("network input_shape 0", 10**9), "network.*input_shape"),
    "a width too few": (at("network widths", [4]), "widths: expected one for each of 2 stages"),
    "more stages": (lambda m: m["network"].update(stages=[1, 1, 1], widths=[4, 8, 8]), "chain: expected 2 blocks"),
    "other input than the manifest says": (at("network input_shape", [9, 9, 3]), "chain: expected inputs"),
    "shrinking stages, no projection": (lambda m: m["network"].update(widths=[8, 4], shortcut="A"), "bundle|network"),
    "other number of classes": (at("network classes", 6), "misshapen.*base/2"),
    "normalization of two channels": (
        at("normalization", {"mean": [0.0, 0.0], "std": [1.0, 1.0], "scale": 1.0}),
        "normalization",
    ),
    "no network": (at("network", None), r"pass it as load_bundle\(path, chain=my_chain\)"),
}


@pytest.mark.parametrize("case", FORGED_NETWORKS)
def test_forged_network_is_refused(saved_residual, tmp_path, case):
    folder = shutil.copytree(saved_residual, tmp_path / "b")
    assert_refused(folder, "manifest.json", *FORGED_NETWORKS[case], load=gati_jax.load_bundle)


def shapes_by_name(hidden: int) -> dict[str, list[int]]:
    tree = cache_shapes(FullyConnected(CLASSES, hidden=hidden), SortedSelector())
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape) for path, leaf in leaves}


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
    one, other = shapes_by_name(5), shapes_by_name(7)
    leaves = sorted(one)
    wide = [
        f"caches/fc@1/{name} (expected float32{one[name]}, got float32{other[name]})"
        for name in leaves
        if one[name] != other[name]
    ]
    assert len(wide) >= 2  # the hidden layer's kernel, and the one that reads it
    assert str(caught.value).endswith(
        f"{len(leaves)} missing: {', '.join(f'caches/fc@2/{leaf}' for leaf in leaves)}; "
        f"{len(leaves)} unexpected: {', '.join(f'caches/zz@2/{leaf}' for leaf in leaves)}; "
        f"{len(wide)} misshapen: {', '.join(wide)}"
    )


def test_own_chain_must_be_given_and_fit(saved):
    chain = make(1)[0]
    deeper = Chain((block,) * 4, classify, (chain.params[0], *chain.params), chain.input_spec)
    for other, message in (
        (None, r"load_bundle\(path, chain=my_chain\)"),
        (own_chain(np.random.default_rng(0), width=6), r"chain: expected inputs float32\[4\], got float32\[6\]"),
        (deeper, "chain: expected 3 blocks"),
    ):
        with pytest.raises(BundleError, match=message):
            gati_jax.load_bundle(saved, chain=other)


@pytest.mark.parametrize("gone", ["arrays", "arrays/state", "arrays/_CHECKPOINT_METADATA"])
def test_arrays_that_are_neither_there_nor_listed_are_missed(folder, gone):
    shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()
    sign(folder)
    with pytest.raises(BundleError, match="arrays"):
        load(folder)


def test_damaged_and_signed_arrays_are_refused(saved, tmp_path):
    names = [name for name in listed(saved) if name.startswith("arrays/") and (saved / name).stat().st_size]
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
    sign(folder)  # as a forger would
    assert answers(load(folder)) == answers(in_memory(make(1)))
    for name in (TUNING, PLANS, CERTIFICATES, "manifest.json"):  # a pickle in place of JSON is refused unread
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(bomb)
        if name in {PLANS, CERTIFICATES}:
            sign(folder)
        with pytest.raises(BundleError, match=re.escape(Path(name).name)):
            load(folder)
        (folder / name).write_bytes(content)
    assert not mark.exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("kind", ["evil", "evil:Predictor", "evil.Predictor"])
def test_a_kind_is_never_imported(folder, monkeypatch, kind):
    (folder / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(folder))
    assert_refused(
        folder, "manifest.json", at("caches 0 predictor", {"kind": kind}), "predictor|head evil:Predictor of your own"
    )
    assert "evil" not in sys.modules


def test_a_manifest_that_implies_more_memory_than_allowed_is_refused(saved_residual, tmp_path):
    """It takes a few bytes to ask for many gigabytes."""
    folder = shutil.copytree(saved_residual, tmp_path / "b")
    edit(folder / "manifest.json", lambda m: m["network"].update(stages=[4, 4], widths=[4096, 4096]))
    edit(folder / PLANS, at("plans 0 depth", 8))
    plan_hash = read_json(folder / PLANS, Plans).plans[0].plan().hash
    change = at("certificates 0 plan_hash", plan_hash)
    assert_refused(folder, CERTIFICATES, change, r"would take \d+ bytes of memory", load=gati_jax.load_bundle)
