"""What happens beside serving: closed caches are tried again, as they were or refitted, until a trial opens them.

    closed -> trial of the home plan -> certified: swap
                                     -> empirical -> refit on what has come since -> trial -> certified: swap
                                                                                           -> empirical -> home ...

The home plan is the bundle's that was given: where a drift goes away, it comes back without any training. Each trial
spends its part of delta. ``work`` does one bounded piece, and rests in ``pause``; call it from a thread of its own, or
from a simulation.
"""

import dataclasses
import logging
from typing import Protocol, runtime_checkable

from gati_jax._errors import InputError
from gati_jax.bundle import Bundle
from gati_jax.caches import Candidate
from gati_jax.planning import Plan

from .keeper import Served, standing
from .trial import Trial, TrialConfig
from .updater import DEFAULT_CONFIG, Pause, UpdateConfig, examine, home_of, refit_caches, replan, updated
from .versions import Versions
from .window import Window

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackgroundConfig:
    """How closed caches come back."""

    trial: TrialConfig
    refit: bool = True
    """Whether heads are refitted where the home plan fails."""
    update: UpdateConfig = DEFAULT_CONFIG
    fit_rows: int = 2000
    """Requests since the alarm that heads are refitted on."""
    select_rows: int = 1000
    """Later ones, behind a gap, on which selectors are fitted and the path is planned."""
    piece: int = 64
    """Requests that are examined at once."""


@runtime_checkable
class Kept(Protocol):
    """What the background needs of a ``Keeper``: itself, or what holds a lock before it."""

    @property
    def closed_at(self) -> int | None:
        """See ``Keeper``."""
        ...

    @property
    def window(self) -> Window:
        """See ``Keeper``."""
        ...

    @property
    def epoch(self) -> int:
        """See ``Keeper``."""
        ...

    def adopt(self, served: Served, text: str, epoch: int | None = None) -> None:
        """Serve what a trial has certified."""
        ...

    def tell(self, kind: str, text: str) -> None:
        """Hear what the background does."""
        ...


class Background:
    """Brings closed caches back; one thread calls it."""

    def __init__(self, bundle: Bundle, keeper: Kept, versions: Versions, config: BackgroundConfig) -> None:
        """Wait for something to be closed.

        Args:
            bundle: The home plan's.
            keeper: Whose caches it brings back.
            versions: Counts trials, and keeps what is swapped in.
            config: See ``BackgroundConfig``.

        Raises:
            InputError: The window keeps fewer requests than a refit asks for.
        """
        needed = config.fit_rows + config.trial.gap + config.select_rows
        if config.refit and keeper.window.config.recent < needed:
            got = keeper.window.config.recent
            msg = f"window.recent: expected at least the {needed} requests of a refit, got {got}"
            raise InputError(msg)
        self.home = self.bundle = home_of(bundle)
        self.keeper, self.versions, self.config = keeper, versions, config
        self.trial: Trial | None = None
        self._cursor: int | None = None
        self._epoch = keeper.epoch
        self._number: int | None = None  # of the version that was swapped in last
        self._refit_next = False

    def work(self, pause: Pause | None = None) -> bool:
        """Do one piece, if there is anything to do; say whether there was.

        Args:
            pause: Called in between, see ``Pace``; what it raises ends the piece.
        """
        if self.keeper.epoch != self._epoch:  # what is served has changed: evidence from before says nothing of it
            self._epoch, self.trial = self.keeper.epoch, None
        if self.keeper.closed_at is None:
            self.trial = None
            return False
        if self._number is not None:  # an alarm has closed it: nobody is to load it any more
            self.versions.withdraw(self._number)
            self._number = None
        if self.trial is not None and self.trial.verdict == "certified":
            self._swap(self.trial)
            return True
        if self.trial is None:
            return self._begin(self.keeper.closed_at, pause)
        return self._examine(self.trial, pause)

    def _begin(self, closed_at: int, pause: Pause | None) -> bool:
        if self._refit_next and self.config.refit:
            config, count = self.config, self.keeper.window.count
            needed = config.fit_rows + config.trial.gap + config.select_rows
            if count - max(closed_at, self.keeper.window.oldest_recent) < needed:
                return False
            self._refit_next = False
            if (found := self._refit(count, pause)) is None:
                return True
            caches, plan = found
        else:
            caches, plan, count = standing(self.home).caches, self.home.plan, self.keeper.window.count
            self._refit_next = True
        self._start(Trial(caches, plan, version=self.versions.next_trial(), after=count - 1, config=self.config.trial))
        return True

    def _start(self, trial: Trial) -> None:
        self.trial, self._cursor = trial, None
        what = "home plan" if trial.plan is self.home.plan else "refitted heads"
        self.keeper.tell("trial", f"{trial.version}: {what}, {len(trial.plan.path) - 1} steps")

    def _refit(self, count: int, pause: Pause | None) -> tuple[tuple[Candidate, ...], Plan] | None:
        """Refit on what has come up to ``count``; None where that comes to nothing."""
        config, window = self.config, self.keeper.window
        later = window.recent(count - config.select_rows, count)
        until = count - config.select_rows - config.trial.gap
        older = window.recent(until - config.fit_rows, until)
        terms = {"epsilon": config.trial.epsilon, "delta": config.trial.delta, "config": config.update, "pause": pause}
        try:
            fitted = refit_caches(self.home, older.images, later.images, config=config.update, pause=pause)
            plan = replan(self.home, fitted, later.images, **terms)
        except InputError as error:  # too few distinct rows
            self.keeper.tell("refit", f"came to nothing: {error}")
            return None
        steps = len(plan.path) - 1
        self.keeper.tell("refit", f"on {len(older.order)} requests: {steps} steps" if steps else "nothing pays")
        return (tuple(fitted), plan) if steps else None

    def _examine(self, trial: Trial, pause: Pause | None) -> bool:
        window = self.keeper.window
        if self._cursor is None:
            self._cursor = window.count
        cursor = max(self._cursor, window.oldest_recent)
        stop = min(window.count, cursor + self.config.piece)
        if stop - cursor < self.config.piece:
            return False
        block = window.kept(cursor, stop)  # some may have been overwritten meanwhile, whatever they were
        self._cursor = stop
        verdict = examine(
            self.home, trial, block.order, block.images, front=block.front, batch=self.config.piece, pause=pause
        )
        if verdict == "empirical":
            self.keeper.tell("empirical", f"trial {trial.version}: nothing certified after {trial.n} requests")
            self.trial = None
        return True

    def _swap(self, trial: Trial) -> None:
        """Save first, serve then: a kill in between leaves a version that is as good."""
        bundle = updated(self.home, trial)
        epoch, number = self._epoch, self.versions.save(bundle)
        self.bundle, self.trial, self._refit_next, self._number = bundle, None, False, number
        text = f"version {number}: step {trial.step} of {len(trial.plan.path) - 1} after {trial.n} requests"
        self.keeper.adopt(Served(trial.caches, standing(bundle).thresholds), text, epoch)
