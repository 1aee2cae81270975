"""Looks: which certify rows were opened, for which plans, and whether they may be opened again.

Each test on the same rows spends some of delta, and a plan that was chosen by what an earlier test showed spends all of
it: no count of looks can pay for that. Hence two rules. Look j at any of the same rows is tested at
6 delta / (pi^2 j^2), and these parts add up to delta. And a look tells nothing but "failed" until its rows are closed,
by a plan that passed or on request (``reveal``). Before look j there is then only one history, "all failed", so that
the j-th plan is as good as fixed in advance, and a union bound over the looks holds however plans are chosen.
"""

import contextlib
import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from jaxtyping import UInt64
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gati_jax.data import fingerprint
from gati_jax.errors import InputError
from gati_jax.files import write_atomically
from gati_jax.planning.threshold_path import Plan

from .certificate import MARGINAL, Method

try:
    import fcntl
except ImportError:  # Windows: two processes that certify at the same moment may miss each other's look
    fcntl = None

Digest = Annotated[str, Field(pattern=r"^\w{0,64}$")]  # it is shown, and comes from files of others
Closed = Literal["", "passed", "revealed", "composed"]


class Look(BaseModel):
    """A plan that was tested on certify rows, alone or with others in one look."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan_hash: Digest
    data_fingerprint: Digest
    epsilon: float
    delta: float
    together: Digest = ""
    """The same for all plans that were certified together; empty for a plan alone."""
    method: Method = MARGINAL
    groups: Digest = ""
    """What else was tested: which rows as one group and what made it a bad one, or in which further arithmetics."""
    number: Annotated[int, Field(ge=1, lt=2**53)] = 1
    """j: the look was tested at 6 delta / (pi^2 j^2)."""
    closed: Closed = "revealed"
    """How the rows were closed by this look, if they were. Files of older versions had told all counts."""

    @property
    def key(self) -> tuple[object, ...]:
        """What makes it the same look if it is repeated."""
        return self.plan_hash, self.data_fingerprint, self.epsilon, self.delta, self.together, self.method, self.groups


class Looks(BaseModel):
    """A file of looks, ``looks.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    looks: tuple[Look, ...]
    rows: dict[str, Annotated[str, Field(pattern=r"^([0-9a-f]{16})*$")]]
    """By fingerprint: the digests of the rows."""

    @model_validator(mode="after")
    def _rows_are_known(self) -> "Looks":
        if missing := {look.data_fingerprint for look in self.looks} - self.rows.keys():
            raise ValueError(f"rows: {', '.join(missing)} is missing")
        return self

    def digests(self, data_fingerprint: str) -> UInt64[np.ndarray, " n"]:
        """Return the digests of the rows of a fingerprint; none of one that is not known."""
        return np.frombuffer(bytes.fromhex(self.rows.get(data_fingerprint, "")), "<u8")

    def at(self, rows: UInt64[np.ndarray, " n"]) -> "Looks":
        """Return the looks that opened any of the rows of these digests."""
        shared = {name: text for name, text in self.rows.items() if np.isin(self.digests(name), rows).any()}
        return Looks(looks=tuple(look for look in self.looks if look.data_fingerprint in shared), rows=shared)

    def merged(self, other: "Looks") -> "Looks":
        """Return the looks of both; of the same look, what is stricter."""
        looks = {look.key: look for look in self.looks}
        for look in other.looks:
            if (mine := looks.get(look.key)) is not None:
                stricter = {"closed": mine.closed or look.closed, "number": max(mine.number, look.number)}
                looks[look.key] = mine.model_copy(update=stricter)
            else:
                looks[look.key] = look
        return Looks(looks=tuple(looks.values()), rows={**self.rows, **other.rows})


_HOW_CLOSED: dict[Closed, str] = {
    "passed": "a plan was certified on them",
    "revealed": "what a look at them showed was told",
    "composed": "a plan that was certified elsewhere was composed on them",
}
NO_LOOKS = Looks(looks=(), rows={})


class Ledger:
    """Remembers looks, in a file that several runs and processes share, or in memory alone."""

    def __init__(self, path: Path | str | None = None) -> None:
        """Use the file at ``path``, which need not exist yet; None keeps the looks in memory."""
        self.path = None if path is None else Path(path)
        self._memory = NO_LOOKS

    def read(self) -> Looks:
        """Return all looks.

        Raises:
            InputError: The file is damaged, or cannot be read.
        """
        try:
            content = b"" if self.path is None else self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            content = b""
        except OSError as error:
            raise self._no_file(error) from error
        try:
            return Looks.model_validate_json(content).merged(self._memory) if content else self._memory
        except ValidationError as error:
            got = f"got {self.path}: how often the certify data was opened is lost with it"
            raise InputError(f"looks: expected a whole looks.json, {got}") from error

    def merge(self, looks: Looks) -> None:
        """Take note of looks elsewhere, such as those of a bundle; the next look writes them into the file."""
        self._memory = self._memory.merged(looks)

    def of(self, data_fingerprint: str) -> Looks:
        """Return the looks at the rows of a fingerprint or any part of them, and what their plans were composed on."""
        known = self.read()
        found = known.at(known.digests(data_fingerprint))
        plans = {look.plan_hash for look in found.looks}
        composed = tuple(look for look in known.looks if look.closed == "composed" and look.plan_hash in plans)
        rows = {look.data_fingerprint: known.rows[look.data_fingerprint] for look in composed}
        return found.merged(Looks(looks=composed, rows=rows))

    def closed(self, rows: UInt64[np.ndarray, " n"]) -> str:
        """Return why these rows must not be opened again; empty if they may be.

        Args:
            rows: Digests of certify rows.
        """
        known = self.read().at(rows)
        look = next((look for look in known.looks if look.closed), None)
        if look is None:
            return ""
        shared = int(np.isin(rows, known.digests(look.data_fingerprint)).sum())
        how = _HOW_CLOSED[look.closed]
        return (
            f"{shared} of {len(rows)} are closed since {how} (plan {look.plan_hash[:12]}, in {self.path or 'memory'})"
        )

    def still_open(self, rows: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " open"]:
        """Return those of these rows that no look has closed."""
        known = self.read().at(rows)
        for name in {look.data_fingerprint for look in known.looks if look.closed}:
            rows = rows[~np.isin(rows, known.digests(name))]
        return rows

    def reveal(self, rows: UInt64[np.ndarray, " n"], plans: Mapping[str, tuple[Plan, float]], delta: float) -> None:
        """Close rows that show how often plans disagree on them, as an evaluation does, for every other plan.

        Args:
            rows: Digests; those that are closed stay as they are.
            plans: What is evaluated, by name, each with its epsilon.
            delta: Of a later look for the same plans.
        """
        if len(fresh := self.still_open(rows)):
            self.close(self.open(fresh, plans, delta, MARGINAL), "revealed")

    def open(
        self, rows: UInt64[np.ndarray, " n"], plans: Mapping[str, tuple[Plan, float]], delta: float, method: Method,
        groups: str = "",
    ) -> tuple[Look, ...]:  # fmt: skip
        """Record, before it happens, that these rows are opened to certify these plans.

        The same look again tells nothing new, so it keeps its number, and is allowed on closed rows.

        Args:
            rows: Digests of the certify rows.
            plans: To be certified together, by name, each with its epsilon.
            delta: The risk of error of all together.
            method: Of the test.
            groups: See ``Look.groups``.

        Returns:
            The look, an entry a plan; all have the same number.

        Raises:
            InputError: The rows are closed, or the file is damaged.
        """
        tested = sorted((plan.hash, epsilon) for plan, epsilon in plans.values())
        together = hashlib.sha256(repr((tested, delta)).encode()).hexdigest()[:32] if len(tested) > 1 else ""
        name = fingerprint(rows)
        with self._locked():
            known = self.read()
            before = known.at(rows).looks
            others = {(look.data_fingerprint, look.together or look.key) for look in before}
            number = 1 + max(len(others), *(look.number for look in before)) if before else 1
            looks = tuple(
                Look(
                    plan_hash=plan, data_fingerprint=name, epsilon=epsilon, delta=delta, together=together,
                    method=method, groups=groups, number=number, closed="",
                )
                for plan, epsilon in tested
            )  # fmt: skip
            repeated = {look.key: look for look in before}
            if all(look.key in repeated for look in looks):
                return tuple(repeated[look.key] for look in looks)
            if why := self.closed(rows):
                raise InputError(
                    f"ledger: expected certify rows that are open, but {why}; certify on fresh rows alone, or, for a"
                    " study that owes nothing to that look, with a ledger of its own"
                )
            # What a plan was composed on has shown how every candidate does there: it can certify no later plan.
            shown = {fingerprint(plan.rows): plan for plan, _ in plans.values()}
            composed = tuple(
                Look(plan_hash=plan.hash, data_fingerprint=on, epsilon=tested[0][1], delta=delta, closed="composed")
                for on, plan in shown.items()
            )
            opened = {name: rows, **{on: plan.rows for on, plan in shown.items()}}
            digests = {on: digest.astype("<u8").tobytes().hex() for on, digest in opened.items()}
            self._write(known.merged(Looks(looks=looks + composed, rows=digests)))
        return looks

    def close(self, looks: tuple[Look, ...], how: Closed) -> None:
        """Close the rows of a look for every other look.

        Args:
            looks: What ``open`` returned.
            how: Why.
        """
        with self._locked():
            known = self.read()
            closed = tuple(look.model_copy(update={"closed": look.closed or how}) for look in looks)
            self._write(known.merged(Looks(looks=closed, rows=known.rows)))

    def _no_file(self, error: OSError) -> InputError:
        return InputError(f"ledger: expected a file that can be read and written, got {self.path} ({error.strerror})")

    def _write(self, looks: Looks) -> None:
        self._memory = looks
        if self.path is None:
            return
        try:
            write_atomically(self.path, looks.model_dump_json(indent=1).encode() + b"\n")
        except OSError as error:
            if self.path != user_path():
                raise self._no_file(error) from error
            warnings.warn(f"looks: cannot write {self.path} ({error}): only this process counts them", stacklevel=2)

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        """Keep other processes from writing between a read and a write."""
        with contextlib.ExitStack() as stack:
            if self.path is not None and fcntl is not None:
                with contextlib.suppress(OSError):  # a folder that cannot be written to is reported by the write
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    lock = stack.enter_context(self.path.with_name(f".{self.path.name}.lock").open("w"))
                    fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file
            yield


AnyLedger = Ledger | Path | str | None


def find_ledger(ledger: AnyLedger) -> Ledger | None:
    """Return a ledger, that of a file, or this user's (``"user"``): one object a file throughout a process."""
    if isinstance(ledger, (str, Path)):
        return _ledger_at(user_path() if ledger == "user" else Path(ledger))
    return ledger


def user_path() -> Path:
    """Return where this user's looks are kept: $GATI_JAX_LEDGER, or a file in the user's state folder."""
    if path := os.environ.get("GATI_JAX_LEDGER"):
        return Path(path)
    try:
        home = Path.home()
    except RuntimeError:  # a container's user may have none
        home = Path(tempfile.gettempdir())
    return Path(os.environ.get("XDG_STATE_HOME") or home / ".local" / "state") / "gati-jax" / "looks.json"


@functools.cache
def _ledger_at(path: Path) -> Ledger:
    return Ledger(path)


MOST_DUPLICATES = 0.01  # of the rows, unless they are known to be separate requests


def count_duplicates(rows: UInt64[np.ndarray, " n"], *, drawn: bool) -> int:
    """Return how many rows equal one before them.

    Args:
        rows: Digests.
        drawn: Whether it is known that each was drawn by itself.

    Raises:
        InputError: More than 1 % do, and they may be copies.
    """
    again = len(rows) - len(np.unique(rows))
    if again and not drawn:
        if again > MOST_DUPLICATES * len(rows):
            raise InputError(
                f"table: expected distinct rows, got {again} of {len(rows)} that repeat another; leave copies out, or"
                " set duplicates if all were drawn one by one from traffic that repeats itself"
            )
        warnings.warn(f"{again} of {len(rows)} certify rows repeat another, and were counted as requests", stacklevel=4)
    return again
