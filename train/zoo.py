"""Trained bases as safetensors files that describe themselves: network, data, normalisation, accuracy, recipe.

``python -m train.base`` writes them; ``train.caches`` and the other scripts take from them what a config leaves open.
Run as a script, this copies one into a model zoo, with kernels in float16, as long as the whole folder stays small.
"""

import json
import logging
import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import save

from gati_jax import InputError, Normalization, WeightsError
from gati_jax.files import write_atomically
from gati_jax.models import NAMES, read_metadata, read_weights
from gati_jax.options import describe_error

from . import cli
from .config import Base, Classes, Config, Side
from .source import DatasetName

EXAMPLE = "python -m train.zoo --weights runs/gpu/cifar10_resnet18/base/base.safetensors --out models-zoo"
MAX_BYTES = 60 * 2**20
_log = logging.getLogger("train.zoo")
_BASE_KEYS = ("network", "classes", "input_shape", "shortcut", "patch", "depth", "normalization")
_TEXTS = ("network", "dataset", "split")  # never JSON, even if they read so


def _known(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"expected one of {', '.join(NAMES)}")
    return name


Scalar = bool | int | float | str | None


class Entry(BaseModel):
    """The metadata of a base's weights; other keys beside them are ignored.

    The file is untrusted: names become parts of paths and shapes become arrays, so all have bounds.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    gati_jax: Literal[1] = 1  # version of this record
    network: Annotated[str, AfterValidator(_known)]
    classes: Classes
    input_shape: tuple[Side, Side, Side]
    shortcut: Literal["A", "B"] | None = None
    patch: Annotated[int, Field(ge=1, le=64)] | None = None
    depth: Annotated[int, Field(ge=1, le=64)] | None = None
    normalization: Normalization
    dataset: DatasetName
    trained_on: tuple[str, ...]
    split: str  # on which the accuracy was measured
    accuracy: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    recipe: dict[str, Scalar | dict[str, Scalar]]
    seed: int

    @classmethod
    def of(cls, config: Config, accuracy: float) -> "Entry":
        """Describe what was trained by a config."""
        base = config.base.model_dump(include=set(_BASE_KEYS))
        return cls(
            **base,
            dataset=config.data.name,
            trained_on=config.data.base_trained_on,
            split=config.data.splits.test,
            accuracy=accuracy,
            recipe=config.base.training.model_dump(mode="json"),
            seed=config.seed,
        )

    def metadata(self) -> dict[str, str]:
        """Return it as safetensors keeps it: strings; other values become JSON."""
        fields = self.model_dump(mode="json")
        return {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> "Entry":
        """Read what ``metadata`` returned."""
        return cls.model_validate({key: _value(key, text) for key, text in metadata.items()})


def _value(key: str, text: str) -> object:
    if key in _TEXTS or key not in Entry.model_fields:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_entry(path: Path) -> Entry | None:
    """Return the entry in a weights file; None for files that ``train.base`` has not written.

    Raises:
        WeightsError: The file is missing or damaged, or its metadata are.
    """
    metadata = read_metadata(path)
    if "gati_jax" not in metadata:
        return None
    try:
        return Entry.from_metadata(metadata)
    except ValidationError as error:
        first = describe_error(error.errors(include_url=False)[0])
        raise WeightsError(f"weights: the metadata of {path} are damaged: {first}") from error
    except RecursionError as error:
        raise WeightsError(f"weights: the metadata of {path} are damaged: nested too deep") from error


def completed(config: Config) -> Config:
    """Return the config with what it leaves open filled in from the metadata of the base's weights.

    Data that the metadata name as trained on count as seen by the base, even if the config does not list them.
    """
    if (entry := _entry_of(config.base)) is None:
        return config
    trained_on = seen(entry, config.data.base_trained_on, config.data.name)
    source = config.data.model_copy(update={"base_trained_on": trained_on})
    return config.model_copy(update={"base": completed_base(config.base), "data": source})


def seen(entry: Entry | None, listed: tuple[str, ...], dataset: str) -> tuple[str, ...]:
    """Return the parts of a data set that a network has seen: those that a config lists, and those in its metadata."""
    more = entry.trained_on if entry is not None and entry.dataset == dataset else ()
    return tuple(dict.fromkeys((*listed, *more)))


def completed_base(base: Base) -> Base:
    """Return the base's section with what it leaves open filled in from the metadata of its weights."""
    if (entry := _entry_of(base)) is None:
        return base
    known = entry.model_dump(include=set(_BASE_KEYS))
    if base.normalization is not None and base.normalization != entry.normalization:
        _log.warning("%s was trained with another normalization than the config's", base.weights)
    try:
        return Base.model_validate(known | base.model_dump(exclude_unset=True))
    except ValidationError as error:
        first = describe_error(error.errors(include_url=False)[0])
        raise InputError(f"weights: the metadata of {base.weights} contradict the config: {first}") from error


def _entry_of(base: Base) -> Entry | None:
    # A missing file is reported by the script that needs it.
    return read_entry(base.weights) if base.weights is not None and base.weights.is_file() else None


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    p = cli.parser("Copy a trained base into a model zoo, its kernels in float16.", EXAMPLE, as_json=False)
    p.add_argument("--weights", type=Path, required=True, metavar="FILE", help="of python -m train.base")
    arguments = p.parse_args(argv)
    print(keep(arguments.weights, arguments.out))


def keep(weights: Path, folder: Path) -> Path:
    """Copy a base's weights into ``folder``, every tensor of more than one dimension in float16."""
    entry = read_entry(weights)
    if entry is None:
        raise InputError(f"weights: expected a file of python -m train.base, got {weights} without its metadata")
    tensors = {k: v.astype(np.float16) if v.ndim > 1 else v for k, v in read_weights(weights).items()}
    if wide := sorted(name for name, v in tensors.items() if not np.isfinite(v).all()):
        raise InputError(f"weights: expected kernels within float16's range, got larger ones in {', '.join(wide)}")
    path = folder / f"{re.sub('[^A-Za-z0-9_.-]', '-', entry.dataset)}-{entry.network}.safetensors"
    content = save(tensors, metadata=entry.metadata() | {"kernels": "float16; the accuracy is that of float32"})
    others = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file != path)
    size = others + len(content)
    if size > MAX_BYTES:
        got = f"{size / 2**20:.1f} with {path.name}"
        raise InputError(f"out: expected at most {MAX_BYTES >> 20} MiB in {folder}, got {got}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return path


if __name__ == "__main__":
    cli.run(main)
