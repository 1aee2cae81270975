"""Frozen activations to trained candidates."""

from .augment import Augment as Augment
from .augment import cutout as cutout
from .candidates import Candidates as Candidates
from .candidates import fit as fit
from .centres import k_means as k_means
from .distill import distillation_loss as distillation_loss
from .epochs import EpochRecord as EpochRecord
from .epochs import epoch_order as epoch_order
from .epochs import run_epochs as run_epochs
from .epochs import scan_epoch as scan_epoch
from .freeze import FreezeConfig as FreezeConfig
from .freeze import fit_freeze as fit_freeze
from .heads import DEFAULT_HEADS as DEFAULT_HEADS
from .heads import Head as Head
from .heads import network_head as network_head
from .loop import LoopConfig as LoopConfig
from .loop import LoopState as LoopState
from .loop import run_loop as run_loop
from .optimize import apply_gradients as apply_gradients
from .points import choose_points as choose_points
from .predictors import FitConfig as FitConfig
from .refit import REFIT_CONFIG as REFIT_CONFIG
from .refit import refit as refit
from .selection import fit_selector as fit_selector
from .untrained import head_sizes as head_sizes
from .untrained import untrained as untrained
