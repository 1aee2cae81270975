"""A trained predictor without its standardisation."""

from typing import Any

import flax.linen as nn

from .cascaded import Cascaded
from .convolutional import Convolutional
from .predictors import FullyConnected, GlobalAverage, Grid, Pool
from .standardize import fold_into


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


def _layer_behind(predictor: nn.Module) -> str | None:
    """Return the name of the layer behind ``Standardize``, if there is one."""
    kinds = FullyConnected | Pool | GlobalAverage | Grid | Convolutional
    if not isinstance(predictor, kinds) or not predictor.standardize:
        return None
    return "conv_0" if isinstance(predictor, Convolutional) else "hidden"
