"""Run an exported cascade, with JAX and NumPy alone: python cascade.py images.npy [plan]."""

import json
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np


class Prediction(NamedTuple):
    """The answers to a batch, as the library gives them."""

    class_index: np.ndarray  # int32[batch]
    exit: np.ndarray  # int32[batch]: the site of the cache that answered, or the number of blocks
    score: np.ndarray  # float32[batch]: infinity from the network itself
    logits: np.ndarray  # float32[batch, classes]


class Cascade:
    """The programs of an exported folder under one of its plans; each is compiled when it is first used."""

    def __init__(self, folder: Path | str = Path(__file__).parent, plan: str | None = None) -> None:
        """Open the folder; ``plan`` is one of ``manifest["plans"]``, by default the first."""
        folder = Path(folder)
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        plans = self.manifest["plans"]
        if (plan := next(iter(plans)) if plan is None else plan) not in plans:
            raise ValueError(f"plan: expected one of {', '.join(plans)}, got {plan!r}")
        self.promise: str = plans[plan]["promise"]
        self.thresholds = np.array([np.inf if t is None else t for t in plans[plan]["thresholds"]], np.float32)
        if (written := self.manifest["jax"]) != jax.__version__:
            warnings.warn(f"written by jax {written}, not by this one: {self.promise}", stacklevel=2)
        if (platform := self.manifest["platform"]) != jax.default_backend():
            raise ValueError(f"folder: expected programs for {jax.default_backend()}, got some for {platform}")
        data, at, arrays = np.fromfile(folder / "arrays.bin", np.uint8), 0, []
        for array in self.manifest["arrays"]:
            dtype = jax.numpy.dtype(array["dtype"])
            size = int(np.prod(array["shape"], dtype=np.int64)) * dtype.itemsize
            arrays.append(jax.device_put(data[at : at + size].view(dtype).reshape(array["shape"])))
            at += size
        self.programs = {}
        for program in sorted(self.manifest["programs"], key=lambda program: program["rows"]):
            if program["plan"] == plan:
                loaded = jax.export.deserialize(bytearray((folder / program["file"]).read_bytes()))
                self.programs[program["rows"]] = (jax.jit(loaded.call), [arrays[i] for i in program["arrays"]])

    def predict(self, images: np.ndarray) -> Prediction:
        """Answer images[batch, ...] of the manifest's shape and dtype."""
        images, spec, classes = np.asarray(images), self.manifest["input"], self.manifest["classes"]
        if images.shape[1:] != tuple(spec["shape"]) or images.dtype != spec["dtype"] or not np.isfinite(images).all():
            expected = f"finite {spec['dtype']}[batch, {str(spec['shape'])[1:-1]}]"
            raise ValueError(f"images: expected {expected}, got {images.dtype}{list(images.shape)}, or not finite")
        if len(images) == 0:
            return Prediction(np.zeros(0, "i4"), np.zeros(0, "i4"), np.zeros(0, "f4"), np.zeros((0, classes), "f4"))
        most = max(self.programs)
        parts = [self._answer(images[i : i + most]) for i in range(0, len(images), most)]
        return Prediction(*map(np.concatenate, zip(*parts, strict=True)))

    def _answer(self, images: np.ndarray) -> list[np.ndarray]:
        n = len(images)
        rows = min(size for size in self.programs if size >= n)
        call, arrays = self.programs[rows]
        padded = np.concatenate([images, np.repeat(images[-1:], rows - n, axis=0)])
        return [np.asarray(column)[:n] for column in call(arrays, self.thresholds, padded, np.int32(n))]


if __name__ == "__main__":
    if len(sys.argv) not in {2, 3}:
        sys.exit(__doc__)
    try:
        cascade = Cascade(Path(__file__).parent, *sys.argv[2:])
        answers = cascade.predict(np.load(sys.argv[1]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    names = cascade.manifest["class_names"] or range(answers.logits.shape[1])
    for index, site, score in zip(*answers[:3], strict=True):
        print(names[index], f"exit {site}", f"score {score:.3f}")
