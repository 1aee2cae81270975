"""The TOML file of a Freeze Inference experiment."""

import dataclasses
from typing import Annotated

from pydantic import Field

from gati_jax import FitConfig, FreezeConfig
from train.config import Base, Experiment, Section, Source


class FreezeSplits(Section):
    """Disjoint parts of the source, in TFDS's notation."""

    build: str = Field(description="trains key networks, and becomes points")
    seen: str = Field(description="sets thresholds as published, on images that the base was trained on")
    clean: str = Field(description="sets thresholds once more, on images that the base has not seen")
    serve: str = Field(description="requests; nothing is chosen on them")


class FreezeData(Source):
    """Where images come from, and which are for what."""

    splits: FreezeSplits


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreezeCaches(FreezeConfig):
    """Which neighbour caches are made, and what beside them."""

    predictors: Annotated[bool, Field(description="also train the paper's FC, Pool and Conv")] = False
    behind_last: Annotated[bool, Field(description="a cache behind the last block, too, as the paper has one")] = True


class FreezeExperiment(Experiment):
    """The published protocol, and the same with clean splits."""

    data: FreezeData
    base: Base
    fit: FitConfig = FitConfig()
    freeze: FreezeCaches = FreezeCaches()
