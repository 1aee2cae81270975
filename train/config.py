"""The TOML files of experiments: frozen records without unknown keys, overridden by ``--section.key value``.

Sections of options that the library has a record for are that record: its bounds, defaults and help hold here, too.
"""

import dataclasses
import difflib
import functools
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from gati_jax import Augment, Chain, FitConfig, Head, InputError, Normalization
from gati_jax.caches import GridSpec, PredictorSpec, SelectorSpec, SortedSelectorSpec, build_predictor, build_selector
from gati_jax.fitting.heads import HeadName, IsCascaded, Sites
from gati_jax.models import Architecture, architecture
from gati_jax.options import (
    Count,
    FunctionName,
    NotNegative,
    Positive,
    Seed,
    Share,
    Strict,
    describe_error,
    describe_options,
)

from .source import Data

Classes = Annotated[int, Field(ge=2, le=100_000)]
Side = Annotated[int, Field(ge=1, le=4096)]
Decay = Annotated[float, Field(ge=0, lt=1)]


M = TypeVar("M", bound=Strict)


class BaseTraining(Strict):
    """How train.base trains the base."""

    epochs: Count = Field(default=20, description="passes over the data")
    batch: Count = Field(default=128, description="images in a step")
    optimizer: Literal["sgd", "muon", "adamw"] = Field(
        default="sgd", description="sgd with Nesterov momentum, muon, or adamw, which transformers take"
    )
    learning_rate: Positive = Field(default=0.1, description="at the peak of the one cycle")
    rest_learning_rate: Positive = Field(default=2e-3, description="with muon: Adam's, for all but convolutions")
    warm_up: Share = Field(default=0.2, description="share of the steps up to the peak")
    momentum: Decay = Field(default=0.9, description="of either optimizer")
    weight_decay: NotNegative = Field(default=5e-4, description="of kernels")
    label_smoothing: Decay = Field(default=0.0, description="share spread over all classes")
    augment: Augment = Augment()
    cutout: Annotated[int, Field(ge=0, le=256)] = Field(default=0, description="side of a square blanked in each image")
    average: Decay = Field(
        default=0.0, description="decay of a moving average of the weights, which is then kept instead of them; 0: none"
    )
    bfloat16: bool = Field(default=False, description="compute in bfloat16; parameters stay float32")
    flips: bool = Field(default=False, description="also report the accuracy on images with their mirror images")
    checkpoint_seconds: NotNegative = Field(default=30.0, description="least time between two checkpoints")


class Base(Strict):
    """The network and its weights."""

    chain: FunctionName | None = Field(
        default=None, description="package.module:function that returns a network of your own, in place of all below"
    )
    network: str = Field(
        default="", description="resnet20/32/44/56/110, resnet18/34/50/101/152, vgg11/13/16/19 or vit_tiny/small/base"
    )
    weights: Path | None = Field(default=None, description=".safetensors (or, with torch, .pth) state dict")
    classes: Classes = Field(default=10, description="number of classes")
    input_shape: tuple[Side, Side, Side] = Field(default=(32, 32, 3), description="height, width and channels")
    shortcut: Literal["A", "B"] | None = Field(default=None, description="of residual networks; unset: as published")
    patch: Annotated[int, Field(ge=1, le=64)] | None = Field(
        default=None, description="of ViTs: pixels per side of a patch; unset: 4, and 16 from 64 pixels on"
    )
    depth: Annotated[int, Field(ge=1, le=64)] | None = Field(default=None, description="of ViTs: blocks; unset: 12")
    normalization: Normalization | None = Field(default=None, description="unset: what the weights' metadata say")
    accept_low_accuracy: bool = Field(
        default=False, description="fit caches for a base that guesses, or always gives the same answer"
    )
    training: BaseTraining = BaseTraining()

    @model_validator(mode="after")
    def _chain_stands_alone(self) -> "Base":
        describing = ("network", "weights", "classes", "input_shape", "shortcut", "patch", "depth", "normalization")
        given = [name for name in describing if getattr(self, name) != type(self).model_fields[name].default]
        if self.chain is not None and given:
            raise ValueError(f"chain: expected it alone, for its network says the rest, got it with {', '.join(given)}")
        return self

    @model_validator(mode="after")
    def _channels_agree(self) -> "Base":
        if self.normalization and len(self.normalization.mean) not in {1, self.input_shape[2]}:
            raise ValueError(f"normalization.mean: expected one number for each of {self.input_shape[2]} channels")
        return self

    @property
    def title(self) -> str:
        """What results call the network."""
        return self.chain or self.network

    def architecture(self) -> Architecture:
        """Return the network's configuration."""
        if self.chain is not None:
            raise InputError(f"base.chain: expected a network of this library here, got {self.chain}")
        if not self.network:
            raise InputError(
                f"base.network: expected a name, or weights whose metadata say it, got neither ({self.weights})"
            )
        given = self.model_dump(include={"classes", "input_shape", "shortcut", "patch", "depth"})
        return architecture(self.network, **given)

    def normalize(self) -> Normalization:
        """Return how inputs are normalised."""
        if self.normalization is None:
            raise InputError(
                "base.normalization: expected mean and std, or weights whose metadata say them, got neither"
            )
        return self.normalization


class HeadSection(Strict):
    """A kind of cache to train: a ``gati_jax.Head`` whose parts are named instead of built."""

    name: HeadName = Field(description="prefix of the candidates' names: grid@4 at site 4")
    predictor: PredictorSpec = Field(default=GridSpec(), description="kind and options of the predictor")
    selector: SelectorSpec = Field(default=SortedSelectorSpec(), description="kind and options of the selector")
    sites: Sites = None
    selectors: tuple[SelectorSpec, ...] = Field(default=(), description="further ones to try on the same predictor")
    cascaded: IsCascaded = False

    @model_validator(mode="after")
    def _can_be_built(self) -> "HeadSection":
        self.build()
        return self

    def build(self) -> Head:
        """Return the library's record."""
        return Head(
            name=self.name,
            predictor=functools.partial(build_predictor, self.predictor),
            selector=build_selector(self.selector),
            sites=self.sites,
            selectors=tuple((spec.kind, build_selector(spec)) for spec in self.selectors),
            cascaded=self.cascaded,
        )


class NetworkSection(Strict):
    """A trained small network as a cache at site 0, with inputs and classes as the base's."""

    name: HeadName = Field(description="prefix of the candidate's name: small@0")
    network: str = Field(description="as base.network")
    weights: Path = Field(description="as base.weights")
    trained_on: tuple[str, ...] = Field(description="as data.base_trained_on; none of it may be select or certify")
    shortcut: Literal["A", "B"] | None = Field(default=None, description="as base.shortcut")
    normalization: Normalization | None = Field(default=None, description="that it was trained with; unset: the base's")

    def architecture(self, base: Chain) -> Architecture:
        """Return the network's configuration, for inputs and classes of the base's."""
        shape = base.input_spec.shape
        if len(shape) != len(("height", "width", "channels")) or base.normalization is None:
            raise InputError(
                f"fit.networks: expected a base that normalises images [height, width, channels], got one that takes"
                f" {base.input_spec.dtype}{list(shape)}" + ("" if base.normalization else " and has no normalization")
            )
        height, width, channels = shape
        size = (height, width, channels)
        return architecture(self.network, classes=base.classes, input_shape=size, shortcut=self.shortcut)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit(FitConfig):
    """How caches are fitted, and which."""

    seed: Annotated[Seed, Field(description="of initial values, order and augmentation; unset: the experiment's")] = 0
    # Not in the repr, by which ``gati_jax.fit`` tells fits apart: it adds the candidates itself.
    heads: Annotated[tuple[HeadSection, ...], Field(description="caches behind blocks of the base")] = (
        dataclasses.field(default=(HeadSection(name="grid"),), repr=False)
    )
    networks: Annotated[tuple[NetworkSection, ...], Field(description="small networks that come before the base")] = (
        dataclasses.field(default=(), repr=False)
    )


class Planning(Strict):
    """What is to be certified, and the budgets of a plan."""

    epsilon: Share = Field(default=0.02, description="largest share of requests that may disagree with the base")
    delta: Share = Field(default=0.05, description="risk that the certificate is wrong, or any of several")
    also: Annotated[tuple[Share, ...], Field(max_length=3)] = Field(
        default=(), description="further epsilons: a plan for each, named like 2%, all certified together"
    )
    max_sites: Count | None = Field(default=None, description="most caches in a plan; unset: any number")
    memory_share: Positive | None = Field(default=None, description="bytes of all caches, as a share of the base's")
    worst_share: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="time of a request that no cache answers, as a multiple of the base's"
    )
    seconds: NotNegative = Field(default=30.0, description="to search for the best composition")
    batch: Annotated[int, Field(ge=1, le=4096)] = Field(default=1, description="requests at once that latency is about")
    repeats: bool = Field(
        default=False, description="equal certify rows are requests that came again, drawn one by one, not copies"
    )
    group_tolerance: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description="of data in groups: certify that at most epsilon of groups have a larger share of disagreements;"
        " unset: that the mean share over groups is at most epsilon",
    )
    backend: Literal["auto", "xla", "onnxruntime"] = Field(
        default="auto", description="what plans are made for; auto: the faster one here, on a CPU"
    )
    tuned: bool = Field(default=False, description="tune XLA first, and plan with its times then; minutes more")
    bfloat16: bool = Field(
        default=False, description="also certify every plan in bfloat16, by itself; delta is shared by twice as many"
    )

    @property
    def tests(self) -> int:
        """How many certificates share delta."""
        return len(self.epsilons) * (2 if self.bfloat16 else 1)

    @property
    def epsilons(self) -> dict[str, float]:
        """By name of the plan; one plan alone is called default."""
        if not self.also:
            return {"default": self.epsilon}
        return {f"{100 * epsilon:.6g}%": epsilon for epsilon in sorted({self.epsilon, *self.also})}


class Experiment(Strict):
    """The experiment as a whole."""

    seed: Seed = Field(default=0, description="of everything random")

    @model_validator(mode="before")
    @classmethod
    def _pass_on_the_seed(cls, values: Any) -> Any:  # noqa: ANN401 (not validated yet)
        """A fit takes the experiment's seed, unless it has its own."""
        if not isinstance(values, Mapping) or not isinstance(values.get("fit", {}), Mapping):
            return values
        return {**values, "fit": {"seed": values.get("seed", 0), **values.get("fit", {})}}


class Config(Experiment):
    """The experiment as a whole."""

    data: Data
    base: Base
    fit: Fit = Fit()
    plan: Planning = Planning()
    measure_rounds: Annotated[int, Field(ge=3)] = Field(default=60, description="interleaved repeats of every timing")


def load(model: type[M], path: Path | None, overrides: Sequence[str] = ()) -> M:
    """Read a TOML file, which may say what ``model`` does, and apply ``--section.key value`` overrides.

    Without a file, the overrides say everything.

    Raises:
        InputError: The file cannot be read, or a key or a value is not right; names the nearest key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config: cannot read {path}: {error}") from error
    for key, text in _pairs(overrides):
        _assign(values, key.split("."), _value(text))
    return build(model, values)


def build(model: type[M], values: Mapping[str, Any]) -> M:
    """Check a nested dictionary; raises as ``load`` does."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = []
        for one in error.errors(include_url=False):
            line = describe_error(one)
            if one["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
                key = ".".join(map(str, one["loc"]))
                line = f"unknown key {key}{did_you_mean(key, keys_of(model), always=True)}"
            lines.append(f"config: {line}")
        raise InputError("; ".join(lines)) from error


def build_config(values: Mapping[str, Any]) -> Config:
    """Check the nested dictionary of an experiment with caches, such as a bundle's provenance holds."""
    return build(Config, values)


def keys_of(model: type[Strict]) -> list[str]:
    """Return every key that a file may have."""
    return [option.key for option in describe_options(model)]


def did_you_mean(name: str, known: Sequence[str], *, always: bool = False) -> str:
    """Suggest what was meant: the same name in another section, or else the nearest, ``always`` or if it is similar."""
    leaf = name.strip("-").rpartition(".")[2]
    same = [key for key in known if key.strip("-").rpartition(".")[2] == leaf]
    near = same or difflib.get_close_matches(name, known, n=1, cutoff=0.0 if always else 0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _pairs(tokens: Sequence[str]) -> list[tuple[str, str]]:
    pairs, rest = [], list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise InputError(f"arguments: expected --section.key value, got {token!r}")
        key, equals, text = token[2:].partition("=")
        if not equals and not rest:
            raise InputError(f"arguments: expected a value behind {token}")
        pairs.append((key.replace("-", "_"), text if equals else rest.pop(0)))
    return pairs


def _value(text: str) -> object:
    """Read a value as TOML; what is no TOML is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(values: dict[str, Any], keys: list[str], value: object) -> None:
    """Set a value by its path; a number is a position in a list."""
    below: Any = values
    for i, key in enumerate(keys):
        at: Any = key
        if isinstance(below, list) and key.isdecimal() and int(key) < len(below):
            at = int(key)
        elif not isinstance(below, dict):
            raise InputError(
                f"config: expected a section, got the value {below!r}, at {keys[i - 1]} of {'.'.join(keys)}"
            )
        if i == len(keys) - 1:
            below[at] = value
        else:
            below = below.setdefault(at, {}) if isinstance(below, dict) else below[at]
