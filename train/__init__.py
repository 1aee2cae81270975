"""Scripts: train a base, fit its caches, evaluate a bundle."""

from .watch import start_early

start_early()

from .epochs import EpochRecord as EpochRecord  # noqa: E402 (what follows takes seconds to import)
from .epochs import epoch_order as epoch_order  # noqa: E402
from .epochs import run_epochs as run_epochs  # noqa: E402
from .epochs import scan_epoch as scan_epoch  # noqa: E402
