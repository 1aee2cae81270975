"""Caches as data: what a config or a manifest may name. A closed list with bounded numbers; never code to import.

A program adds its own modules to the list, under their import paths, by ``register_head``. A path is only looked up
there: naming a module that the program has not registered loads nothing.

A spec is the record of a Linen module: ``{"kind": "grid", "cells": 4, "hidden": 128, "standardize": true}``. Its fields
with their types, bounds and defaults are the module's own.
"""

import dataclasses
import typing
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar, Union

import flax.linen as nn
from pydantic import Field, SerializeAsAny, ValidationError, WrapValidator, create_model
from pydantic.errors import PydanticUserError

from gati_jax.errors import InputError, printable
from gati_jax.options import Strict

from .candidate import Confidence, LinearSelector, ProbabilitySelector, SortedSelector
from .neighbours import Centres, Neighbours
from .network import Network
from .predictors import ClassToken, Conv, Convolutional, FullyConnected, GlobalAverage, Grid, Pool

_PREDICTORS: dict[str, type[nn.Module]] = {
    "fc": FullyConnected,
    "pool": Pool,
    "conv": Conv,
    "gap": GlobalAverage,
    "token": ClassToken,
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
    types = typing.get_type_hints(module, include_extras=True)
    for field in dataclasses.fields(module):
        if field.name not in _NOT_IN_A_SPEC:
            fields[field.name] = (types[field.name], ... if field.default is dataclasses.MISSING else field.default)
    return create_model(f"{module.__name__}Spec", __base__=Spec, __doc__=module.__doc__, **fields)


_PREDICTOR_SPECS = {module: _spec_of(kind, module) for kind, module in _PREDICTORS.items()}
_SELECTOR_SPECS = {module: _spec_of(kind, module) for kind, module in _SELECTORS.items()}
GridSpec = _PREDICTOR_SPECS[Grid]
SortedSelectorSpec = _SELECTOR_SPECS[SortedSelector]

# --- A program's own --------------------------------------------------------------------------------------------------

T = TypeVar("T")
_OWN: dict[str, type[nn.Module]] = {}
"""By import path, such as "my_package.heads:Deep"."""


class UnregisteredError(InputError):
    """A bundle names a module that the program has not registered."""


def register_head(module: T) -> T:
    """Let bundles hold a predictor or a selector of your own; for use as a decorator of a Linen module.

    A bundle keeps its import path ("my_package.heads:Deep") and its fields, never its code: the program that loads the
    bundle has to register it as well, before. A module with a field ``classes`` is a predictor.

    Args:
        module: The class; its fields must have types that JSON can hold.

    Returns:
        The class.

    Raises:
        InputError: It is no Linen module, or JSON cannot hold a field.

    Example:
        >>> import flax.linen as nn
        >>> @register_head
        ... class Linear(nn.Module):
        ...     classes: int
        ...     @nn.compact
        ...     def __call__(self, activation):
        ...         return nn.Dense(self.classes)(activation.reshape(len(activation), -1))
    """
    given: object = module
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise InputError(f"module: expected a class of Linen modules, got {module!r:.100}")
    kind = f"{given.__module__}:{given.__qualname__}"
    specs = _PREDICTOR_SPECS if "classes" in {field.name for field in dataclasses.fields(given)} else _SELECTOR_SPECS
    try:
        spec = _spec_of(kind, given)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of defaults that JSON cannot hold
            spec.model_json_schema()
    except (PydanticUserError, UserWarning, NameError, TypeError) as error:
        reason = printable(str(error).partition("\n")[0])
        raise InputError(f"module: expected fields that JSON can hold, got others in {kind}: {reason}") from error
    if (before := _OWN.get(kind)) is not None:  # defined anew, in a notebook
        specs.pop(before, None)
    specs[given], _OWN[kind] = spec, given
    return module


def _own_or_known(value: Any, known: Callable[[Any], Any], specs: Mapping[type[nn.Module], type[Spec]]) -> Spec:  # noqa: ANN401
    kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
    if not isinstance(kind, str) or ":" not in kind:
        return known(value)
    module = _OWN.get(kind)
    if module is None or module not in specs:
        raise UnregisteredError(
            f"it has a head {printable(kind)} of your own: import that module, and call"
            " gati_jax.register_head on it before"
        )
    return specs[module].model_validate(value)


if TYPE_CHECKING:  # a union of models that exist at run time only
    PredictorSpec: TypeAlias = Spec
    SelectorSpec: TypeAlias = Spec
else:
    PredictorSpec = Annotated[
        Union[*_PREDICTOR_SPECS.values()],
        Field(discriminator="kind"),
        WrapValidator(lambda value, known: _own_or_known(value, known, _PREDICTOR_SPECS)),
        SerializeAsAny(),
    ]
    SelectorSpec = Annotated[
        Union[*_SELECTOR_SPECS.values()],
        Field(discriminator="kind"),
        WrapValidator(lambda value, known: _own_or_known(value, known, _SELECTOR_SPECS)),
        SerializeAsAny(),
    ]


def build_predictor(spec: Spec, classes: int) -> nn.Module:
    """Return the predictor that ``spec`` describes, for a base of ``classes`` classes.

    Raises:
        InputError: It is a network with another number of classes.
    """
    options = _options(spec)
    if spec.kind == "network" and (got := options["network"].classes) != classes:
        raise InputError(f"network: expected one of {classes} classes, got {got}")
    return (_PREDICTORS | _OWN)[spec.kind](classes=classes, **options)


def build_selector(spec: Spec) -> nn.Module:
    """Return the selector that ``spec`` describes."""
    return (_SELECTORS | _OWN)[spec.kind](**_options(spec))


def describe_predictor(predictor: nn.Module) -> Spec:
    """Return the spec of a predictor.

    Raises:
        InputError: The predictor is none of this library's, or is out of bounds, so a bundle could not rebuild it.
    """
    return _describe(predictor, _PREDICTOR_SPECS)


def describe_selector(selector: nn.Module) -> Spec:
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
        known = ", ".join(sorted(each.__name__ for each in specs if each not in _OWN.values()))
        raise InputError(
            f"candidates: a bundle can hold {known}, got {kind.__name__}: register it by gati_jax.register_head"
        )
    if getattr(module, "algorithms", ()):
        raise InputError(f"candidates: expected {kind.__name__} as it was before tuning, got it with other algorithms")
    spec = specs[kind]
    try:
        found = spec(**{name: getattr(module, name) for name in spec.model_fields if name != "kind"})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(
            f"candidates: {kind.__name__}.{first['loc'][0]}: {first['msg']}, got {first['input']!r}"
        ) from error
    if _options(spec.model_validate_json(found.model_dump_json())) != _options(found):
        raise InputError(f"candidates: expected fields that stay the same in JSON, got {kind.__name__} with others")
    return found
