"""Run an exported cascade, with NumPy and onnxruntime alone: python cascade.py images.npy [plan]."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime


class Prediction(NamedTuple):
    """The answers to a batch, as the library gives them."""

    class_index: np.ndarray  # int32[batch]
    exit: np.ndarray  # int32[batch]: the site of the cache that answered, or the number of blocks
    score: np.ndarray  # float32[batch]: infinity from the network itself
    logits: np.ndarray  # float32[batch, classes]


class Cascade:
    """The spans of an exported folder under one of its plans: rows that a cache answers leave, the others go on."""

    def __init__(self, folder: Path | str = Path(__file__).parent, plan: str | None = None) -> None:
        """Open the folder; ``plan`` is one of ``manifest["plans"]``, by default the first."""
        self.manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
        plans = self.manifest["plans"]
        if (plan := next(iter(plans)) if plan is None else plan) not in plans:
            raise ValueError(f"plan: expected one of {', '.join(plans)}, got {plan!r}")
        self.promise: str = plans[plan]["promise"]
        thresholds = [np.inf if t is None else t for t in plans[plan]["thresholds"]]
        self.thresholds = np.array([*thresholds, -np.inf], np.float32)  # at the end the network answers
        if (checked := self.manifest["onnxruntime"]) not in {"", onnxruntime.__version__}:
            warnings.warn(f"checked with onnxruntime {checked}, not with this one: {self.promise}", stacklevel=2)
        options = onnxruntime.SessionOptions()
        # Else the idle threads of one session keep those of the others from the cores (onnxruntime 1.31 or newer).
        options.add_session_config_entry("session.intra_op.spin_duration_us", "20")
        files = [str(Path(folder) / span["file"]) for span in self.manifest["spans"]]
        self.sessions: list[Any] = [onnxruntime.InferenceSession(f, options, ["CPUExecutionProvider"]) for f in files]

    def predict(self, images: np.ndarray) -> Prediction:
        """Answer images[batch, height, width, channels] of the manifest's shape and dtype."""
        images, spec = np.asarray(images), self.manifest["input"]
        if images.shape[1:] != tuple(spec["shape"]) or images.dtype != spec["dtype"] or not np.isfinite(images).all():
            expected = f"finite {spec['dtype']}[batch, {str(spec['shape'])[1:-1]}]"
            raise ValueError(f"images: expected {expected}, got {images.dtype}{list(images.shape)}, or not finite")
        n, classes, rows, x = len(images), self.manifest["classes"], np.arange(len(images)), images
        answers = Prediction(np.zeros(n, "i4"), np.zeros(n, "i4"), np.zeros(n, "f4"), np.zeros((n, classes), "f4"))
        without_cache = onnxruntime.RunOptions()
        without_cache.only_execute_path_to_fetches = True
        for span, session, threshold in zip(self.manifest["spans"], self.sessions, self.thresholds, strict=True):
            if len(rows) == 0:
                break
            given = {session.get_inputs()[0].name: x}
            if threshold == np.inf:  # the cache is off, and takes no time
                x = session.run(["next"], given, without_cache)[0]
                continue
            index, score, logits, *following = session.run(None, given)
            hit = score >= threshold
            for column, values in zip(answers, (index[hit], span["site"], score[hit], logits[hit]), strict=True):
                column[rows[hit]] = values
            rows, x = rows[~hit], following[0][~hit] if following else x
        return answers


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
