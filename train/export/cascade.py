"""Run an exported cascade: NumPy and onnxruntime are all that it needs.

    python cascade.py images.npy [plan]

The rows that a cache answers leave; the others are compacted and go on to the next span.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime

_ONLY_WHAT_IS_ASKED_FOR = onnxruntime.RunOptions()
_ONLY_WHAT_IS_ASKED_FOR.only_execute_path_to_fetches = True  # a cache that is off takes no time


class Prediction(NamedTuple):
    """The answers to a batch."""

    class_index: np.ndarray  # int32[batch]
    exit: np.ndarray  # int32[batch]: the site of the cache that answered, or the number of blocks
    score: np.ndarray  # float32[batch]: infinity from the network itself
    logits: np.ndarray  # float32[batch, classes]


class Cascade:
    """The spans of an exported folder, with the thresholds of one of its plans."""

    def __init__(self, folder: Path | str = Path(__file__).parent, plan: str | None = None) -> None:
        """Open the folder; ``plan`` is one of ``manifest["plans"]``, by default the first."""
        self.manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
        plans = self.manifest["plans"]
        if plan is not None and plan not in plans:
            raise ValueError(f"plan: expected one of {', '.join(plans)}, got {plan!r}")
        chosen = plans[plan or next(iter(plans))]
        thresholds = [np.inf if t is None else t for t in chosen["thresholds"]]  # infinity: the cache is off
        self.thresholds = np.array([*thresholds, -np.inf], np.float32)  # at the end the network answers
        self.promise: str = chosen["promise"]
        if (checked := self.manifest["onnxruntime"]) not in {"", onnxruntime.__version__}:
            warnings.warn(f"checked with onnxruntime {checked}, not with this one: {self.promise}", stacklevel=2)
        files = [str(Path(folder) / span["file"]) for span in self.manifest["spans"]]
        self.sessions = [onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files]

    def predict(self, images: np.ndarray) -> Prediction:
        """Answer images[batch, height, width, channels] of the manifest's shape and dtype."""
        images, spec = np.asarray(images), self.manifest["input"]
        if images.shape[1:] != tuple(spec["shape"]) or images.dtype != spec["dtype"] or not np.isfinite(images).all():
            expected = f"finite {spec['dtype']}[batch, {', '.join(map(str, spec['shape']))}]"
            raise ValueError(f"images: expected {expected}, got {images.dtype}{list(images.shape)}, or NaN or infinity")
        n, classes = len(images), self.manifest["classes"]
        answer = Prediction(*np.zeros((2, n), np.int32), np.zeros(n, np.float32), np.zeros((n, classes), np.float32))
        rows, x = np.arange(n), images
        for span, session, threshold in zip(self.manifest["spans"], self.sessions, self.thresholds, strict=True):
            if len(rows) == 0:
                break
            given = {session.get_inputs()[0].name: x}
            if threshold == np.inf:
                (x,) = session.run(["next"], given, _ONLY_WHAT_IS_ASKED_FOR)
                continue
            found, score, logits, *following = session.run(None, given)
            hit, site = score >= threshold, np.full(len(rows), span["site"])
            for column, values in zip(answer, Prediction(found, site, score, logits), strict=True):
                column[rows[hit]] = values[hit]
            rows, x = rows[~hit], following[0][~hit] if following else x
        return answer


if __name__ == "__main__":
    cascade = Cascade(plan=sys.argv[2] if len(sys.argv) > 2 else None)  # noqa: PLR2004
    p = cascade.predict(np.load(sys.argv[1]))
    names = cascade.manifest["class_names"]
    for index, site, score in zip(p.class_index, p.exit, p.score, strict=True):
        print(names[index] if names else index, f"exit {site}", f"score {score:.3f}")
