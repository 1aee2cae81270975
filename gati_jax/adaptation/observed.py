"""What adaptation learns of one served request."""

from typing import NamedTuple

REPEATED = -1
"""The exit of requests that the exact-repeat layer answered, in front of the network."""
POINTS = -2
"""The exit of requests that a stored point answered, in front of the network."""


class Observed(NamedTuple):
    """One served request, in the order of its answer."""

    exit: int
    """The site it left at; the base's depth for the base; ``REPEATED`` or ``POINTS`` in front."""
    score: float
    """The selector's score there; infinity from the base."""
    class_index: int
    """What the client got."""
    q: float
    """Probability, fixed before, with which its base answer is computed; 1 for a miss."""
    base_class: int | None
    """The base's answer where it is known: of every miss and of every shadowed hit."""
