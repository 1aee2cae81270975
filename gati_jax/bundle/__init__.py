"""Bundles: what is saved, loaded and served."""

from .load import load_bundle as load_bundle
from .manifest import Provenance as Provenance
from .record import Bundle as Bundle
from .save import save_bundle as save_bundle
from .save import save_tuning as save_tuning
from .versions import Loaded as Loaded
from .versions import Versions as Versions
