"""What a bundle's ``tuning/`` says of devices, and whether it can be true of this bundle."""

import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from ._errors import BundleError
from ._manifest import DeviceFile, read_json
from .caches import Candidate, Network
from .models import Architecture, Chain, layers
from .runtime import Tile, Tuning
from .runtime.tuning import OPTIONS


def read_devices(folder: Path, chain: Chain, caches: Sequence[Candidate]) -> tuple[DeviceFile, ...]:
    """Read all files; a tuning that is another network's or another compiler's is left out with a warning.

    Raises:
        BundleError: A file is damaged.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            here = read_json(file, DeviceFile)
        except BundleError as error:
            msg = f"{error} (it holds only measurements: remove it, and tune again)"
            raise BundleError(msg) from error
        if here.tuning is not None and (reason := unfit(here.tuning, file.stem, chain, caches)):
            msg = f"bundle: the tuning in {file} is left out: {reason}; run python -m train.tune --bundle DIR again"
            warnings.warn(msg, stacklevel=3)
            here = here.model_copy(update={"tuning": None})
        found.append(here)
    return tuple(found)


def unfit(tuning: Tuning, device: str, chain: Chain, caches: Sequence[Candidate]) -> str | None:
    """Say why a tuning cannot be this bundle's, on the device that its file is named after."""
    if tuning.device != device:
        return f"expected one of {device}, got {tuning.device}"
    if tuning.jaxlib not in {"", version("jaxlib")}:
        return f"expected one of jaxlib {version('jaxlib')}, got {tuning.jaxlib}"
    networks = [chain.network, *(c.predictor.network for c in caches if isinstance(c.predictor, Network))]
    known = {
        layer.kind: layer.applicable
        for network in networks
        if isinstance(network, Architecture)
        for block in layers(network)
        for layer in block
    }
    names = {cache.name for cache in caches}
    reasons = (_unfit_tile(tile, device.partition("-")[0], len(chain), known, names) for tile in tuning.tiles)
    return next((reason for reason in reasons if reason), None)


def _unfit_tile(
    tile: Tile, platform: str, depth: int, known: Mapping[str, Sequence[str]], names: set[str]
) -> str | None:
    strange = [kind for kind, algorithm in tile.algorithms.items() if algorithm not in known.get(kind, ())]
    if strange:
        return f"the network has no {strange[0]} that {tile.algorithms[strange[0]]} could do"
    if tile.options and tile.options not in OPTIONS.get(platform, ()):
        return f"{tile.options} are no options for {platform}"
    costs = tile.costs
    if costs is not None and (costs.batch, len(costs.blocks_ms)) != (tile.size, depth):
        return f"expected costs of {depth} blocks for {tile.size} rows, got {len(costs.blocks_ms)} for {costs.batch}"
    if costs is not None and not set(costs.lookup_ms) <= names:
        return f"expected costs of {', '.join(sorted(names))}, got {', '.join(sorted(costs.lookup_ms))}"
    return None
