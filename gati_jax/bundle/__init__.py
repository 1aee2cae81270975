"""Bundles: a base with its caches, plans and certificates, as it is saved, loaded and served.

A bundle is a folder:

    manifest.json      network, normalization, caches, class names, provenance, digests of all other files
    plans.json         up to four plans, the default first: chosen caches in order, and the path of their thresholds
    certificates.json  for each plan, a bound on how often it disagrees with the base
    arrays/            parameters of the base and of the caches (Orbax)
    tuning/            measured costs, algorithms and tiles by device; without digests, for they are measured anew

Loading never imports or unpickles what a bundle names: networks and caches come from a closed list, and arrays are read
only in the shapes that those imply.
"""

from .load import load_bundle as load_bundle
from .manifest import Provenance as Provenance
from .manifest import installed_versions as installed_versions
from .record import Bundle as Bundle
from .save import save_bundle as save_bundle
from .save import save_tuning as save_tuning
from .versions import Loaded as Loaded
from .versions import Versions as Versions
