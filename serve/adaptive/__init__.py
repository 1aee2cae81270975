"""Adaptation in the server: what stands between the service and the engine under ``--adapt``.

    Service -> AdaptiveEngine.submit -> AdaptationController.ask -> the input cache answers at once, or
                                     -> Engine.submit: the certified plan's route, or the base's where caches are closed
    Engine  -> AdaptiveEngine.shadow, answered, shadowed -> AdaptationController: request log, monitor, alarm
    Worker  -> Recovery: trials, refits -> AdaptiveEngine.adopt -> Engine.between_steps
    Saver   -> AdaptiveEngine.save -> StateFolder: what the next process goes on from

Four threads share the controller behind one lock: the service's, the engine's, the worker's and the saver's. A thread
that holds the lock does nothing long and never waits for another one, nor for the disk; hashes and nearest-cache
lookups are computed without it. A change of what is served is saved by the saver, then made by the engine's thread
between two steps; until then new requests go to the base, so that no request that counts for the new version is
answered by the old one, and no client is answered by what a restart would not know of.

What may fail: the controller (a bug) - adaptation is then over, the base answers, and metrics say "failed"; a piece of
recovery, which is logged, counted and tried again later; the disk - trials pause, and the base answers in place of what
changes, until it can be saved; the process, at any moment: see ``StateFolder`` and ``Versions``.
"""

from .build import AdaptiveParts as AdaptiveParts
from .build import build as build
from .gauges import AdaptiveGauges as AdaptiveGauges
