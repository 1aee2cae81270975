"""Cascades as StableHLO programs, which JAX runs without this library: one for each plan and number of rows.

<plan>_<rows>.stablehlo   what jax.export wrote; images, thresholds and the arrays below are its arguments
arrays.bin                the arrays of base and caches, one after another; the manifest says which
"""

import datetime as dt
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from gati_jax import Bundle
from gati_jax.profiling import device_name
from gati_jax.pytrees import pack
from gati_jax.runtime import Cascade
from gati_jax.runtime.batched import BatchedCascade, Schedule, answer_tiled
from gati_jax.runtime.cascade import answer_only

from . import stablehlo_cascade as runner
from .folder import Answers, input_dtype

_log = logging.getLogger("train.export")

BUCKETS = (1, 8, 64)
"""Rows of a program; fewer are padded, and a tile without requests takes no time."""
_TILES = {1: 1.0, 8: 4.0}  # rows, and how long tiles of them take beside each other
_THRESHOLDS = -1  # their place among the arrays


class StableHloForm:
    """A bundle as StableHLO programs for this process's default device, see ``folder.Form``."""

    arithmetic = "stablehlo"
    runner = runner.__file__

    def __init__(self, bundle: Bundle) -> None:
        """Trace and lower every program; nothing is compiled yet."""
        self.bundle = bundle
        self.device = f"jax {jax.__version__} on {device_name()}"
        self._arrays: dict[int, tuple[int, Array]] = {}  # by identity, for plans share most of them
        self._programs = [self._lowered(name, rows) for name in bundle.cascades for rows in BUCKETS]

    def files(self, promises: Mapping[str, str]) -> dict[str, bytes]:
        """Return the programs and the arrays; only the manifest has the promises."""
        del promises
        arrays = b"".join(np.asarray(array).tobytes() for _, array in self._arrays.values())
        return {"arrays.bin": arrays} | {about["file"]: content for about, content in self._programs}

    def describe(self, *, checked: bool) -> dict[str, Any]:
        """Return the programs, the arrays, and what wrote them."""
        del checked
        return {
            "jax": jax.__version__,
            "platform": jax.default_backend(),
            "written": dt.datetime.now(dt.UTC).date().isoformat(),
            "arrays": [{"dtype": str(array.dtype), "shape": array.shape} for _, array in self._arrays.values()],
            "programs": [about for about, _ in self._programs],
        }

    def thresholds(self, cascade: Cascade) -> np.ndarray:
        """Return float32[caches of this plan]."""
        return np.asarray(cascade.thresholds)

    def each_way(self, folder: Path, cascade: Cascade, rows: np.ndarray) -> Iterator[Answers]:
        """Answer rows in batches of every size; the base alone by any plan's programs with its caches off."""
        plan = next((name for name, one in self.bundle.cascades.items() if one is cascade), None)
        programs = runner.Cascade(folder, plan)
        if plan is None:
            programs.thresholds = np.full_like(programs.thresholds, np.inf)
        for size in BUCKETS:
            parts = [programs.predict(rows[i : i + size])[:2] for i in range(0, len(rows), size)]
            yield np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _lowered(self, plan: str, rows: int) -> tuple[dict[str, Any], bytes]:
        """Return what the manifest says of a program, and the program."""
        _log.info("lowering plan %s for %d rows at a time", plan, rows)
        cascade, bundle = self.bundle.cascades[plan], self.bundle
        leaves, structure = jax.tree.flatten(_of_rows(cascade, rows))
        places = [_THRESHOLDS if leaf is cascade.thresholds else self._place(leaf) for leaf in leaves]
        numbers = sorted({*places} - {_THRESHOLDS})
        images = jax.ShapeDtypeStruct((rows, *bundle.chain.input_spec.shape), input_dtype(bundle))
        arrays = [array for i, (_, array) in enumerate(self._arrays.values()) if i in numbers]
        run = jax.jit(functools.partial(_run, structure, [numbers.index(i) if i >= 0 else i for i in places]))
        exported = jax.export.export(run)(arrays, cascade.thresholds, images, np.int32(rows))
        about = {"file": f"{plan}_{rows}.stablehlo", "plan": plan, "rows": rows, "arrays": numbers}
        return about, bytes(exported.serialize())

    def _place(self, array: Array) -> int:
        return self._arrays.setdefault(id(array), (len(self._arrays), array))[0]


def _of_rows(cascade: Cascade, rows: int) -> Cascade | BatchedCascade:
    return cascade if rows == 1 else BatchedCascade.of(cascade, Schedule.of(_TILES, batch=rows))


def _run(
    structure: Any,  # noqa: ANN401 (a PyTreeDef)
    places: Sequence[int],
    arrays: Sequence[Array],
    thresholds: Float[Array, " caches"],
    images: Shaped[Array, "rows *input"],
    count: Int[Array, ""],
) -> tuple[Array, ...]:
    """Answer ``count`` of ``images`` with the arrays of a cascade as arguments."""
    leaves = [thresholds if i == _THRESHOLDS else arrays[i] for i in places]
    packed = pack(jax.tree.unflatten(structure, leaves), most=-1)
    answers = answer_only(packed, images) if len(images) == 1 else answer_tiled(packed, images, count)
    return tuple(jnp.asarray(column) for column in answers)
