"""Frozen activations to trained candidates."""

from .fit import Candidates as Candidates
from .fit import fit as fit
from .fit import fit_selector as fit_selector
from .freeze import FreezeConfig as FreezeConfig
from .freeze import choose_points as choose_points
from .freeze import fit_freeze as fit_freeze
from .heads import DEFAULT_HEADS as DEFAULT_HEADS
from .heads import Head as Head
from .heads import default_heads as default_heads
from .heads import head_sizes as head_sizes
from .heads import network_head as network_head
from .heads import untrained as untrained
from .loop import LoopConfig as LoopConfig
from .loop import LoopState as LoopState
from .loop import run_loop as run_loop
from .predictors import Augment as Augment
from .predictors import FitConfig as FitConfig
from .predictors import apply_gradients as apply_gradients
from .predictors import distillation_loss as distillation_loss
from .refit import REFIT_CONFIG as REFIT_CONFIG
from .refit import refit as refit
from .replay import Outputs as Outputs
from .replay import evaluate as evaluate
from .replay import replay as replay
from .replay import replay_logits as replay_logits
