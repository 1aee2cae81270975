"""Frozen activations to trained candidates."""

from .augment import Augment as Augment
from .distill import distillation_loss as distillation_loss
from .fit import DEFAULT_HEADS as DEFAULT_HEADS
from .fit import Candidates as Candidates
from .fit import FitConfig as FitConfig
from .fit import Head as Head
from .fit import fit as fit
from .loop import LoopConfig as LoopConfig
from .loop import LoopState as LoopState
from .loop import run_loop as run_loop
from .optimize import apply_gradients as apply_gradients
from .selection import fit_selector as fit_selector
