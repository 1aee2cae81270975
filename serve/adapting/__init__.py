"""Adaptation, live: what stands between the service and the engine under ``--adapt``.

    Service -> Adapting.submit -> Keeper.ask -> repeats and points answer at once
                               -> Engine.submit: the home plan's route; the base's where all is closed, or comes often
    Engine  -> Adapting.shadow, answered, shadowed -> Keeper: window, monitor, alarm
    Worker  -> Background: trials, refits -> Adapting.adopt -> Engine.between_steps

Three threads meet at the keeper, behind one lock: the service's, the engine's, and the worker's. Whoever holds it does
nothing long, and never waits for another thread. A change of what is served (``_changed``) is left to the engine's
thread; until it has made it, requests that come go to the base, so that none which counts for the new version is
answered by the old one.

What may fail: the keeper (a bug), then adaptation is over, the base answers, and metrics say "failed"; a piece of the
background, which is logged, counted, and tried again later; the process, at any moment: see ``Versions``.
"""

from .adapting import Adapting as Adapting
from .begin import Begun as Begun
from .begin import Options as Options
from .begin import begin as begin
from .worker import Worker as Worker
