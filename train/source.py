"""The data section of an experiment: where images come from, and which of them are for what."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from gati_jax import InputError, data
from gati_jax.data import DATASET_NAME, Dataset, Reading
from gati_jax.imports import import_named
from gati_jax.options import Strict, check_function_name


def _data_name(name: str) -> str:
    try:
        return name if re.fullmatch(DATASET_NAME, name) else check_function_name(name)
    except ValueError as error:
        raise ValueError("expected digits, folder, npz, huggingface, a TFDS name or package.module:function") from error


DatasetName = Annotated[str, AfterValidator(_data_name)]


class Splits(Strict):
    """Disjoint parts of the source, in TFDS's notation."""

    fit: str = Field(description="trains the predictors")
    select: str = Field(description="fits the selectors; the plan is composed on it")
    certify: str = Field(description="opened once the plan is fixed")
    test: str = Field(description="for evaluation; nothing is chosen on it")


class _Place(Strict):
    name: DatasetName = Field(
        description="digits, folder, npz, huggingface, package.module:function, or a TFDS name: cifar10, cifar10:3.0.2"
    )
    dir: Path | None = Field(
        default=None,
        description="folder or file of the data; TFDS's folder (unset: its default, where missing data are downloaded)",
    )
    base_trained_on: tuple[str, ...] = Field(description="parts that the base was trained on, here or elsewhere")


class Source(Reading, _Place):
    """Where images come from."""

    def load(self, split: str, folder: Path | None = None, *, own: bool = False) -> Dataset:
        """Load a part of the source.

        Args:
            split: In TFDS's notation.
            folder: In place of ``dir``.
            own: Whether the config is the user's own, and not a bundle's: only then may ``name`` name code.
        """
        options = self.model_dump(include=set(Reading.model_fields), exclude_defaults=True)
        if not self.names_code:
            return data.load(self.name, split, folder or self.dir, **options)
        if not own:
            raise InputError(f"data.name: expected the name of data, got {self.name}, which names code, from a bundle")
        function: Any = import_named(self.name, "data.name")
        return data.load_function(function, split, name=self.name, **options)

    @property
    def names_code(self) -> bool:
        """Whether the name is ``package.module:function``."""
        return re.fullmatch(DATASET_NAME, self.name) is None


class Data(Source):
    """Where images come from, and which are for what."""

    splits: Splits
