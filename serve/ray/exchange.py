"""What replicas that adapt and their one controller tell each other."""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from ..engine.records import Answer

HEARTBEAT = 0.5  # seconds after which a replica without requests calls
SILENT = 5.0  # seconds without a call after which a replica is taken to have ended


class Told(NamedTuple):
    """What a replica reports of an image."""

    call: int
    """The replica's number of the call that asked about it; no two of its calls have the same."""
    row: int
    """Of the image in that call."""
    kind: Literal["answered", "shadowed", "lost"]
    answer: Answer | None = None


class Place(NamedTuple):
    """What a replica is to do with an image that it has asked about."""

    route: int
    watched: bool
    """Whether the controller waits for its answer."""
    shadow: bool
    """Whether the base is to be asked as well, if a cache answers or the input cache has."""
    stored: Answer | None
    """The input cache's answer."""


class State(NamedTuple):
    """What a call returns: what is served as the controller knows it now."""

    life: str
    """Of the controller: another one after it has been replaced."""
    serial: int
    """Counts calls of this life."""
    epoch: int
    """Counts changes of the thresholds in this life."""
    thresholds: Float[np.ndarray, " caches"]
    is_closed: bool
    """Whether the base alone answers what comes now."""
    note: str
    """For the response, see ``AdaptiveEngine.notes``."""
    places: tuple[Place, ...] = ()
    """Of the images that were asked about."""
