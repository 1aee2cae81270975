"""Caches as data: what a config or a manifest may name. A closed list with bounded numbers; never code to import."""

import dataclasses
from typing import Annotated, Any, Literal

import flax.linen as nn
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gati_jax.errors import InputError
from gati_jax.models import Architecture

from .neighbours import Centres, Confidence, Neighbours
from .network import Network
from .predictors import Conv, Convolutional, FullyConnected, GlobalAverage, Grid, Pool
from .selectors import LinearSelector, ProbabilitySelector, SortedSelector

Width = Annotated[int, Field(ge=1, le=65_536)]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FullyConnectedSpec(_Spec):
    """The paper's FC(h)."""

    kind: Literal["fc"] = "fc"
    hidden: Width = 1024
    standardize: bool = True


class PoolSpec(_Spec):
    """The paper's Pool(p)."""

    kind: Literal["pool"] = "pool"
    size: Width = 4096
    hidden: Width = 1024
    standardize: bool = True


class ConvSpec(_Spec):
    """The paper's Conv(k, s)."""

    kind: Literal["conv"] = "conv"
    kernel: Width = 3
    stride: Width = 1


class GlobalAverageSpec(_Spec):
    """Global average pooling and an MLP."""

    kind: Literal["gap"] = "gap"
    hidden: Width = 128
    standardize: bool = True


class GridSpec(_Spec):
    """Average pooling to a grid, and an MLP."""

    kind: Literal["grid"] = "grid"
    cells: Width = 4
    hidden: Width = 128
    standardize: bool = True


class ConvolutionalSpec(_Spec):
    """Convolutions, a grid, and an MLP; a bottleneck with kernel and stride 1."""

    kind: Literal["conv2d"] = "conv2d"
    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)] = (32,)
    kernel: Annotated[int, Field(ge=1, le=16)] = 3
    stride: Annotated[int, Field(ge=1, le=16)] = 2
    cells: Width = 2
    hidden: Width = 128
    standardize: bool = True


class NetworkSpec(_Spec):
    """A small network of its own at site 0."""

    kind: Literal["network"] = "network"
    network: Architecture


class NeighboursSpec(_Spec):
    """Freeze Inference's k-NN."""

    kind: Literal["knn"] = "knn"
    points: Width
    k: Width = 50
    units: Width = 1024
    cells: Width | None = None


class CentresSpec(_Spec):
    """Freeze Inference's k-means."""

    kind: Literal["kmeans"] = "kmeans"
    centres: Width = 100
    units: Width = 1024
    cells: Width | None = None


class LinearSelectorSpec(_Spec):
    """The paper's linear selector."""

    kind: Literal["linear"] = "linear"


class SortedSelectorSpec(_Spec):
    """The MLP on sorted log-probabilities."""

    kind: Literal["sorted"] = "sorted"
    hidden: Width = 16
    top: Width = 10


class ProbabilitySelectorSpec(_Spec):
    """The log-odds of the largest probability."""

    kind: Literal["probability"] = "probability"


class ConfidenceSpec(_Spec):
    """The largest logit as it is."""

    kind: Literal["confidence"] = "confidence"


PredictorSpec = Annotated[
    FullyConnectedSpec
    | PoolSpec
    | ConvSpec
    | GlobalAverageSpec
    | GridSpec
    | ConvolutionalSpec
    | NetworkSpec
    | NeighboursSpec
    | CentresSpec,
    Field(discriminator="kind"),
]
SelectorSpec = Annotated[
    LinearSelectorSpec | SortedSelectorSpec | ProbabilitySelectorSpec | ConfidenceSpec, Field(discriminator="kind")
]

_PREDICTORS = {
    FullyConnectedSpec: FullyConnected,
    PoolSpec: Pool,
    ConvSpec: Conv,
    GlobalAverageSpec: GlobalAverage,
    GridSpec: Grid,
    ConvolutionalSpec: Convolutional,
    NetworkSpec: Network,
    NeighboursSpec: Neighbours,
    CentresSpec: Centres,
}
_SELECTORS = {
    LinearSelectorSpec: LinearSelector,
    SortedSelectorSpec: SortedSelector,
    ProbabilitySelectorSpec: ProbabilitySelector,
    ConfidenceSpec: Confidence,
}


def build_predictor(spec: PredictorSpec, classes: int) -> nn.Module:
    """Return the predictor that ``spec`` describes.

    Raises:
        InputError: A network of other classes.
    """
    if isinstance(spec, NetworkSpec) and spec.network.classes != classes:
        raise InputError(f"network: expected one of {classes} classes, got {spec.network.classes}")
    return _PREDICTORS[type(spec)](classes=classes, **_options(spec))


def build_selector(spec: SelectorSpec) -> nn.Module:
    """Return the selector that ``spec`` describes."""
    return _SELECTORS[type(spec)](**_options(spec))


def describe_predictor(predictor: nn.Module) -> Any:  # noqa: ANN401 (a union of specs)
    """Return the spec of a predictor.

    Raises:
        InputError: The predictor is not one of this library's, so a bundle could not rebuild it.
    """
    return _describe(predictor, {module: spec for spec, module in _PREDICTORS.items()})


def describe_selector(selector: nn.Module) -> Any:  # noqa: ANN401 (a union of specs)
    """Return the spec of a selector.

    Raises:
        InputError: The selector is not one of this library's, so a bundle could not rebuild it.
    """
    return _describe(selector, {module: spec for spec, module in _SELECTORS.items()})


def _options(spec: BaseModel) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in type(spec).model_fields if name != "kind"}


def _describe(module: nn.Module, specs: dict[Any, Any]) -> BaseModel:
    spec = specs.get(type(module))
    if spec is None:
        known = ", ".join(sorted(kind.__name__ for kind in specs))
        raise InputError(f"candidates: a bundle can hold {known}, got {type(module).__name__}")
    if getattr(module, "algorithms", ()):
        raise InputError(
            f"candidates: a bundle holds {type(module).__name__} as it was before tuning, got it by other algorithms"
        )
    fields = {field.name for field in dataclasses.fields(module)} - {"parent", "name", "classes", "algorithms"}
    try:
        return spec(**{name: getattr(module, name) for name in fields})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(
            f"candidates: {type(module).__name__}.{first['loc'][0]}: {first['msg']}, got {first['input']!r}"
        ) from error
