"""The pass through the whole house with a network that is defined outside the package."""

import dataclasses
import logging
import re
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax.planning.binomial import p_value
from tests.conftest import dense_block, linear_classifier

BUNDLE = Path(__file__).parent / "fixtures" / "v1" / "bundle"
HEAVY = ["jax", "orbax", "optax", "flax", "tensorflow", "sklearn", "scipy"]
# Flax itself imports rich, but not its progress bars. Orbax is imported where arrays are read.
NOT_FOR_ANSWERS = ["optax", "rich.progress", "tensorflow", "tensorflow_datasets", "sklearn", "train"]
NOT_FOR_ANSWERS += [f"gati_jax.{name}" for name in ("fitting", "adaptation")]
ANSWER = f"""
import numpy as np
from gati_jax import infer, infer_batch, load_bundle
assert "orbax" not in sys.modules
bundle = load_bundle({str(BUNDLE)!r})
image = np.zeros((4, 4, 3), np.uint8)
infer(bundle, image), infer_batch(bundle, image[None])
"""


@pytest.mark.parametrize(
    ("script", "unwanted"),
    [("import gati_jax", HEAVY), (ANSWER, NOT_FOR_ANSWERS)],
    ids=["the package", "answers of a loaded bundle"],
)
def test_imports_are_light_and_silent(script, unwanted):
    whole = f"import sys\n{script}\nprint(sorted(set({unwanted}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_every_public_name_loads():
    names = dir(gati_jax)
    assert {"Bundle", "certify", "fit", "infer", "load_bundle", "plan", "tune"} < set(names)
    assert all(getattr(gati_jax, name) is not None for name in names)
    misspelt = "inferr"
    with pytest.raises(AttributeError, match=misspelt):
        getattr(gati_jax, misspelt)


def test_own_network_from_fit_to_infer(chain, splits, planned, bundle_path):
    plan, certificate = planned
    assert certificate.certified, certificate.stays_off
    bundle = gati_jax.load_bundle(bundle_path, chain=chain)
    table = gati_jax.replay(chain, bundle.cascade.caches, splits["test"])
    prediction = gati_jax.infer_batch(bundle, splits["test"])
    assert np.mean(prediction.class_index == table.answers) >= 1 - 2 * certificate.epsilon
    assert (np.asarray(prediction.exit) < len(chain)).mean() > 0.2
    one = gati_jax.infer(bundle, splits["test"][0])
    assert int(one.class_index) == int(prediction.class_index[0])
    assert int(one.exit) == int(prediction.exit[0])
    del plan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x[:, :63], r"image: expected shape \[64\], got \[63\]"),
        (lambda x: x.astype(np.float64), "image: expected float32, got float64"),
        (lambda x: (x * 255).astype(np.uint8), "image: expected float32, got uint8"),
        (lambda x: np.full_like(x, np.nan), "image: expected finite values, got NaN"),
    ],
    ids=["shape", "dtype", "uint8 without normalization", "NaN"],
)
def test_bad_images_are_refused(chain, bundle_path, splits, make, message):
    bundle = gati_jax.load_bundle(bundle_path, chain=chain)
    bad = make(splits["test"][:2])
    with pytest.raises(gati_jax.InputError, match=message):
        gati_jax.infer(bundle, bad[0])
    with pytest.raises(gati_jax.InputError, match="images: expected"):
        gati_jax.infer_batch(bundle, bad)
    with pytest.raises(gati_jax.InputError, match="images: expected"):
        gati_jax.replay(chain, bundle.caches, bad)


def test_packages_are_attributes_once_the_library_is_imported():
    """Without an import of their own; a name that is none stays an error."""
    script = "import gati_jax; gati_jax.planning.Plan, gati_jax.certification.certify; print(gati_jax.plan)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("<function plan")
    assert {"caches", "evaluate", "infer"} <= set(dir(gati_jax))


def test_the_docstring_names_what_there_is_and_its_example_runs(chain, splits, costs, tmp_path, monkeypatch, capsys):
    text = gati_jax.__doc__ or ""
    classes_and_functions = {name for name in dir(gati_jax) if not hasattr(getattr(gati_jax, name), "__path__")}
    named = set(re.findall(r"``(\w+)``", text))
    assert classes_and_functions - named <= {"data"}  # the one package that is a single file
    assert {name for name in named if not hasattr(gati_jax, name)} <= {"gati", "jax"}
    (example,) = re.findall(r"::\n\n((?:    .*\n|\n)+)", text)
    monkeypatch.chdir(tmp_path)
    names = {
        "block": dense_block,
        "classifier": linear_classifier,
        "params": chain.params,
        "fit_images": splits["fit"],
        "select_images": splits["select"],
        "certify_images": splits["certify"],
        "test_images": splits["test"][:40],
        "image": splits["test"][0],
    }
    fit = gati_jax.fit
    quick = gati_jax.FitConfig(epochs=2, batch=50)
    evaluate = gati_jax.evaluate
    with pytest.MonkeyPatch.context() as patch:  # all of it, but not for long
        patch.setattr(gati_jax, "fit", lambda *a, **k: fit(*a, config=quick, heads=HEADS, progress=False, **k))
        patch.setattr(gati_jax, "measure_costs", lambda *_: costs)
        patch.setattr(gati_jax, "evaluate", lambda *a: evaluate(*a, timed=0))
        exec(compile(textwrap.dedent(example), "the docstring", "exec"), names)
    printed = capsys.readouterr().out
    assert "agreement with the base" in printed
    assert "ertif" in printed


HEADS = (
    gati_jax.Head(
        name="fc",
        predictor=lambda classes: gati_jax.caches.FullyConnected(classes, hidden=16),
        selector=gati_jax.caches.SortedSelector(),
        sites=(2,),
    ),
)


def test_an_evaluation_is_that_of_single_requests(chain, bundle_path, splits, digits, tmp_path):
    bundle = gati_jax.load_bundle(bundle_path, chain=chain)
    images, labels = splits["test"][:100], digits.labels[1450:1550]
    ledger = gati_jax.Ledger(tmp_path / "looks.json")
    found = gati_jax.evaluate(bundle, images, labels.tolist(), timed=0, ledger=ledger)
    one_by_one = [gati_jax.infer(bundle, image) for image in images]
    classes, exits = (np.array([int(getattr(p, name)) for p in one_by_one]) for name in ("class_index", "exit"))
    answers = np.asarray(chain(jax.numpy.asarray(images))).argmax(1)
    assert found.cascade.agreement == pytest.approx(np.mean(classes == answers))
    assert (found.base.accuracy, found.cascade.accuracy) == pytest.approx(
        (np.mean(answers == labels), np.mean(classes == labels))
    )
    sites = (*bundle.cascade.sites, len(chain))
    assert {e.exit: e.hits for e in found.exits} == {site: int((exits == site).sum()) for site in sites}
    assert sum(e.hits for e in found.exits) == 100
    assert found.certificate.holds == (np.mean(classes != answers) <= bundle.certificate.epsilon)
    assert (found.cost, found.oracle) == (None, None)
    text = found.summary()
    assert f"{found.cascade.agreement:.4f} of 100 requests" in text
    assert "speed-up" not in text
    assert gati_jax.evaluate(bundle, images, timed=0, ledger=None).cascade.accuracy is None
    rows = gati_jax.data.row_digests(images)
    assert not len(ledger.still_open(rows))  # what was shown certifies nothing that is chosen by it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [1, 2]}, r"labels: expected 4 whole numbers, got int64\[2\]"),
        ({"labels": [0.5] * 4}, r"labels: expected 4 whole numbers, got float64\[4\]"),
        ({"timed": -1}, "timed: expected 0 or more, got int -1"),
    ],
    ids=["too few", "no classes", "negative"],
)
def test_what_cannot_be_evaluated_is_refused(chain, bundle_path, splits, arguments, message):
    bundle = gati_jax.load_bundle(bundle_path, chain=chain)
    with pytest.raises(gati_jax.InputError, match=message):
        gati_jax.evaluate(bundle, splits["test"][:4], **arguments)
    with pytest.raises(gati_jax.InputError, match="images: expected 1 or more, got none"):
        gati_jax.evaluate(bundle, splits["test"][:0])


def test_certify_rows_are_shown_on_request_alone_and_known_rows_are_called_so(
    chain, bundle_path, splits, tmp_path, caplog
):
    bundle, ledger = gati_jax.load_bundle(bundle_path, chain=chain), gati_jax.Ledger(tmp_path / "looks.json")
    rows = gati_jax.data.row_digests(splits["certify"])
    with pytest.raises(gati_jax.InputError, match="expected others than the certify rows"):
        gati_jax.evaluate(bundle, splits["certify"], timed=0, ledger=ledger)
    assert len(ledger.still_open(rows)) == len(rows)
    shown = gati_jax.evaluate(bundle, splits["certify"], timed=0, ledger=ledger, reveal=True)
    assert round((1 - shown.cascade.agreement) * shown.n) == bundle.certificate.disagreements
    assert not len(ledger.still_open(rows))
    assert "says little" not in caplog.text
    gati_jax.evaluate(bundle, splits["select"][:9], timed=0, ledger=ledger)
    assert "on 9 of these 9 rows: its agreement here says little" in caplog.text


def test_a_bundle_saved_in_python_says_when_and_with_what(bundle_path, chain, planned):
    provenance = gati_jax.load_bundle(bundle_path, chain=chain).provenance
    assert abs((datetime.now(UTC) - datetime.fromisoformat(provenance.created)).total_seconds()) < 3600
    assert provenance.versions["jax"] == jax.__version__
    assert provenance.versions["gati-jax"] == gati_jax.__version__
    plan, certificate = planned
    expected = {"select": gati_jax.data.fingerprint(plan.rows), "certify": certificate.data_fingerprint}
    assert dict(provenance.data_fingerprints) == expected


def test_reprs_are_short_and_say_what_it_is(chain, bundle_path, candidates, planned, costs, splits):
    bundle = gati_jax.load_bundle(bundle_path, chain=chain)
    table = gati_jax.replay(chain, candidates, splits["select"][:40])
    plan, certificate = planned
    long = dataclasses.replace(plan, names=tuple(f"{i}" * 200 for i in range(len(plan.names))))
    for value, said in [
        (chain, "5 blocks of functions of your own; images: float32[64]"),
        (next(iter(candidates)), "'fc@1' at site 1: FullyConnected and SortedSelector"),
        (table, "40 rows without labels; 5 blocks; candidates: fc@1, fc@2, fc@3, fc@4"),
        (costs, "test, batch 1: 5 blocks in 5 ms, 4 lookups"),
        (plan, plan.names[0]),
        (long, "000"),
        (certificate, "'default': at most 8% of requests disagree with the base, confidence 0.9; "),
        (bundle, "default: 0.08"),
    ]:
        assert said in repr(value)
        assert repr(value).startswith(f"{type(value).__name__}(")
        assert len(repr(value)) < 300
    assert plan.hash == dataclasses.replace(plan).hash  # which depends on no repr but the source's


def test_a_plan_and_a_certificate_tell_their_story(planned):
    plan, certificate = planned
    lines = plan.summary(certificate.step).splitlines()
    on = np.isfinite(plan.thresholds(certificate.step))
    assert len(lines) == 3 + len(plan.names)
    assert sum(line.endswith(" off") for line in lines) == (~on).sum()
    assert f"{plan.disagreement[certificate.step]:.2%} of these rows disagree" in lines[-1]
    told = certificate.summary()
    assert told.startswith("Certified: at most 8% of requests disagree with the base (confidence 0.9, a single look")
    assert f"{certificate.disagreements} of 350 certify requests did" in told
    for sentence in certificate.stays_off:
        assert sentence in told


def test_too_few_rows_to_certify_are_said_loudly_with_how_many_it_takes(chain, candidates, splits, planned, caplog):
    plan, _ = planned
    table = gati_jax.replay(chain, candidates, splits["certify"][:30])
    with caplog.at_level(logging.WARNING):
        certificate = gati_jax.certify(plan, table, epsilon=0.05, delta=0.05)
    assert not certificate.certified
    (least,) = re.findall(r"it takes (\d+) rows of which none disagrees", caplog.text)
    assert "NOTHING CERTIFIED of plan default, the base answers every request" in caplog.text
    level = 6 * 0.05 / (np.pi * 2) ** 2  # the next look's
    assert p_value(0, int(least), 0.05) <= level < p_value(0, int(least) - 1, 0.05)
    assert certificate.summary().startswith("NOT CERTIFIED at 0.05: every cache stays off, the base answers every")
    assert f"it takes {least} rows" in certificate.summary()


def test_an_empty_plan_is_said_loudly_with_what_it_takes(chain, candidates, splits, costs, caplog):
    table = gati_jax.replay(chain, candidates, splits["select"])
    wrong = dataclasses.replace(table, classes=(table.answers + 1) * np.ones((4, 1), np.int32))
    dear = dataclasses.replace(costs, lookup_ms=dict.fromkeys(costs.lookup_ms, 1.0))  # pays for a quarter of all rows
    slow = dataclasses.replace(costs, lookup_ms=dict.fromkeys(costs.lookup_ms, 9.0))
    for given, times, why in [
        (wrong, dear, r"by 300 rows: it takes 59 rows of which none disagrees, and no number of rows does at .*%"),
        (table, slow, "no candidate saves time at any threshold"),
    ]:
        caplog.clear()
        plan = gati_jax.plan(given, times, epsilon=0.05, seconds=1.0)
        assert plan.names == ()
        assert re.search(f"plan: EMPTY, the base answers every request: .*{why}", caplog.text)
        assert plan.summary() == "EMPTY PLAN: it has no cache, the base answers every request (composed on 300 rows)"
        assert "no cache" in repr(plan)
