"""GATI-JAX: learned caches on a frozen classifier's activations, and a certificate of how often answers may differ.

Names are loaded when they are first used, so that ``import gati_jax`` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._errors import BundleError as BundleError
    from ._errors import InputError as InputError
    from ._errors import WeightsError as WeightsError
    from ._infer import infer as infer
    from ._infer import infer_batch as infer_batch
    from .bundle import Bundle as Bundle
    from .bundle import load_bundle as load_bundle
    from .bundle import save_bundle as save_bundle
    from .bundle import save_tuning as save_tuning
    from .caches import Candidate as Candidate
    from .fitting import Augment as Augment
    from .fitting import FitConfig as FitConfig
    from .fitting import FreezeConfig as FreezeConfig
    from .fitting import Head as Head
    from .fitting import fit as fit
    from .fitting import fit_freeze as fit_freeze
    from .fitting import network_head as network_head
    from .models import Chain as Chain
    from .models import Normalization as Normalization
    from .models import resnet as resnet
    from .planning import Certificate as Certificate
    from .planning import CostTable as CostTable
    from .planning import Plan as Plan
    from .planning import ReplayTable as ReplayTable
    from .planning import certify as certify
    from .planning import certify_conditional as certify_conditional
    from .planning import certify_together as certify_together
    from .planning import plan as plan
    from .runtime import Prediction as Prediction
    from .runtime import measure_costs as measure_costs
    from .runtime import replay as replay
    from .runtime import tune as tune

__version__ = "0.1.0"

_ROOMS = {
    "_errors": ("BundleError", "InputError", "WeightsError"),
    "bundle": ("Bundle", "load_bundle", "save_bundle", "save_tuning"),
    "caches": ("Candidate",),
    "fitting": ("Augment", "FitConfig", "FreezeConfig", "Head", "fit", "fit_freeze", "network_head"),
    "_infer": ("infer", "infer_batch"),
    "models": ("Chain", "Normalization", "resnet"),
    "planning": (
        "Certificate",
        "CostTable",
        "Plan",
        "ReplayTable",
        "certify",
        "certify_conditional",
        "certify_together",
        "plan",
    ),
    "runtime": ("Prediction", "measure_costs", "replay", "tune"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> object:
    """Load a public name from its room."""
    if name not in _ROOM_OF:
        msg = f"module 'gati_jax' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return [*globals(), *_ROOM_OF]
