"""A trained predictor without its standardisation, and with it again, to be trained on."""

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from .cascaded import Cascaded
from .convolutional import Convolutional
from .predictors import FullyConnected, GlobalAverage, Grid, Pool
from .standardize import fold_into, unfold_from

_KINDS = FullyConnected | Pool | GlobalAverage | Grid | Convolutional


def fold_standardize(predictor: nn.Module, variables: Any) -> tuple[nn.Module, Any]:  # noqa: ANN401 (pytrees)
    """Fold ``Standardize`` into the layer behind it.

    Returns:
        The predictor without it and its variables; both as they are where there is nothing to fold.
    """
    if isinstance(predictor, Cascaded):
        inside = {name: tree["inner"] for name, tree in variables.items() if "inner" in tree}
        inner, folded = fold_standardize(predictor.inner, inside)
        return predictor.clone(inner=inner), {"params": {**variables["params"], "inner": folded["params"]}}
    behind = _layer_behind(predictor)
    if behind is None:
        return predictor, variables
    params = variables["params"]
    layer = fold_into(params[behind], variables["statistics"]["standardize"])
    return predictor.clone(standardize=False), {"params": {**params, behind: layer}}


def unfold_standardize(
    predictor: nn.Module,
    variables: Any,  # noqa: ANN401 (a pytree)
    activation: Float[Array, "batch *site"],
) -> tuple[nn.Module, Any]:
    """Give a folded predictor standardised features again: the same function, of which a fit may go on.

    Args:
        predictor: As ``fold_standardize`` returns it.
        variables: Its own.
        activation: What the means and scales are read off.

    Returns:
        The predictor and its variables; both as they are where it never had standardised features.
    """
    if not isinstance(predictor, _KINDS) or predictor.standardize:
        return predictor, variables
    standardized = predictor.clone(standardize=True)
    statistics: dict[str, Any] = dict(standardized.init(jax.random.key(0), activation)["statistics"])
    behind, params = _first_layer(standardized), variables["params"]
    layer = unfold_from(params[behind], dict(statistics["standardize"]))
    return standardized, {"params": {**params, behind: layer}, "statistics": statistics}


def _layer_behind(predictor: nn.Module) -> str | None:
    """Return the name of the layer behind ``Standardize``, if there is one."""
    return _first_layer(predictor) if isinstance(predictor, _KINDS) and predictor.standardize else None


def _first_layer(predictor: nn.Module) -> str:
    return "conv_0" if isinstance(predictor, Convolutional) else "hidden"
