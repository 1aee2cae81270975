"""Caches as data: what a manifest, which is untrusted, may and may not name."""

from typing import Any

import flax.linen as nn
import pytest
from pydantic import TypeAdapter, ValidationError

from gati_jax import caches
from gati_jax.errors import InputError

PREDICTOR: TypeAdapter[Any] = TypeAdapter(caches.PredictorSpec)
SELECTOR: TypeAdapter[Any] = TypeAdapter(caches.SelectorSpec)

# kind -> (module, fields)
PREDICTORS = {
    "fc": (caches.FullyConnected, {"hidden"}),
    "pool": (caches.Pool, {"size", "hidden"}),
    "conv": (caches.Conv, {"kernel", "stride"}),
    "gap": (caches.GlobalAverage, {"hidden"}),
    "grid": (caches.Grid, {"cells", "hidden"}),
}
SELECTORS = {
    "linear": (caches.LinearSelector, set()),
    "sorted": (caches.SortedSelector, {"hidden", "top"}),
    "probability": (caches.ProbabilitySelector, set()),
}


@pytest.mark.parametrize("kind", PREDICTORS)
def test_predictor_kinds_name_their_modules(kind):
    module, fields = PREDICTORS[kind]
    options = {name: i for i, name in enumerate(sorted(fields), 2)}
    spec = PREDICTOR.validate_python({"kind": kind, **options})
    assert caches.build_predictor(spec, 7) == module(classes=7, **options)


@pytest.mark.parametrize("kind", PREDICTORS)
def test_predictor_defaults_agree_with_the_modules(kind):
    assert caches.build_predictor(PREDICTOR.validate_python({"kind": kind}), 7) == PREDICTORS[kind][0](classes=7)


@pytest.mark.parametrize("kind", SELECTORS)
def test_selector_kinds_name_their_modules(kind):
    module, fields = SELECTORS[kind]
    options = {name: i for i, name in enumerate(sorted(fields), 2)}
    assert caches.build_selector(SELECTOR.validate_python({"kind": kind, **options})) == module(**options)
    assert caches.build_selector(SELECTOR.validate_python({"kind": kind})) == module()


@pytest.mark.parametrize("adapter", [PREDICTOR, SELECTOR], ids=["predictor", "selector"])
@pytest.mark.parametrize("kind", ["os.system", "FC", "", None, 3, ["fc"]], ids=str)
def test_unknown_kinds_are_refused(adapter, kind):
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": kind})


def test_missing_kind_is_refused():
    with pytest.raises(ValidationError):
        PREDICTOR.validate_python({"hidden": 4})


SIZES = [
    *((PREDICTOR, kind, field) for kind, (_, fields) in PREDICTORS.items() for field in sorted(fields)),
    *((SELECTOR, kind, field) for kind, (_, fields) in SELECTORS.items() for field in sorted(fields)),
]


@pytest.mark.parametrize(("adapter", "kind", "field"), SIZES, ids=[f"{kind}.{field}" for _, kind, field in SIZES])
def test_sizes_are_bounded(adapter, kind, field):
    for size in (1, 65_536):
        assert getattr(adapter.validate_python({"kind": kind, field: size}), field) == size
    for size in (0, -1, 65_537, 10**30, 1.5, "many", None, float("nan"), float("inf")):
        with pytest.raises(ValidationError):
            adapter.validate_python({"kind": kind, field: size})


@pytest.mark.parametrize(("adapter", "kind"), [(PREDICTOR, k) for k in PREDICTORS] + [(SELECTOR, k) for k in SELECTORS])
def test_fields_of_other_kinds_are_refused(adapter, kind):
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": kind, "parent": 1})


def test_specs_are_frozen():
    with pytest.raises(ValidationError):
        caches.GridSpec().cells = 5


def test_own_modules_cannot_be_described():
    known = "Centres, Conv, Convolutional, FullyConnected, GlobalAverage, Grid, Neighbours, Network, Pool"
    with pytest.raises(InputError, match=f"a bundle can hold {known}, got Dense"):
        caches.describe_predictor(nn.Dense(3))
    with pytest.raises(
        InputError, match=r"a bundle can hold Confidence, LinearSelector, ProbabilitySelector, SortedSelector"
    ):
        caches.describe_selector(nn.Dense(3))


def test_module_beyond_the_bounds_is_refused_by_name():
    # What a bundle could not load again must not be saved, and the message must say why.
    with pytest.raises(InputError, match="hidden"):
        caches.describe_predictor(caches.FullyConnected(classes=3, hidden=65_537))
