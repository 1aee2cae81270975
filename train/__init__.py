"""Scripts: train a base, fit its caches, evaluate a bundle."""

from .epochs import EpochRecord as EpochRecord
from .epochs import epoch_order as epoch_order
from .epochs import run_epochs as run_epochs
from .epochs import scan_epoch as scan_epoch
