"""Adaptation in the server: what stands between the service and the engine under ``--adapt``.

    Service -> AdaptiveEngine.submit -> AdaptationController.ask -> the input cache answers at once, or
                                     -> Engine.submit: the certified plan's route, or the base's where caches are closed
    Engine  -> AdaptiveEngine.shadow, answered, shadowed -> AdaptationController: request log, monitor, alarm
    Worker  -> Recovery: trials, refits -> AdaptiveEngine.adopt -> Engine.between_steps

Three threads share the controller behind one lock: the service's, the engine's and the worker's. A thread that holds
the lock does nothing long and never waits for another one; hashes and nearest-cache lookups are computed without it. A
change of what is served is made by the engine's thread between two steps; until then new requests go to the base, so
that no request that counts for the new version is answered by the old one.

What may fail: the controller (a bug) - adaptation is then over, the base answers, and metrics say "failed"; a piece of
recovery, which is logged, counted and tried again later; the process, at any moment: see ``Versions``.
"""

from .build import AdaptiveParts as AdaptiveParts
from .build import build as build
from .gauges import AdaptiveGauges as AdaptiveGauges
