"""The pass through the whole house with a network that is defined outside the package."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gati_jax

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
