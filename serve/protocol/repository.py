"""The models of a server by name, and how they come and go: Triton's model repository extension.

Names and folders are the command line's. A request may ask for one of them to be loaded, anew or again, or unloaded;
it never names a folder. A model is replaced once the new one is ready: requests that the old one has admitted are
finished by it. Everything here runs in the event loop's thread, and what takes long in another one.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from gati_jax import InputError

from ..threads import in_thread
from .backend import Backend
from .messages import ForbiddenError, LoadError, ModelIndex, NotReadyError, UnauthorizedError, UnknownModelError
from .model import Model, Tally

READY, LOADING, UNAVAILABLE = "READY", "LOADING", "UNAVAILABLE"
_WARMING_UP = "the server is warming up"
_MOST_REASON = 500  # characters
_log = logging.getLogger("serve")


class Loaded(NamedTuple):
    """A bundle that has been read."""

    model: Model
    start: Callable[[], Backend]
    """Compiles, warms up and starts the engine; takes minutes."""


class Source(NamedTuple):
    """Where a model comes from."""

    load: Callable[[], Loaded]
    """Reads the bundle; raises InputError if it is none."""
    version: Callable[[], str]
    """Returns the version that ``load`` would read now; raises OSError."""
    is_exclusive: bool = False
    """Whether it must be unloaded before it can be loaded again: its folder of adaptation has one user."""


@dataclasses.dataclass(eq=False)
class Entry:
    """A model of the command line, and what answers for it or why nothing does."""

    name: str
    source: Source
    tally: Tally
    loaded: Loaded | None = None
    backend: Backend | None = None
    state: str = LOADING
    reason: str = ""
    tried: bool = False
    """Whether it has been loaded, or could not be."""

    @property
    def model(self) -> Model:
        """What is known of the model.

        Raises:
            NotReadyError: It is not loaded.
        """
        if self.loaded is None:
            raise self.unavailable
        return self.loaded.model

    @property
    def unavailable(self) -> NotReadyError:
        """Why there is no answer."""
        if self.state == LOADING:
            return NotReadyError(_WARMING_UP)
        return NotReadyError(f"model: {self.name!r} is not loaded; the repository's index says why")

    @property
    def running(self) -> bool:
        """Whether it answers."""
        return self.backend is not None and self.backend.engine.running

    def start(self) -> tuple[Loaded, Backend]:
        """Read the bundle, unless that is done and it never ran, and start its engine. In any thread.

        Raises:
            InputError: There is no valid bundle.
        """
        loaded = self.loaded if self.loaded is not None and self.backend is None else self.source.load()
        return loaded, loaded.start()

    def serve(self, loaded: Loaded, backend: Backend) -> list[Backend]:
        """Answer by this backend from now on; returns the one before it, which finishes what it has."""
        before = self.take()
        self.loaded, self.backend, self.state, self.reason, self.tried = loaded, backend, READY, "", True
        return before

    def take(self) -> list[Backend]:
        """Answer no more; returns what answered, in a list that can be emptied when it is to be forgotten."""
        before = [] if self.backend is None else [self.backend]
        self.loaded = self.backend = None
        return before


class Repository:
    """The models of a server.

    Args:
        entries: By the names that clients know.
        settle: Called, in a thread, when a model has come or gone.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        *,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare; ``begin`` loads."""
        self.entries = {entry.name: entry for entry in entries}
        self._settle, self._one = settle, asyncio.Lock()
        self._background: set[asyncio.Future[None]] = set()

    @property
    def busy(self) -> bool:
        """Whether a thread compiles: the end of the interpreter would wait for it."""
        return self._one.locked() or bool(self._background)

    def find(self, name: str, version: str = "") -> Entry:
        """Return the model that a request names.

        Raises:
            UnknownModelError: There is no such model or version.
        """
        entry = self.entries.get(name)
        if entry is None:
            names = [*self.entries]
            expected = repr(names[0]) if len(names) == 1 else f"one of {', '.join(map(repr, names))}"
            raise UnknownModelError(f"model: expected {expected}, got {name[:100]!r}")
        if entry.loaded is not None:
            entry.loaded.model.check(name, version)
        return entry

    def index(self, *, ready: bool = False) -> list[ModelIndex]:
        """Describe all models, or those that answer."""
        return [
            ModelIndex(
                name=entry.name,
                version="" if entry.loaded is None else entry.loaded.model.version,
                state=entry.state,
                reason=entry.reason,
            )
            for entry in self.entries.values()
            if entry.state == READY or not ready
        ]

    async def begin(self) -> None:
        """Load all models, one after another, and then compile what they can go without at first.

        Raises:
            Exception: Why the only model cannot be loaded; one of several does not stop the others.
        """
        async with self._one:
            for entry in self.entries.values():
                if len(self.entries) == 1:
                    entry.serve(*await in_thread(entry.start, "warm-up"))
                else:
                    with contextlib.suppress(LoadError):  # it is logged
                        await self._load(entry)
        for entry in self.entries.values():
            if entry.backend is not None:
                self._grow(entry.backend)

    async def load(self, name: str) -> None:
        """Load a model, or replace it by what its folder has now; returns once that answers.

        Raises:
            LoadError: It cannot be loaded; what answered before goes on.
            UnknownModelError: The command line has no such name.
        """
        entry = self.find(name)
        async with self._one:
            if entry.backend is not None and entry.source.is_exclusive:
                raise LoadError(f"model: {name!r} adapts, and is to be unloaded before it is loaded again")
            await self._load(entry)
            if entry.backend is not None:
                self._grow(entry.backend)

    async def unload(self, name: str) -> None:
        """Take a model away; returns once the requests that it has admitted are finished.

        Raises:
            UnknownModelError: The command line has no such name.
        """
        entry = self.find(name)
        async with self._one:
            before = entry.take()
            entry.state, entry.reason = UNAVAILABLE, "unloaded"
            _log.info("unloaded", extra={"model": name})
            await self._retire(before)

    async def refresh(self) -> None:
        """Load those anew whose folder has changed, and those that could not be loaded."""
        for entry in self.entries.values():
            try:
                if self._is_stale(entry):
                    await self.load(entry.name)
            except LoadError as error:
                _log.warning("not loaded: %s", error, extra={"model": entry.name})

    def _is_stale(self, entry: Entry) -> bool:
        if entry.loaded is None:
            return entry.state == UNAVAILABLE and entry.reason != "unloaded"
        try:
            return entry.source.version() != entry.loaded.model.version
        except OSError:
            return True  # loading says why

    async def _load(self, entry: Entry) -> None:
        """Load a model; the lock is held."""
        entry.state = LOADING if entry.backend is None else entry.state
        try:
            loaded, backend = await in_thread(entry.start, "warm-up")
        except Exception as error:
            self._report(entry, error)
            raise LoadError(f"model: {entry.name!r} cannot be loaded: {entry.reason}") from error
        before = entry.serve(loaded, backend)
        _log.info("loaded", extra={"model": entry.name, "version": loaded.model.version})
        if before:
            self._background.add(task := asyncio.ensure_future(self._retire(before)))
            task.add_done_callback(self._background.discard)

    def _report(self, entry: Entry, error: Exception) -> None:
        """Keep and log why a model was not loaded; what answered before goes on."""
        known = isinstance(error, InputError | OSError)
        entry.reason = (str(error) if known else f"{type(error).__name__}; the log says more")[:_MOST_REASON]
        entry.state, entry.tried = READY if entry.backend is not None else UNAVAILABLE, True
        _log.error(
            "a model was not loaded: %s", entry.reason, extra={"model": entry.name}, exc_info=None if known else error
        )

    async def _retire(self, before: list[Backend]) -> None:
        """Let a backend that gets no more requests finish what it has, and free its memory."""
        if before:
            await in_thread(before[0].engine.stop, "stop")
            before.clear()
            await in_thread(self._settle, "settle")

    def _grow(self, backend: Backend) -> None:
        """Compile what a backend can go without at first, while it answers."""

        def over(grown: asyncio.Future[None]) -> None:
            self._background.discard(grown)
            if not grown.cancelled() and (error := grown.exception()) is not None:
                _log.error("larger batches could not be compiled", exc_info=error)

        self._background.add(growing := in_thread(backend.grow, "warm-up"))
        growing.add_done_callback(over)

    def stop(self, timeout: float) -> Sequence[asyncio.Future[bool]]:
        """Finish what was admitted; each is done with whether that was in time."""
        backends = [entry.backend for entry in self.entries.values() if entry.backend is not None]
        return [in_thread(lambda one=one: one.engine.stop(timeout), "stop") for one in backends]


def check_operator(token: str | None, authorization: str | None) -> None:
    """Check that a client may load and unload models.

    Raises:
        ForbiddenError: The server has no token for that, so no client may.
        UnauthorizedError: It has not shown the token for that.
    """
    if token is None:
        raise ForbiddenError("repository: expected a server that has GATI_REPOSITORY_TOKEN in its environment")
    scheme, _, shown = (authorization or "").partition(" ")
    if not (hmac.compare_digest(shown.encode(), token.encode()) and scheme.lower() == "bearer"):
        raise UnauthorizedError("authorization: expected 'Bearer' and the repository's token")
