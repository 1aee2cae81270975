"""Caches as data: what a manifest, which is untrusted, may and may not name, and the JSON that bundles hold."""

import json
from typing import Any

import flax.linen as nn
import pytest
from pydantic import TypeAdapter, ValidationError

from gati_jax import caches
from gati_jax.errors import InputError
from gati_jax.models import ResNet

CLASSES = 7
PREDICTOR: TypeAdapter[Any] = TypeAdapter(caches.PredictorSpec)
SELECTOR: TypeAdapter[Any] = TypeAdapter(caches.SelectorSpec)
SMALL = ResNet(stages=(1, 1), widths=(4, 6), classes=CLASSES, shortcut="A", input_shape=(8, 8, 3))
SMALL_JSON = {"stages": [1, 1], "widths": [4, 6], "bottleneck": False, "stem": 3, "shortcut": "A", "classes": CLASSES,
              "input_shape": [8, 8, 3]}  # fmt: skip

# A module with none of its defaults, and the fields of its JSON in their order.
PREDICTORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fc": (caches.FullyConnected(CLASSES, 9, standardize=False), {"hidden": 9, "standardize": False}),
    "pool": (caches.Pool(CLASSES, 8, 9, standardize=False), {"size": 8, "hidden": 9, "standardize": False}),
    "conv": (caches.Conv(CLASSES, 4, 2), {"kernel": 4, "stride": 2}),
    "gap": (caches.GlobalAverage(CLASSES, 9, standardize=False), {"hidden": 9, "standardize": False}),
    "token": (caches.ClassToken(CLASSES, 9, standardize=False), {"hidden": 9, "standardize": False}),
    "grid": (caches.Grid(CLASSES, 3, 9, standardize=False), {"cells": 3, "hidden": 9, "standardize": False}),
    "conv2d": (
        caches.Convolutional(CLASSES, (4, 5), 2, 1, 3, 9, standardize=False),
        {"channels": [4, 5], "kernel": 2, "stride": 1, "cells": 3, "hidden": 9, "standardize": False},
    ),
    "network": (caches.Network(CLASSES, SMALL), {"network": SMALL_JSON}),
    "knn": (caches.Neighbours(CLASSES, 70, 6, 9, 2), {"points": 70, "k": 6, "units": 9, "cells": 2}),
    "kmeans": (caches.Centres(CLASSES, 8, 9), {"centres": 8, "units": 9, "cells": None}),
}
SELECTORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (caches.LinearSelector(), {}),
    "sorted": (caches.SortedSelector(9, 3), {"hidden": 9, "top": 3}),
    "probability": (caches.ProbabilitySelector(), {}),
    "confidence": (caches.Confidence(), {}),
}
KINDS = [(PREDICTOR, kind) for kind in PREDICTORS] + [(SELECTOR, kind) for kind in SELECTORS]
every_kind = pytest.mark.parametrize(("adapter", "kind"), KINDS, ids=[kind for _, kind in KINDS])


def build(spec, classes=CLASSES):
    return caches.build_predictor(spec, classes) if spec.kind in PREDICTORS else caches.build_selector(spec)


@every_kind
def test_the_json_of_a_module_is_that_of_saved_bundles(adapter, kind):
    module, fields = (PREDICTORS | SELECTORS)[kind]
    text = json.dumps({"kind": kind, **fields}, separators=(",", ":"))
    describe = caches.describe_predictor if adapter is PREDICTOR else caches.describe_selector
    assert describe(module).model_dump_json() == text
    rebuilt = build(adapter.validate_json(text))
    assert (rebuilt, hash(rebuilt)) == (module, hash(module))


@every_kind
def test_fields_that_are_left_out_have_the_modules_defaults(adapter, kind):
    module, fields = (PREDICTORS | SELECTORS)[kind]
    required = {name: fields[name] for name in ("points", "network") if name in fields}
    own = {"network": SMALL} if kind == "network" else required
    arguments = {"classes": CLASSES, **own} if adapter is PREDICTOR else {}
    assert build(adapter.validate_python({"kind": kind, **required})) == type(module)(**arguments)
    for name in required:
        with pytest.raises(ValidationError):
            adapter.validate_python({"kind": kind, **required} | {name: None})


@pytest.mark.parametrize("kind", PREDICTORS)
def test_predictors_are_built_for_the_bases_classes(kind):
    spec: Any = PREDICTOR.validate_python({"kind": kind, **PREDICTORS[kind][1]})
    if kind == "network":
        with pytest.raises(InputError, match="expected one of 9 classes, got 7"):
            build(spec, 9)
    else:
        assert build(spec, 9).classes == 9


@pytest.mark.parametrize("adapter", [PREDICTOR, SELECTOR], ids=["predictor", "selector"])
@pytest.mark.parametrize("kind", ["os.system", "FC", "", None, 3, ["fc"]], ids=str)
def test_unknown_kinds_are_refused(adapter, kind):
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": kind})
    with pytest.raises(ValidationError):
        adapter.validate_python({"hidden": 4})


SIZES = [
    (adapter, kind, field)
    for adapter, kind in KINDS
    for field, value in (PREDICTORS | SELECTORS)[kind][1].items()
    if type(value) is int or field == "cells"
]


@pytest.mark.parametrize(("adapter", "kind", "field"), SIZES, ids=[f"{kind}.{field}" for _, kind, field in SIZES])
def test_sizes_are_bounded(adapter, kind, field):
    values = {"kind": kind, **(PREDICTORS | SELECTORS)[kind][1]}
    largest = 16 if kind == "conv2d" and field in {"kernel", "stride"} else 65_536
    for size in (1, largest):
        assert getattr(adapter.validate_python(values | {field: size}), field) == size
    bad = (0, -1, largest + 1, 10**30, 1.5, "many", float("nan"), float("inf"))
    for size in (*bad, *(() if values[field] is None or kind == "knn" else (None,))):
        with pytest.raises(ValidationError):
            adapter.validate_python(values | {field: size})


@pytest.mark.parametrize("channels", [[], [4] * 9, [0], [65_537], 4])
def test_channels_are_bounded(channels):
    with pytest.raises(ValidationError):
        PREDICTOR.validate_python({"kind": "conv2d", "channels": channels})


@every_kind
@pytest.mark.parametrize("field", ["parent", "name", "classes", "algorithms"])
def test_fields_that_are_not_a_kinds_own_are_refused(adapter, kind, field):
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        adapter.validate_python({"kind": kind, **(PREDICTORS | SELECTORS)[kind][1], field: 1})


def test_specs_are_frozen():
    spec: Any = caches.GridSpec()
    with pytest.raises(ValidationError):
        spec.cells = 5


@pytest.mark.parametrize(
    ("describe", "known"), [(caches.describe_predictor, PREDICTORS), (caches.describe_selector, SELECTORS)]
)
def test_own_modules_cannot_be_described(describe, known):
    names = ", ".join(sorted(type(module).__name__ for module, _ in known.values()))
    with pytest.raises(InputError, match=f"a bundle can hold {names}, got Dense"):
        describe(nn.Dense(3))


def test_module_beyond_the_bounds_is_refused_by_name():
    # What a bundle could not load again must not be saved, and the message must say why.
    with pytest.raises(InputError, match=r"FullyConnected\.hidden: Input should be less than or equal to 65536"):
        caches.describe_predictor(caches.FullyConnected(classes=3, hidden=65_537))
