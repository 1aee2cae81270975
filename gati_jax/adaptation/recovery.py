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
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from gati_jax.bundle.record import Bundle, certified_only, costs_of
from gati_jax.bundle.versions import Versions
from gati_jax.caches import Candidate, choose
from gati_jax.data import fingerprint, row_digests
from gati_jax.errors import InputError
from gati_jax.fitting import REFIT_CONFIG, Candidates, FitConfig, evaluate, refit, replay
from gati_jax.planning import Plan, plan
from gati_jax.runtime import Cascade

from .controller import Served, standing
from .request_log import RequestLog
from .trials import Trial, TrialConfig, Verdict

Images = Shaped[np.ndarray, "n ..."]
Pause = Callable[[], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How heads are refitted and a path is planned.

    Args:
        fit: See ``refit``.
        least: Rows that each of the two blocks needs.
        seconds: For planning's search.
    """

    fit: FitConfig = REFIT_CONFIG
    least: int = 256
    seconds: float = 5.0


UPDATE_CONFIG = UpdateConfig()

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """How closed caches come back."""

    trial: TrialConfig
    refit: bool = True
    """Whether heads are refitted where the home plan fails."""
    update: UpdateConfig = UPDATE_CONFIG
    fit_rows: int = 2000
    """Requests since the alarm that heads are refitted on."""
    select_rows: int = 1000
    """Later ones, behind a gap, on which selectors are fitted and the path is planned."""
    piece: int = 64
    """Requests that are examined at once."""


@runtime_checkable
class ControllerView(Protocol):
    """What the background needs of a ``AdaptationController``: itself, or what holds a lock before it."""

    @property
    def closed_at(self) -> int | None:
        """See ``AdaptationController``."""
        ...

    @property
    def window(self) -> RequestLog:
        """See ``AdaptationController``."""
        ...

    @property
    def epoch(self) -> int:
        """See ``AdaptationController``."""
        ...

    def adopt(self, served: Served, text: str, epoch: int | None = None) -> None:
        """Serve what a trial has certified."""
        ...

    def tell(self, kind: str, text: str) -> None:
        """Hear what the background does."""
        ...


class Recovery:
    """Brings closed caches back; one thread calls it."""

    def __init__(self, bundle: Bundle, keeper: ControllerView, versions: Versions, config: RecoveryConfig) -> None:
        """Wait for something to be closed.

        Args:
            bundle: The home plan's.
            keeper: Whose caches it brings back.
            versions: Counts trials, and keeps what is swapped in.
            config: See ``RecoveryConfig``.

        Raises:
            InputError: The window keeps fewer requests than a refit asks for.
        """
        needed = config.fit_rows + config.trial.gap + config.select_rows
        if config.refit and keeper.window.config.recent < needed:
            got = keeper.window.config.recent
            raise InputError(f"window.recent: expected at least the {needed} requests of a refit, got {got}")
        self.home = self.bundle = certified_only(bundle)
        self.keeper, self.versions, self.config = keeper, versions, config
        self.trial: Trial | None = None
        self._cursor: int | None = None
        self._epoch = keeper.epoch
        self._number: int | None = None  # of the version that was swapped in last
        self._refit_next = False

    def work(self, pause: Pause | None = None) -> bool:
        """Do one piece, if there is anything to do; say whether there was.

        Args:
            pause: Called in between, see ``Throttle``; what it raises ends the piece.
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
        bundle: The one that is served.
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
        if len(rows) < max(config.least, config.fit.batch):
            msg = f"{name}: expected at least {max(config.least, config.fit.batch)} rows, got {len(rows)}"
            raise InputError(f"{msg} that the older block has not" if name == "later" else msg)
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
    front: Int[np.ndarray, " n"] | None = None,
    batch: int = 64,
    pause: Pause | None = None,
) -> Verdict:
    """Let the base and the caches on trial look at further requests, batch by batch, until it is decided.

    Args:
        bundle: Whose base.
        trial: Takes them.
        orders: Order numbers, rising.
        images: The requests, in order: all that came, or those that an independent coin picked.
        front: See ``Trial.add``.
        batch: Images in a step.
        pause: See ``replay``.

    Raises:
        InputError: Images that the chain does not take, or orders that do not rise.
    """
    for start in range(0, len(images), batch):
        if trial.verdict != "open":
            break
        part = images[start : start + batch]
        said = evaluate(bundle.chain, trial.caches, part, batch=batch, pause=pause)
        ahead = None if front is None else front[start : start + batch]
        trial.add(orders[start : start + batch], row_digests(part), said, ahead)
    return trial.verdict


def updated(bundle: Bundle, trial: Trial, *, created: str = "") -> Bundle:
    """Return the bundle with the caches, the plan and the certificate of a trial; its other plans are left out.

    Args:
        bundle: The one that the trial began from.
        trial: Certified.
        created: When, for the provenance.

    Raises:
        InputError: Nothing was certified: the result is empirical, and opens no cache.
    """
    certificate = trial.certificate(bundle.certificate.name)
    if not certificate.certified:
        raise InputError(f"trial: expected a certified one, got {trial.verdict} after {trial.n} requests")
    prints = {"select": fingerprint(trial.plan.rows), "certify": certificate.data_fingerprint}
    provenance = bundle.provenance.model_copy(
        update={
            "created": created or bundle.provenance.created,
            "data_fingerprints": {**bundle.provenance.data_fingerprints, **prints},
        }
    )
    return dataclasses.replace(
        bundle, caches=trial.caches, plan=trial.plan, certificate=certificate, also=(), provenance=provenance
    )


def standing_cascade(bundle: Bundle) -> Cascade:
    """Return the default plan's cascade with closed caches left in: of one structure in every version."""
    thresholds = bundle.plan.thresholds(bundle.certificate.step)
    caches = choose(bundle.caches, bundle.plan.names)
    return Cascade(bundle.chain, caches, jnp.asarray(thresholds, jnp.float32))
