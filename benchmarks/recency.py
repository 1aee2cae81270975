"""Caches that are specialised to the recording as it goes: a class answered lately is likelier to be the next.

To the logits of every head comes ``weight`` times the logarithm of how often each answer was given lately in the same
recording (with a floor, and a share for neighbouring answers: pitches glide). The head answers where its largest
probability then is at or above one threshold; otherwise the next head is asked, and last the base. What was served is
remembered, be it a head's answer or the base's; of the full network nothing more is computed. Each recording begins
with nothing remembered, so recordings are as independent of each other as without it, and one loss of each certifies
the procedure as a whole: see ``certified_step``.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gati_jax import Chain
from gati_jax.caches import Candidate
from gati_jax.certification.betting import mean_p_value
from gati_jax.pytrees import call

_FLOOR = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recency:
    """How answers are remembered."""

    weight: float
    """Of the logarithm; 0 forgets all."""
    keep: float = 0.8
    """Of what is remembered, from frame to frame."""
    beside: float = 0.15
    """Of an answer, that each of its two neighbours gets; the last answer, unvoiced, has none."""

    def prior(self, memory: Float[np.ndarray, "*streams answers"]) -> Float[np.ndarray, "*streams answers"]:
        """Return what is added to the logits."""
        return np.float32(self.weight) * np.log(_FLOOR + memory)

    def remember(
        self, memory: Float[np.ndarray, "streams answers"], answers: Int[np.ndarray, " streams"]
    ) -> Float[np.ndarray, "streams answers"]:
        """Return the memory after one more answer in each stream."""
        memory, streams, last = memory * np.float32(self.keep), np.arange(len(answers)), memory.shape[1] - 1
        new = np.float32(1 - self.keep)
        memory[streams, answers] += new
        voiced = answers < last
        for neighbour in (answers - 1, answers + 1):
            inside = voiced & (neighbour >= 0) & (neighbour < last)
            memory[streams[inside], neighbour[inside]] += new * np.float32(self.beside)
        return memory


class Simulated(NamedTuple):
    """What each threshold answers."""

    exits: Int[np.ndarray, "thresholds n"]
    """Number of the head; the number of heads where the base answers."""
    answers: Int[np.ndarray, "thresholds n"]


def simulate(
    logits: Float[np.ndarray, "heads n answers"],
    base: Int[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    thresholds: Float[np.ndarray, " thresholds"],
    recency: Recency,
) -> Simulated:
    """Replay recordings, all of them and all thresholds side by side.

    Args:
        logits: Of the heads, in the order in which they are asked.
        base: The full network's answers.
        groups: The recording of each frame, whose frames are in order.
        thresholds: Of probability.
        recency: How answers are remembered.
    """
    n, levels, heads = len(base), len(thresholds), len(logits)
    exits, answers = np.zeros((levels, n), np.int32), np.zeros((levels, n), np.int32)
    frames_of = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    frames_of.sort(key=len, reverse=True)
    memory = np.zeros((len(frames_of), levels, logits.shape[2]), np.float32)
    for t in range(len(frames_of[0])):
        rows = np.array([frames[t] for frames in frames_of if len(frames) > t])
        prior = recency.prior(memory[: len(rows)])
        exit_ = np.full((len(rows), levels), heads, np.int32)
        answer = np.repeat(base[rows, None], levels, axis=1).astype(np.int32)
        for head in reversed(range(heads)):
            shifted = logits[head][rows][:, None] + prior
            best = shifted.max(-1)
            sure = 1 / np.exp(shifted - best[..., None]).sum(-1)
            hits = sure >= thresholds[None]
            exit_ = np.where(hits, head, exit_)
            answer = np.where(hits, shifted.argmax(-1), answer)
        exits[:, rows], answers[:, rows] = exit_.T, answer.T
        flat = recency.remember(memory[: len(rows)].reshape(-1, memory.shape[2]), answer.ravel())
        memory[: len(rows)] = flat.reshape(len(rows), levels, -1)
    return Simulated(exits, answers)


def group_losses(
    answers: Int[np.ndarray, "thresholds n"], base: Int[np.ndarray, " n"], groups: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "thresholds groups"]:
    """Return the share of each recording's frames that are answered otherwise than by the base."""
    _, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    return np.stack([np.bincount(index, wrong, len(sizes)) / sizes for wrong in answers != base])


def certified_step(
    losses: Float[np.ndarray, "steps groups"], expected: Float[np.ndarray, " steps"], epsilon: float, delta: float
) -> int | None:
    """Return the last step of a path, strict to loose, that is certified by recording; None if not even the first is.

    The same test as ``gati_jax.certify(groups=)`` makes of caches with thresholds: in the mean over recordings at most
    epsilon of a recording's frames are answered otherwise, with confidence 1 - delta.

    Args:
        losses: Of the certify recordings, which chose nothing.
        expected: The mean loss of each step on other recordings.
        epsilon: What is certified.
        delta: The risk.
    """
    passed = [mean_p_value(row, epsilon, float(e)) <= delta for row, e in zip(losses, expected, strict=True)]
    steps = passed.index(False) if False in passed else len(passed)
    return steps - 1 if steps else None


# --- Served -----------------------------------------------------------------------------------------------------------


class Server:
    """Answers one frame after another, stage by stage, each a compiled program of its own."""

    def __init__(self, chain: Chain, caches: Sequence[Candidate], threshold: float, recency: Recency) -> None:
        """Compile nothing yet; the caches are in the order of their sites."""
        self._chain, self._caches, self._recency = chain, tuple(caches), recency
        self._threshold = threshold
        self.reset()

    def reset(self) -> None:
        """Begin another recording."""
        self._memory = np.zeros((1, self._chain.classes), np.float32)

    def compile(self, frame: Float[np.ndarray, " samples"]) -> None:
        """Run every stage once."""
        Server(self._chain, self._caches, np.inf, self._recency).answer(frame)

    def answer(self, frame: Float[np.ndarray, " samples"]) -> tuple[int, int]:
        """Return answer and exit of one frame, and remember the answer."""
        x, site, prior = jnp.asarray(frame[None]), 0, jnp.asarray(self._recency.prior(self._memory))
        found, exit_ = None, 0
        for cache in self._caches:
            x, answer, sure = _stage(self._chain, cache, x, prior, start=site)
            site = cache.site
            if float(sure) >= self._threshold:
                found = int(answer)
                break
            exit_ += 1
        found = int(_rest(self._chain, x, start=site)) if found is None else found
        self._memory = self._recency.remember(self._memory, np.array([found]))
        return found, exit_


@functools.partial(jax.jit, static_argnames="start")
def _stage(chain: Chain, cache: Candidate, x: Array, prior: Array, *, start: int) -> tuple[Array, Array, Array]:
    """Run the base to a cache's site and its head."""
    x = chain.span(x, start, cache.site)
    shifted = call(cache.predictor, cache.params["predictor"], x) + prior
    return x, jnp.argmax(shifted, -1)[0], jnp.max(jax.nn.softmax(shifted, -1), -1)[0]


@functools.partial(jax.jit, static_argnames="start")
def _rest(chain: Chain, x: Array, *, start: int) -> Array:
    return jnp.argmax(chain.classify(chain.span(x, start, len(chain))), -1)[0]


class Timed(NamedTuple):
    """Means over frames, in milliseconds, of two ways to answer the same frames by turns."""

    adaptive_ms: float
    full_ms: float
    ratios: tuple[float, float]
    """The least and the largest of the ratios in ten parts of the frames."""


def time_beside(
    server: Server, chain: Chain, frames: Float[np.ndarray, "n samples"], groups: Int[np.ndarray, " n"]
) -> Timed:
    """Time a server beside the full network, frame by frame, on the same frames."""
    ms = np.zeros((2, len(frames)))
    server.compile(frames[0])
    for i in (0, *range(len(frames))):
        if i == 0 or groups[i] != groups[i - 1]:
            server.reset()
        began = time.perf_counter()
        server.answer(frames[i])
        between = time.perf_counter()
        int(_rest(chain, jnp.asarray(frames[i][None]), start=0))
        ms[:, i] = 1e3 * (between - began), 1e3 * (time.perf_counter() - between)
    parts = [part.mean(1) for part in np.array_split(ms, 10, axis=1) if part.shape[1]]
    ratios = [float(full / own) for own, full in parts]
    return Timed(float(ms[0].mean()), float(ms[1].mean()), (min(ratios), max(ratios)))
