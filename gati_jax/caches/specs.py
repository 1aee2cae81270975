"""Caches as data: what a config or a manifest may name. A closed list with bounded numbers; never code to import.

A spec is the record of a Linen module: ``{"kind": "grid", "cells": 4, "hidden": 128, "standardize": true}``. Its fields
with their types, bounds and defaults are the module's own.
"""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, Union

import flax.linen as nn
from pydantic import Field, ValidationError, create_model

from gati_jax.errors import InputError
from gati_jax.options import Strict

from .candidate import Confidence, LinearSelector, ProbabilitySelector, SortedSelector
from .neighbours import Centres, Neighbours
from .predictors import Conv, Convolutional, FullyConnected, GlobalAverage, Grid, Network, Pool

_PREDICTORS: dict[str, type[nn.Module]] = {
    "fc": FullyConnected,
    "pool": Pool,
    "conv": Conv,
    "gap": GlobalAverage,
    "grid": Grid,
    "conv2d": Convolutional,
    "network": Network,
    "knn": Neighbours,
    "kmeans": Centres,
}
_SELECTORS: dict[str, type[nn.Module]] = {
    "linear": LinearSelector,
    "sorted": SortedSelector,
    "probability": ProbabilitySelector,
    "confidence": Confidence,
}
_NOT_IN_A_SPEC = {"classes", "algorithms", "parent", "name"}  # the base's, the tuning's, and Linen's own


class Spec(Strict):
    """A cache's predictor or selector as data; every kind has its own fields."""

    kind: str = ""


def _spec_of(kind: str, module: type[nn.Module]) -> type[Spec]:
    fields: dict[str, Any] = {"kind": (Literal[kind], kind)}
    for field in dataclasses.fields(module):
        if field.name not in _NOT_IN_A_SPEC:
            fields[field.name] = (field.type, ... if field.default is dataclasses.MISSING else field.default)
    return create_model(f"{module.__name__}Spec", __base__=Spec, __doc__=module.__doc__, **fields)


_PREDICTOR_SPECS = {module: _spec_of(kind, module) for kind, module in _PREDICTORS.items()}
_SELECTOR_SPECS = {module: _spec_of(kind, module) for kind, module in _SELECTORS.items()}
GridSpec = _PREDICTOR_SPECS[Grid]
SortedSelectorSpec = _SELECTOR_SPECS[SortedSelector]

if TYPE_CHECKING:  # a union of models that exist at run time only
    PredictorSpec: TypeAlias = Spec
    SelectorSpec: TypeAlias = Spec
else:
    PredictorSpec = Annotated[Union[*_PREDICTOR_SPECS.values()], Field(discriminator="kind")]
    SelectorSpec = Annotated[Union[*_SELECTOR_SPECS.values()], Field(discriminator="kind")]


def build_predictor(spec: PredictorSpec, classes: int) -> nn.Module:
    """Return the predictor that ``spec`` describes, for a base of ``classes`` classes.

    Raises:
        InputError: It is a network with another number of classes.
    """
    options = _options(spec)
    if spec.kind == "network" and (got := options["network"].classes) != classes:
        raise InputError(f"network: expected one of {classes} classes, got {got}")
    return _PREDICTORS[spec.kind](classes=classes, **options)


def build_selector(spec: SelectorSpec) -> nn.Module:
    """Return the selector that ``spec`` describes."""
    return _SELECTORS[spec.kind](**_options(spec))


def describe_predictor(predictor: nn.Module) -> PredictorSpec:
    """Return the spec of a predictor.

    Raises:
        InputError: The predictor is none of this library's, or is out of bounds, so a bundle could not rebuild it.
    """
    return _describe(predictor, _PREDICTOR_SPECS)


def describe_selector(selector: nn.Module) -> SelectorSpec:
    """Return the spec of a selector.

    Raises:
        InputError: The selector is none of this library's, or is out of bounds, so a bundle could not rebuild it.
    """
    return _describe(selector, _SELECTOR_SPECS)


def _options(spec: Spec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in type(spec).model_fields if name != "kind"}


def _describe(module: nn.Module, specs: dict[type[nn.Module], type[Spec]]) -> Spec:
    kind = type(module)
    if kind not in specs:
        known = ", ".join(sorted(each.__name__ for each in specs))
        raise InputError(f"candidates: a bundle can hold {known}, got {kind.__name__}")
    if getattr(module, "algorithms", ()):
        raise InputError(f"candidates: expected {kind.__name__} as it was before tuning, got it with other algorithms")
    spec = specs[kind]
    try:
        return spec(**{name: getattr(module, name) for name in spec.model_fields if name != "kind"})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(
            f"candidates: {kind.__name__}.{first['loc'][0]}: {first['msg']}, got {first['input']!r}"
        ) from error
