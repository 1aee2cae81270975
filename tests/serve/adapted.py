"""An adaptive server of a small world, and what its folder of versions has it serve."""

import dataclasses

from gati_jax.adaptation import ControllerConfig, ExactCacheConfig, MonitorConfig, served_by
from gati_jax.bundle.record import certified_only
from serve import adaptive
from serve.metrics import Metrics
from serve.protocol.model import Tally
from tests.adaptation import world

DEPTH = 3
PATIENCE = 60
QUIET = ControllerConfig(
    monitor=MonitorConfig(epsilon=world.EPSILON, drift=False), exact=ExactCacheConfig(often=2), nearest=None
)


def build(folder, bundle=None, *, capacity=8, **options):
    options = {"config": QUIET, "observer": Metrics(Tally()), **options}
    return adaptive.build(bundle or world.bundle(), folder, capacity=capacity, **options)


def certified(*, step=None, epsilon=world.EPSILON):
    """The certified plan at an earlier step: other thresholds than those that the bundle came with."""
    bundle = certified_only(world.bundle())
    step = len(bundle.plan.path) - 2 if step is None else step
    certificate = dataclasses.replace(bundle.certificate, step=step, plan_hash=bundle.plan.hash, epsilon=epsilon)
    return dataclasses.replace(bundle, certificate=certificate)


def served(folder):
    """The thresholds that a server with this folder of versions starts with."""
    return build(folder).adapting.controller.served.thresholds.tolist()


def of(bundle):
    return served_by(bundle).thresholds.tolist()


def as_given():
    return of(certified_only(world.bundle()))
