"""A bundle that was tuned for both backends: which of them answers, what is promised, what is left out."""

import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import gati_jax
from gati_jax import InputError
from gati_jax.planning import Plan
from gati_jax.profiling import (
    Backend,
    TunedCascade,
    Tuning,
    device_name,
    onnx_tuning,
    reference_tuning,
    replays_on_onnx,
)
from gati_jax.profiling.backends import OnnxTunedCascade
from gati_jax.profiling.compiler import OPTIONS
from tests.bundle.made import PIXELS, at, checked, edit, in_memory, make_certificate

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
MANY = 8


def timed(tuning: Tuning, one: float, many: float) -> Tuning:
    """With these milliseconds for one request and for ``MANY``."""
    first, *_, last = tuning.tiles
    tiles = (dataclasses.replace(first, milliseconds=float(one)), dataclasses.replace(last, milliseconds=float(many)))
    return dataclasses.replace(tuning, tiles=tiles)


@pytest.fixture(scope="module")
def on_onnx(residual) -> Tuning:
    chain, caches, *_ = residual
    return onnx_tuning(chain, caches, sizes=(1, MANY))


@pytest.fixture
def answered(monkeypatch) -> list[str]:
    """The backend of every answer by a tuning."""
    names: list[str] = []
    for kind in (TunedCascade, OnnxTunedCascade):
        for method in ("predict", "predict_one"):
            real = vars(kind)[method]

            def counting(self, given, real=real):
                names.append(self.tuning.backend)
                return real(self, given)

            monkeypatch.setattr(kind, method, counting)
    return names


@pytest.mark.parametrize(
    ("xla", "onnx", "unchecked", "default"),
    [
        ((4.0, 8.0), (2.0, 6.0), (), "onnxruntime"),
        ((2.0, 6.0), (4.0, 8.0), (), "xla"),
        ((2.0, 8.0), (1.0, 15.0), (), "onnxruntime"),  # half the time for one, less than twice the time for many
        ((2.0, 8.0), (1.0, 17.0), (), "xla"),
        ((4.0, 8.0), (2.0, 6.0), ("onnxruntime",), "xla"),  # it is the slower one, but is known to be right
        ((2.0, 6.0), (4.0, 8.0), ("xla",), "onnxruntime"),
    ],
)
def test_the_faster_of_those_that_were_checked_answers(residual, on_onnx, answered, xla, onnx, unchecked, default):  # noqa: PLR0917
    bundle = in_memory(residual)
    tunings = [timed(reference_tuning((1, MANY)), *xla), timed(on_onnx, *onnx)]
    tunings = tuple(one if one.backend in unchecked else checked(bundle, one) for one in tunings)
    for order in (tunings, tunings[::-1]):
        tuned = dataclasses.replace(bundle, tunings=order)
        gati_jax.infer(tuned, PIXELS[0])
        found = gati_jax.infer_batch(tuned, PIXELS)
        assert answered == [default, default]
        reference = gati_jax.infer_batch(tuned, PIXELS, numerics="reference")
        assert answered == [default, default]  # by none of them
        np.testing.assert_array_equal(found.exit, reference.exit)
        bound = tuned.bound_of()
        assert bound.check is not None
        assert bound.check.programs == next(one.programs for one in tunings if one.backend == default)
        answered.clear()


def test_a_backend_that_is_asked_for_answers(residual, on_onnx, answered):
    bundle = in_memory(residual)
    tunings = checked(bundle, timed(reference_tuning((1, MANY)), 1, 1)), checked(bundle, timed(on_onnx, 9, 9), differ=9)
    bundle = dataclasses.replace(bundle, tunings=tunings)
    gati_jax.infer_batch(bundle, PIXELS, backend="onnxruntime")
    gati_jax.infer(bundle, PIXELS[0], backend="onnxruntime", numerics="fast")
    gati_jax.infer(bundle, PIXELS[0], backend="xla")
    assert answered == ["onnxruntime", "onnxruntime", "xla"]
    gati_jax.infer(bundle, PIXELS[0], backend="xla", numerics="reference")
    assert len(answered) == 3
    expected: dict[Backend, int] = {"xla": 3, "onnxruntime": 9}
    for backend, differ in expected.items():
        bound = bundle.bound_of(backend=backend)
        assert bound.check is not None
        assert (bound.check.differ, bound.numerics) == (differ, "fast")
        assert bound.epsilon == pytest.approx(bundle.certificate.epsilon + bound.check.upper)
    assert bundle.bound_of(numerics="reference", backend="onnxruntime").epsilon == bundle.certificate.epsilon


def test_without_a_check_a_backend_answers_only_where_it_is_asked_for(residual, on_onnx, answered):
    bundle = dataclasses.replace(in_memory(residual), tunings=(on_onnx,))
    with pytest.warns(UserWarning, match="were not compared .* certified arithmetic; run gati-jax tune"):
        gati_jax.infer(bundle, PIXELS[0])
    gati_jax.infer(bundle, PIXELS[0], backend="xla")  # for which it has not been tuned
    assert (answered, bundle.bound_of().numerics) == ([], "reference")
    gati_jax.infer(bundle, PIXELS[0], backend="onnxruntime")
    assert answered == ["onnxruntime"]
    assert bundle.bound_of(numerics="fast", backend="onnxruntime").epsilon is None  # of which nothing is known


def test_an_arithmetic_that_was_certified_adds_nothing(residual, on_onnx):
    """Of other programs the check is added."""
    chain, caches, plan, certificate = residual
    certificate = dataclasses.replace(certificate, arithmetics=("other", on_onnx.programs))
    bundle = in_memory((chain, caches, plan, certificate))
    tunings = (checked(bundle, timed(reference_tuning((1, MANY)), 9, 9)), checked(bundle, timed(on_onnx, 1, 1)))
    bundle = dataclasses.replace(bundle, tunings=tunings)
    bound = bundle.bound_of()
    assert (bound.numerics, bound.epsilon, bound.delta, bound.check) == ("fast", 0.1, 0.05, None)
    other = bundle.bound_of(backend="xla")
    upper = bundle.checks_of("xla")["base"].upper
    assert (other.epsilon, other.delta) == (pytest.approx(0.1 + upper), pytest.approx(0.06))
    newer = dataclasses.replace(on_onnx, onnxruntime="99.0")  # another version is another arithmetic
    with pytest.warns(UserWarning, match="run gati-jax tune"):
        assert dataclasses.replace(bundle, tunings=(newer,)).bound_of(numerics="fast").epsilon is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onnxruntime"}, "backend: this bundle has not been tuned for onnxruntime on this device; run"),
        ({"backend": "onnxruntime", "numerics": "reference"}, "backend: expected xla with the reference numerics"),
        ({"backend": "xla", "numerics": "fast"}, "numerics: this bundle has not been tuned for this device"),
    ],
)
def test_what_cannot_be_is_refused(residual, options, message):
    bundle = in_memory(residual)
    for answer, images in ((gati_jax.infer, PIXELS[0]), (gati_jax.infer_batch, PIXELS[:0])):
        with pytest.raises(InputError, match=f"^{message}"):
            answer(bundle, images, **options)


def test_rows_are_compared_with_those_of_the_backend(residual, on_onnx, monkeypatch):
    """A request that it answers otherwise, alone or in a batch, is in the bound."""
    bundle, real = in_memory(residual), OnnxTunedCascade.each_way

    def wrong(self, images):
        for i, answers in enumerate(real(self, images)):
            yield answers._replace(class_index=answers.class_index + (np.arange(len(images)) == i))

    monkeypatch.setattr(OnnxTunedCascade, "each_way", wrong)
    tuning = gati_jax.check_tuning(bundle, on_onnx, PIXELS)
    assert [(check.differ, check.n) for check in tuning.checks] == [(3, len(PIXELS))] * 2  # one in each way
    assert {(check.device, check.programs) for check in tuning.checks} == {(tuning.device, tuning.programs)}
    assert tuning.device == device_name("onnxruntime") != device_name()


def test_replays_that_are_still_there_are_compared_instead(residual, on_onnx, answered, monkeypatch):
    """The certified one, and those on ONNX Runtime: nothing is run again, and the counts are the same."""
    chain, caches, plan, _ = residual
    table = gati_jax.replay(chain, caches, PIXELS)
    plan = Plan(**{**vars(plan), "source": table.source})
    bundle = in_memory((chain, caches, plan, make_certificate(plan, step=1)))
    found = gati_jax.check_tuning(bundle, on_onnx, PIXELS)
    replays = replays_on_onnx(table, chain, caches, PIXELS)
    answered.clear()
    with monkeypatch.context() as patched:
        patched.setattr("gati_jax.inference.predict_batch", None)
        patched.setattr(OnnxTunedCascade, "each_way", None)
        assert gati_jax.check_tuning(bundle, on_onnx, PIXELS, certified=table, replays=replays) == found
        wrong = dataclasses.replace(replays[1], answers=(replays[1].answers + (np.arange(len(PIXELS)) == 0)) % 5)
        counted = gati_jax.check_tuning(bundle, on_onnx, PIXELS, certified=table, replays=(replays[0], wrong))
        assert counted.checks[0].differ == found.checks[0].differ + 1
    for other in (gati_jax.replay(chain, caches[:1], PIXELS), gati_jax.replay(chain, caches, PIXELS[::-1])):
        with pytest.raises(InputError, match="expected"):
            gati_jax.check_tuning(bundle, on_onnx, PIXELS, certified=other)
        with pytest.raises(InputError, match="expected"):
            gati_jax.check_tuning(bundle, on_onnx, PIXELS, certified=table, replays=(other,))


# --- Files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(saved_residual, residual, on_onnx, tmp_path) -> Path:
    """The tuning of a saved bundle for ONNX Runtime, beside one for XLA; both are checked."""
    folder, bundle = shutil.copytree(saved_residual, tmp_path / "bundle"), in_memory(residual)
    for tuning in (timed(on_onnx, 1, 1), timed(reference_tuning((1, MANY)), 9, 9)):
        gati_jax.save_tuning(folder, checked(bundle, tuning))
    return folder / "tuning" / f"{device_name('onnxruntime')}.json"


def test_both_tunings_are_kept(file, residual, answered):
    bundle = gati_jax.load_bundle(file.parents[1])  # warnings are errors
    assert list(bundle.tunings_here) == ["onnxruntime", "xla"]
    gati_jax.infer(bundle, PIXELS[0])
    assert answered == ["onnxruntime"]
    chain, caches, plan, certificate = residual
    certified = dataclasses.replace(certificate, arithmetics=(bundle.tunings_here["onnxruntime"].programs,))
    gati_jax.save_bundle(file.parents[1], chain, caches, plan, certified)
    assert gati_jax.load_bundle(file.parents[1]).certificate == certified


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_the_package_its_tuning_is_left_out(file, monkeypatch, answered, missing):
    for module in [name for name in sys.modules if name.startswith("gati_jax.export.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)  # importing it fails
    with pytest.warns(UserWarning, match="is left out") as warned:
        bundle = gati_jax.load_bundle(file.parents[1])
    (text,) = (str(one.message) for one in warned)
    assert f"{file} is left out: {missing} cannot be imported: pip install 'gati-jax[onnx]'" in text
    gati_jax.infer(bundle, PIXELS[0])
    assert answered == ["xla"]
    with pytest.raises(InputError, match=r"^backend: this bundle has not been tuned for onnxruntime"):
        gati_jax.infer(bundle, PIXELS[0], backend="onnxruntime")
    with pytest.raises(InputError, match=rf"^backend: {missing} cannot be imported: pip install"):
        onnx_tuning(bundle.chain)


UNFIT = {
    "another version": (at("tuning onnxruntime", "1.0.0"), r"expected one of onnxruntime .*, got 1\.0\.0"),
    "another device": (at("tuning device", "onnxruntime-cpu-another"), "expected one of onnxruntime-cpu-.*got onnx"),
    "xla's device": (at("tuning device", device_name()), f"expected one of onnxruntime-cpu-.*, got {device_name()}"),
    "costs of another depth": (
        at("tuning tiles 0 costs", {"device": "x", "batch": 1, "blocks_ms": [1.0], "lookup_ms": {}}),
        "expected costs of 2 blocks for 1 rows, got 1 for 1",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_tuning_that_cannot_be_of_this_is_left_out(file, answered, case):
    change, reason = UNFIT[case]
    edit(file, change)
    with pytest.warns(UserWarning, match=f"the tuning in .* is left out: .*{reason}.*run gati-jax tune"):
        bundle = gati_jax.load_bundle(file.parents[1])
    gati_jax.infer(bundle, PIXELS[0])
    assert answered == ["xla"]


FORGED = {
    "options": at("tuning tiles 1 options", OPTIONS["cpu"][1]),
    "algorithms": at("tuning tiles 1 algorithms", {"3x3/1 4-4 8x8": "im2col"}),
    "a version that is none": at("tuning onnxruntime", "1\n2"),
    "a device of megabytes": at("tuning device", "x" * 2**21),
    "no tile of one": at("tuning tiles 0 size", 2),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_tuning_is_named_in_a_short_line(file, case):
    edit(file, FORGED[case])
    with pytest.raises(gati_jax.BundleError, match=r"only measurements: remove it, and tune again") as raised:
        gati_jax.load_bundle(file.parents[1])
    assert len(str(raised.value)) < 1000


def test_a_tuning_that_pretends_to_be_another_programs_has_no_checks(file):
    """Without its version it would be XLA's, of a device that does not exist."""
    edit(file, at("tuning onnxruntime", ""))
    bundle = gati_jax.load_bundle(file.parents[1])
    assert list(bundle.tunings_here) == ["xla"]
