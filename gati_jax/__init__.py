"""GATI-JAX: learned caches on a frozen classifier's activations, and a certificate of how often answers may differ.

Names are loaded when they are first used, so that ``import gati_jax`` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bundle import Bundle as Bundle
    from .bundle import load_bundle as load_bundle
    from .bundle import save_bundle as save_bundle
    from .bundle import save_tuning as save_tuning
    from .caches import Candidate as Candidate
    from .certification import Certificate as Certificate
    from .certification import certify as certify
    from .certification import certify_conditional as certify_conditional
    from .certification import certify_together as certify_together
    from .errors import BundleError as BundleError
    from .errors import InputError as InputError
    from .errors import WeightsError as WeightsError
    from .fitting import Augment as Augment
    from .fitting import FitConfig as FitConfig
    from .fitting import FreezeConfig as FreezeConfig
    from .fitting import Head as Head
    from .fitting import fit as fit
    from .fitting import fit_freeze as fit_freeze
    from .fitting import network_head as network_head
    from .fitting import replay as replay
    from .inference import infer as infer
    from .inference import infer_batch as infer_batch
    from .models import Chain as Chain
    from .models import Normalization as Normalization
    from .models import resnet as resnet
    from .planning import CostTable as CostTable
    from .planning import Plan as Plan
    from .planning import ReplayTable as ReplayTable
    from .planning import plan as plan
    from .profiling import measure_costs as measure_costs
    from .profiling import tune as tune
    from .runtime import Prediction as Prediction

__version__ = "0.1.0"

_ROOMS = {
    "bundle": ("Bundle", "load_bundle", "save_bundle", "save_tuning"),
    "caches": ("Candidate",),
    "certification": ("Certificate", "certify", "certify_conditional", "certify_together"),
    "errors": ("BundleError", "InputError", "WeightsError"),
    "fitting": ("Augment", "FitConfig", "FreezeConfig", "Head", "fit", "fit_freeze", "network_head", "replay"),
    "inference": ("infer", "infer_batch"),
    "models": ("Chain", "Normalization", "resnet"),
    "planning": ("CostTable", "Plan", "ReplayTable", "plan"),
    "profiling": ("measure_costs", "tune"),
    "runtime": ("Prediction",),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> object:
    """Load a public name from its room."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'gati_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return [*globals(), *_ROOM_OF]
