"""A plan on trial: later traffic, request by request, says how far along its path it may go.

Caches that are refitted, or that an alarm has closed, open again only by a trial. It takes every request of the traffic
behind those that they were fitted and planned on (and behind a gap, for neighbours in time are alike), or those that a
coin picked which knows nothing of them; never just the misses, which are other requests than the hits.

Every step of the path is tested on the same requests, strict to loose, at the trial's own part of delta: a mistake is
certifying a step that is not good enough, and the first of these must be certified for one to happen. The test holds at
any time: it may stop as soon as enough is certified, or go on, and needs no number of requests fixed before.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, UInt64

from gati_jax._errors import InputError
from gati_jax.caches import Candidate
from gati_jax.data import fingerprint
from gati_jax.planning import SEQUENTIAL, Certificate, Plan, ReplayTable, replay_plan, trial_level
from gati_jax.runtime import Said

from .sequential import SequentialCertifier

_HOPELESS = 0.01  # of the capital that a trial begins with
Verdict = Literal["open", "certified", "empirical"]
"""Still under way; some step is certified; the requests are used up and none is, which opens no cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """What a trial is to show.

    Args:
        epsilon: The disagreement to certify.
        delta: The risk that any of all trials, however many, certifies wrongly.
        most: Requests after which it ends with what is certified.
        enough: Share of the saving at the path's end with which it ends sooner.
        gap: Requests to leave out behind those that the plan was made on.
    """

    epsilon: float
    delta: float = 0.05
    most: int = 20_000
    enough: float = 0.95
    gap: int = 100

    def __post_init__(self) -> None:
        """Refuse what could not be shown.

        Raises:
            InputError: Names the field.
        """
        for name in ("epsilon", "delta"):
            if not 0 < getattr(self, name) < 1:
                msg = f"{name}: expected a number between 0 and 1, got {getattr(self, name)}"
                raise InputError(msg)
        if not (self.most >= 1 and self.gap >= 0 and 0 < self.enough <= 1):
            got = f"{self.most}, {self.gap} and {self.enough}"
            msg = f"most, gap, enough: expected 1 or more, 0 or more, and a share above 0, got {got}"
            raise InputError(msg)


class Trial:
    """One plan's trial."""

    def __init__(
        self,
        caches: tuple[Candidate, ...],
        plan: Plan,
        *,
        version: int,
        after: int,
        config: TrialConfig,
    ) -> None:
        """Begin.

        Args:
            caches: The plan's.
            plan: Its path was fixed before the first request of the trial.
            version: Number of this trial among all, from 1 on; see ``Versions.next_trial``.
            after: Order number of the newest request that caches or plan have learned from.
            config: See ``TrialConfig``.

        Raises:
            InputError: The caches are not the plan's, or its path has the base alone.
        """
        if [(c.name, c.site) for c in caches] != list(zip(plan.names, plan.sites, strict=True)):
            msg = f"caches: expected the plan's, {', '.join(plan.names)}, got {', '.join(c.name for c in caches)}"
            raise InputError(msg)
        self.caches, self.plan, self.version, self.config = caches, plan, version, config
        self.n = 0
        """Requests taken."""
        self.step = 0
        """The farthest certified step; 0 is the base."""
        self._last = after + config.gap  # of the orders; what is not behind it is left out
        level = trial_level(config.delta, version)
        steps = len(plan.path) - 1  # all but the first, which is the base
        self._certifier = SequentialCertifier(steps, config.epsilon, level, maximum=config.most)
        self._disagreements = np.zeros(len(plan.path), int)
        self._at_step = (0, 0)  # n and disagreements when it was certified
        self._rows: list[int] = []
        self._enough = _first_step_with(plan, config.enough)

    @property
    def verdict(self) -> Verdict:
        """How it stands."""
        if self.step < self._enough and self.n < self.config.most and not self._hopeless:
            return "open"
        return "certified" if self.step else "empirical"

    def add(
        self,
        orders: Int[np.ndarray, " n"],
        rows: UInt64[np.ndarray, " n"],
        said: Said,
        front: Int[np.ndarray, " n"] | None = None,
    ) -> Verdict:
        """Take requests, until it is decided; those that came before the gap's end are left out.

        Args:
            orders: Order numbers, rising from call to call.
            rows: Digests of the images.
            said: What the base and the caches, in the plan's order, say.
            front: What was answered in front of the network, whatever the caches say; negative where nothing was.

        Raises:
            InputError: Orders that do not rise.
        """
        if len(orders) and (np.any(np.diff(orders) <= 0) or (self.n and orders[0] <= self._last)):
            msg = f"orders: expected rising numbers behind {self._last}, got {orders[0]} to {orders[-1]}"
            raise InputError(msg)
        disagrees = self._disagrees(rows, said)
        if front is not None:
            disagrees = np.where(front[:, None] >= 0, (front != said.answers)[:, None], disagrees)
        for order, row, losses in zip(orders.tolist(), rows.tolist(), disagrees, strict=True):
            if order > self._last and self.verdict == "open":
                self._take(order, row, losses)
        return self.verdict

    @property
    def _hopeless(self) -> bool:
        """Whether the strictest step has lost nearly all: a trial may end at any time, and this one had better."""
        return not self.step and bool(self._certifier.log_capital()[0] < math.log(_HOPELESS))

    def certificate(self, name: str = "default") -> Certificate:
        """Return what is known: nothing is certified where no step is, however the requests went."""
        n, wrong = self._at_step if self.step else (self.n, 0)
        return Certificate(
            name=name,
            epsilon=self.config.epsilon,
            delta=self.config.delta,
            step=self.step or -1,
            n=n,
            disagreements=wrong,
            p_value=trial_level(self.config.delta, self.version) if self.step else 1.0,
            method=SEQUENTIAL,
            version=self.version,
            plan_hash=self.plan.hash,
            data_fingerprint=fingerprint(np.array(self._rows[:n], np.uint64)),
            select_fingerprint=fingerprint(self.plan.rows),
            repeated=n - len(set(self._rows[:n])),
            stays_off=self._stays_off(),
        )

    def _take(self, order: int, row: int, losses: Bool[np.ndarray, " steps"]) -> None:
        self._last = order
        self.n += 1
        self._rows.append(row)
        self._disagreements += losses
        self._certifier.add(losses[1:])
        if (step := self._certifier.certified + 1) > self.step:
            self.step, self._at_step = step, (self.n, int(self._disagreements[step]))

    def _disagrees(self, rows: UInt64[np.ndarray, " n"], said: Said) -> Bool[np.ndarray, "n steps"]:
        plan = self.plan
        table = ReplayTable(
            names=plan.names, sites=plan.sites, depth=plan.depth, answers=said.answers, classes=said.classes,
            scores=said.scores, rows=rows,
        )  # fmt: skip
        return np.stack([replay_plan(table, thresholds).disagrees for thresholds in plan.path], axis=1)

    def _stays_off(self) -> tuple[str, ...]:
        closed = np.isinf(self.plan.thresholds(self.step))
        end = f"after {self.n} requests of trial {self.version}"
        return tuple(
            f"{name}: off at the certified step {self.step} of {len(self.plan.path) - 1}, {end}"
            for name, is_off in zip(self.plan.names, closed, strict=True)
            if is_off
        )


def _first_step_with(plan: Plan, share: float) -> int:
    """Return the first step that saves this share of what the last one does."""
    saved = plan.mean_ms[0] - plan.mean_ms
    return max(1, int(np.argmax(saved >= share * saved[-1] - 1e-12)))
