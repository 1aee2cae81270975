"""What the file of a Freeze Inference experiment may say."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from gati_jax import FreezeConfig
from train.config import Base, Count, PredictorTraining, Section, Source


class FreezeSplits(Section):
    """Disjoint parts of the source, in TFDS's notation."""

    build: str = Field(description="trains key networks, and becomes points")
    seen: str = Field(description="sets thresholds as published, on images that the base was trained on")
    clean: str = Field(description="sets thresholds once more, on images that the base has not seen")
    serve: str = Field(description="requests; nothing is chosen on them")


class FreezeData(Source):
    """Where images come from, and which are for what."""

    splits: FreezeSplits


class KeyTraining(PredictorTraining):
    """How key networks are trained."""

    epochs: Count = 3
    batch: Count = 256
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3


def _distinct(kinds: tuple[str, ...]) -> tuple[str, ...]:
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError("expected knn, kmeans or both")
    return kinds


class Caches(Section):
    """As ``gati_jax.FreezeConfig``."""

    kinds: Annotated[tuple[Literal["knn", "kmeans"], ...], AfterValidator(_distinct)] = ("knn", "kmeans")
    key_units: Annotated[int, Field(ge=1, le=65_536)] = 1024
    cells: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="average fields in front of the key network; unset: the paper's flattened activation"
    )
    k: Count = 50
    budget: Count | None = Field(default=None, description="bytes for the points of all k-NN caches; unset: all points")
    choice: Literal["random", "condensed", "spread"] = "random"
    centres: Count = 100
    predictors: bool = Field(default=False, description="train the paper's FC, Pool and Conv, too")
    behind_last: bool = Field(default=True, description="a cache behind the last block, too, as the paper has one")

    def build(self) -> FreezeConfig:
        """Return the library's record."""
        return FreezeConfig(**self.model_dump(exclude={"behind_last", "predictors"}))


class FreezeExperiment(Section):
    """The published protocol, and the same with clean splits."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: FreezeData
    base: Base
    fit: KeyTraining = KeyTraining()
    freeze: Caches = Caches()
