"""Recovery: closed caches are tried again in the background, as they were or refitted, until a trial opens them.

    closed -> trial of the certified plan -> certified: swap
                -> inconclusive -> refit on what has come since -> trial -> certified: swap
                                                                  -> inconclusive -> the certified plan again ...

The certified plan is that of the bundle as it was given: where a drift goes away, it comes back without any training.
Each trial spends its part of delta. ``work`` does one bounded piece and calls ``pause`` in between; call it from a
thread of its own, or from a simulation.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Shaped

from gati_jax.bundle.record import Bundle, certified_only, costs_of
from gati_jax.bundle.versions import Versions
from gati_jax.caches import Candidate, choose
from gati_jax.data import fingerprint, row_digests
from gati_jax.errors import InputError
from gati_jax.fitting import REFIT_CONFIG, Candidates, FitConfig, evaluate, refit, replay
from gati_jax.planning import Plan, plan

from .controller import EventKind, Served, served_by
from .request_log import RequestLog
from .trials import Trial, TrialConfig, Verdict

Images = Shaped[np.ndarray, "n ..."]
Pause = Callable[[], None]
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How heads are refitted and a path is planned."""

    fit: FitConfig = REFIT_CONFIG
    """See ``refit``."""
    least: int = 256
    seconds: float = 5.0
    """For planning's search."""

    @property
    def least_rows(self) -> int:
        """Rows that each of the two blocks needs: at least one batch."""
        return max(self.least, self.fit.batch)


UPDATE_CONFIG = UpdateConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """How closed caches come back."""

    trial: TrialConfig
    refit: bool = True
    """Whether heads are refitted where the certified plan's trial is inconclusive."""
    update: UpdateConfig = UPDATE_CONFIG
    fit_rows: int = 2000
    """Requests since the alarm that heads are refitted on; fewer where the request log is small."""
    select_rows: int = 1000
    """Later ones, behind a gap, on which selectors are fitted and the path is planned; scaled like ``fit_rows``."""
    piece: int = 64
    """Requests that a trial takes at once."""

    def rows_within(self, capacity: int) -> tuple[int, int] | None:
        """Return how many rows a refit is to be fitted and selected on; None where a request log is too small for any.

        A quarter of the log, which keeps ``capacity`` requests, is left to those that come while the rows are copied.
        """
        room, wanted = capacity * 3 // 4 - self.trial.gap, self.fit_rows + self.select_rows
        if room >= wanted:
            return self.fit_rows, self.select_rows
        select = room * self.select_rows // wanted
        return (room - select, select) if min(room - select, select) >= self.update.least_rows else None


@runtime_checkable
class ControllerView(Protocol):
    """What recovery needs of an ``AdaptationController``, or of what holds a lock before it."""

    @property
    def closed_at(self) -> int | None:
        """See ``AdaptationController``."""

    @property
    def request_log(self) -> RequestLog:
        """See ``AdaptationController``."""
        ...

    @property
    def epoch(self) -> int:
        """See ``AdaptationController``."""
        ...

    def adopt(self, served: Served, text: str, epoch: int | None = None, *, number: int = 0) -> None:
        """Serve what a trial has certified."""

    def emit(self, kind: EventKind, text: str) -> None:
        """Record an event."""


class Recovery:
    """Brings closed caches back; one thread calls it."""

    def __init__(
        self, bundle: Bundle, controller: ControllerView, versions: Versions, config: RecoveryConfig, *, number: int = 0
    ) -> None:
        """Wait for the controller to close a cache of the version that is served; 0 is the bundle's certified plan.

        Versions count trials and keep what is swapped in. Where the request log is too small there are no refits, and
        a warning says so.
        """
        capacity = controller.request_log.capacity
        self.rows = config.rows_within(capacity) if config.refit else None
        """Rows that a refit is fitted and selected on; None: there are no refits."""
        if config.refit and self.rows is None:
            _log.warning(
                'adaptation: no refits, as with "--adapt-without refit": the request log has room for %d images, too '
                "few for blocks of %d rows",
                capacity,
                config.update.least_rows,
            )
        self.certified = certified_only(bundle)
        self.controller, self.versions, self.config = controller, versions, config
        self.trial: Trial | None = None
        self._piece = min(config.piece, capacity)
        self._cursor: int | None = None
        self._epoch = controller.epoch
        self._number = number or None  # of the version that was swapped in, or loaded, last
        self._refit_next = False

    def work(self, pause: Pause | None = None) -> bool:
        """Do one piece, if there is anything to do, calling ``pause`` in between; return whether there was."""
        if self.controller.epoch != self._epoch:  # what is served has changed: evidence from before no longer counts
            self._epoch, self.trial = self.controller.epoch, None
        if self.controller.closed_at is None:
            self.trial = None
            return False
        if self._number is not None:  # an alarm has closed it: it must not be loaded again
            self.versions.withdraw(self._number)
            self._number = None
        if self.trial is not None and self.trial.verdict == "certified":
            self._swap(self.trial)
            return True
        if self.trial is None:
            return self._begin(self.controller.closed_at, pause)
        return self._examine(self.trial, pause)

    def _begin(self, closed_at: int, pause: Pause | None) -> bool:
        log, config = self.controller.request_log, self.config.trial
        count = log.count
        caches, plan, what = served_by(self.certified).caches, self.certified.plan, "certified plan"
        if self._refit_next and self.rows is not None:
            if count - max(closed_at, log.oldest) < sum(self.rows) + config.gap:
                return False
            self._refit_next = False
            if (found := self._refit(count, *self.rows, pause)) is None:
                return True
            (caches, plan), what = found, "refitted heads"
        number = self.versions.next_trial()
        if plan is self.certified.plan:
            self._refit_next = True
        self.trial = Trial(caches, plan, version=number, after=count - 1, config=config)
        self._cursor = None
        self.controller.emit("trial", f"{self.trial.version}: {what}, {len(plan.path) - 1} steps")
        return True

    def _refit(
        self, count: int, fit_rows: int, select_rows: int, pause: Pause | None
    ) -> tuple[tuple[Candidate, ...], Plan] | None:
        """Refit on the latest of ``count`` requests; None where that fails or saves nothing."""
        trial, update, log = self.config.trial, self.config.update, self.controller.request_log
        until = count - select_rows - trial.gap
        try:
            older = log.recent(until - fit_rows, until).images
            later = log.recent(count - select_rows, count).images
            fitted = refit_caches(self.certified, older, later, config=update, pause=pause)
            plan = replan(
                self.certified, fitted, later, epsilon=trial.epsilon, delta=trial.delta, config=update, pause=pause
            )
        except InputError as error:  # too few distinct rows, or some were overwritten before they were copied
            self.controller.emit("refit", f"failed: {error}")
            return None
        steps = len(plan.path) - 1
        self.controller.emit("refit", f"on {fit_rows} requests: {steps} steps" if steps else "no cache saves time")
        return (tuple(fitted), plan) if steps else None

    def _examine(self, trial: Trial, pause: Pause | None) -> bool:
        log = self.controller.request_log
        if self._cursor is None:
            self._cursor = log.count
        cursor = max(self._cursor, log.oldest)
        stop = min(log.count, cursor + self._piece)
        if stop - cursor < self._piece:
            return False
        block = log.kept(cursor, stop)  # some may be overwritten meanwhile, whatever they were
        self._cursor = stop
        verdict = examine(
            self.certified, trial, block.order, block.images, cached=block.cached, batch=self._piece, pause=pause
        )
        if verdict == "inconclusive":
            self.controller.emit("inconclusive", f"trial {trial.version}: nothing certified after {trial.n} requests")
            self.trial = None
        return True

    def _swap(self, trial: Trial) -> None:
        """Save, then serve: a kill in between leaves a version that is as good."""
        bundle = updated(self.certified, trial)
        epoch, number = self._epoch, self.versions.save(bundle)
        self.trial, self._refit_next, self._number = None, False, number
        text = f"version {number}: step {trial.step} of {len(trial.plan.path) - 1} after {trial.n} requests"
        self.controller.adopt(Served(trial.caches, served_by(bundle).thresholds), text, epoch, number=number)


def refit_caches(
    bundle: Bundle,
    images: Images,
    later: Shaped[np.ndarray, "m ..."],
    *,
    config: UpdateConfig = UPDATE_CONFIG,
    pause: Pause | None = None,
) -> Candidates:
    """Refit the caches of the bundle's default plan: heads on the older block, selectors on the later one.

    Args:
        bundle: With the caches to start from.
        images: The older block.
        later: Requests behind it, and behind a gap. Those that equal one of ``images`` are left out: what is planned
            on them must be new to the heads.
        config: See ``UpdateConfig``.
        pause: See ``refit``.

    Raises:
        InputError: A block is too small, or not of the chain's inputs.
    """
    fresh = later[~np.isin(row_digests(later), row_digests(images))]
    for name, rows in (("images", images), ("later", fresh)):
        if len(rows) < config.least_rows:
            new = " that the older block has not" if name == "later" else ""
            raise InputError(f"{name}: expected at least {config.least_rows} rows{new}, got {len(rows)}")
    whole = len(fresh) // config.fit.batch * config.fit.batch  # few sizes, few programs
    caches = choose(bundle.caches, bundle.plan.names)
    return refit(bundle.chain, caches, images, select=fresh[-whole:], config=config.fit, pause=pause)


def replan(
    bundle: Bundle,
    candidates: Candidates,
    later: Images,
    *,
    epsilon: float,
    delta: float = 0.05,
    config: UpdateConfig = UPDATE_CONFIG,
    pause: Pause | None = None,
) -> Plan:
    """Plan a path for refitted caches on the rows that their selectors were fitted on, by out-of-fold scores.

    Args:
        bundle: Whose base and costs.
        candidates: As ``refit_caches`` returns them.
        later: The block that it was given.
        epsilon: Where the path ends.
        delta: For which the composition is chosen.
        config: See ``UpdateConfig``.
        pause: See ``replay``.

    Raises:
        InputError: As ``planning.plan``; or the bundle holds no costs.
    """
    rows = row_digests(later)
    selected = later[np.isin(rows, candidates.select_rows) & ~np.isin(rows, candidates.fit_rows)]
    table = replay(bundle.chain, candidates, selected, batch=config.fit.batch, pause=pause)
    found = plan(table, costs_of(bundle), epsilon=epsilon, delta=delta, seconds=config.seconds)
    if pause is not None:
        pause()
    names = tuple(c.name for c in candidates)
    path = np.full((len(found.path), len(names)), np.inf, np.float32)
    path[:, [names.index(name) for name in found.names]] = found.path
    return dataclasses.replace(found, names=names, sites=table.sites, path=path, source=table.source)


def examine(
    bundle: Bundle,
    trial: Trial,
    orders: Int[np.ndarray, " n"],
    images: Images,
    *,
    cached: Int[np.ndarray, " n"] | None = None,
    batch: int = 64,
    pause: Pause | None = None,
) -> Verdict:
    """Run the base and the caches on trial on further requests, batch by batch, until the trial is decided.

    The images are all requests that came, or those that an independent coin picked, with rising order numbers; what
    the input cache answered is as ``Trial.add`` takes it.

    Raises:
        InputError: Images that the chain does not take, or orders that do not rise.
    """
    for start in range(0, len(images), batch):
        if trial.verdict != "open":
            break
        part = images[start : start + batch]
        outputs = evaluate(bundle.chain, trial.caches, part, batch=batch, pause=pause)
        answers = None if cached is None else cached[start : start + batch]
        trial.add(orders[start : start + batch], row_digests(part), outputs, answers)
    return trial.verdict


def updated(bundle: Bundle, trial: Trial) -> Bundle:
    """Return the bundle that a trial began from with the trial's caches, plan and certificate; without other plans.

    Raises:
        InputError: Nothing was certified.
    """
    certificate = trial.certificate(bundle.certificate.name)
    if not certificate.certified:
        raise InputError(f"trial: expected a certified one, got {trial.verdict} after {trial.n} requests")
    prints = dict(bundle.provenance.data_fingerprints)
    prints |= {"select": fingerprint(trial.plan.rows), "certify": certificate.data_fingerprint}
    provenance = bundle.provenance.model_copy(update={"data_fingerprints": prints})
    return dataclasses.replace(
        bundle, caches=trial.caches, plan=trial.plan, certificate=certificate, also=(), provenance=provenance
    )
