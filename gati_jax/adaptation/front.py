"""What may answer in front of the network: exact repeats, then stored points. Both know only what the base has said.

Repeats need no trial, for they are the base's own answers. Points answer once a trial has shown from which score on
they may: until then they only say what they would have answered, and learn. See ``PointsTrial``.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Shaped

from .observed import POINTS, REPEATED
from .points import Points
from .repeats import Repeats


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """A request on its way, and what the front knows of it."""

    number: int
    """In the order in which requests came."""
    image: Shaped[np.ndarray, "..."]
    q: float
    """The probability with which the base's answer is to be computed if it hits; fixed before it came."""
    look: bool
    """What the coin said, whoever answers."""
    version: int
    """The monitor's, as it came: what an older cascade has answered says nothing of the present one."""
    key: bytes = b""
    features: Float32[np.ndarray, " features"] | None = None
    point_class: int = -1
    point_score: float = math.nan
    """NaN where the points were not asked."""
    early: "Early | None" = None
    """The answer, if the front has one."""
    often: bool = False
    """Let the base answer: it comes often, and would then be known."""


class Early(NamedTuple):
    """An answer in front of the network."""

    exit: int
    """``REPEATED`` or ``POINTS``."""
    class_index: int
    score: float


class Front:
    """Exact repeats and stored points, each of which may be left out. One thread, or one lock."""

    def __init__(self, repeats: Repeats | None, points: Points | None) -> None:
        """Know nothing; points are closed."""
        self.repeats, self.points = repeats, points
        self.threshold = math.inf
        """Score from which on points answer."""

    def ask(self, ticket: Ticket, now: float, *, points: bool = True) -> None:
        """Look a request up; ``ticket.early`` is the answer, if there is one.

        Args:
            ticket: Filled in.
            now: Seconds.
            points: Whether points are asked; what the base answers is stored all the same.
        """
        if self.repeats is not None:
            ticket.key = self.repeats.key(ticket.image)
            known = self.repeats.ask(ticket.key, now)
            if known.class_index is not None:
                ticket.early = Early(REPEATED, known.class_index, math.inf)
                return
            ticket.often = known.often
        if self.points is not None:
            keys = self.points.keys(ticket.image[None])
            ticket.features = keys[0]
            if not points:
                return
            found = self.points.ask(keys)
            ticket.point_class, ticket.point_score = int(found.class_index[0]), float(found.score[0])
            if ticket.point_score >= self.threshold and not ticket.often:
                ticket.early = Early(POINTS, ticket.point_class, ticket.point_score)
                self.points.used(int(found.point[0]))

    def learn(
        self, ticket: Ticket, logits: Float[np.ndarray, " classes"], now: float, *, base: str, store: bool = True
    ) -> None:
        """Take what the base has answered.

        Args:
            ticket: The request.
            logits: Of the base.
            now: Seconds.
            base: Which base, see ``Points``.
            store: Whether it becomes a point.
        """
        if self.repeats is not None and ticket.key:
            self.repeats.store(ticket.key, int(np.argmax(logits)), now, base=base)
        if self.points is not None and ticket.features is not None and store:
            self.points.add(ticket.features, logits, base=base)
