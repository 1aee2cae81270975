"""Replay a trace through front, cascade, monitor and background, offline: every answer and every decision, no clock.

The base and the caches that are served are heard over the trace in chunks, in the reference arithmetic; which of them
answers is decided request by request, as a server would. Time is the trace's; the background may work while its share
of that time allows, at the time that its pieces took here.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from gati_jax._errors import InputError
from gati_jax.bundle import Bundle
from gati_jax.planning import CostTable
from gati_jax.runtime import Said, hear

from .background import Background, BackgroundConfig
from .keeper import Event, Keeper, KeeperConfig, Served
from .observed import POINTS, REPEATED
from .trace import Trace
from .updater import costs_of
from .versions import Versions

CHUNK = 512


class Replayed(NamedTuple):
    """What became of every request, in order."""

    exit: Int[np.ndarray, " n"]
    class_index: Int[np.ndarray, " n"]
    base_class: Int[np.ndarray, " n"]
    shadow: Bool[np.ndarray, " n"]
    """Whether the base answered behind a hit."""
    q: Float[np.ndarray, " n"]
    upper: Float[np.ndarray, " n"]
    """The monitor's bound on the mean disagreement of its present version, every 100 requests; NaN between."""
    ms: Float[np.ndarray, " n"]
    """Milliseconds by the cost table: spans, lookups and shadows."""
    full_ms: float
    events: tuple[Event, ...]
    background_seconds: float
    """That trials and refits took here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanisms:
    """What is switched on."""

    keeper: KeeperConfig
    background: BackgroundConfig | None
    """None: what is closed stays closed."""
    share: float = 0.1
    """Of the time that the background may take."""
    watch: bool = True
    """Off: caches as they are, nobody looks."""


class Memory:
    """What base and caches say to the trace's images, computed once for each set of caches."""

    def __init__(self, bundle: Bundle, images: np.ndarray) -> None:
        """Nothing is known yet."""
        self._bundle, self._images = bundle, images
        self._known: dict[int, tuple[Served, dict[int, tuple[Said, np.ndarray]]]] = {}

    def say(self, served: Served, item: int) -> tuple[int, Float[np.ndarray, " classes"], np.ndarray, np.ndarray]:
        """Return the base's answer and logits, and the caches' classes and scores, for one image."""
        raise NotImplementedError
