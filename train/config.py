"""What an experiment's TOML file may say: frozen records, no unknown key, overrides as ``--section.key value``."""

import difflib
import functools
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from gati_jax import Augment, FitConfig, Head, InputError, Normalization
from gati_jax.caches import GridSpec, PredictorSpec, SelectorSpec, SortedSelectorSpec, build_predictor, build_selector
from gati_jax.models import Architecture, architecture

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_PART = r"[A-Za-z0-9][A-Za-z0-9_.*=+-]*"
DatasetName = Annotated[str, Field(max_length=200, pattern=f"^{_PART}([:/]{_PART})*$")]
"""As in TFDS: ``cifar10``, ``mnist_corrupted/identity:1.0.0``; no path leads out of a folder by it."""
Classes = Annotated[int, Field(ge=2, le=100_000)]
Side = Annotated[int, Field(ge=1, le=4096)]


class Section(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


M = TypeVar("M", bound=Section)


class Splits(Section):
    """Disjoint parts of the source, in TFDS's notation."""

    fit: str
    select: str
    certify: str
    test: str


class Source(Section):
    """Where images come from."""

    name: DatasetName = Field(description="digits, or a TensorFlow Datasets name such as cifar10")
    dir: Path | None = Field(
        None, description="TensorFlow Datasets folder; unset: TFDS's default, downloading what is missing"
    )
    base_trained_on: tuple[str, ...] = Field(description="parts that the base was trained on, whoever trained it")


class Data(Source):
    """Where images come from, and which are for what."""

    splits: Splits


class Augmentation(Section):
    """What may be done to a training image."""

    pad: Annotated[int, Field(ge=0, le=64)] = 0
    flip: bool = False

    def build(self) -> Augment:
        """Return the library's record."""
        return Augment(pad=self.pad, flip=self.flip)


class NormalizationSection(Section):
    """``(pixel * scale - mean) / std``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255

    def build(self) -> Normalization:
        """Return the library's record."""
        return Normalization(**self.model_dump())


class BaseTraining(Section):
    """How ``train.base`` trains the base."""

    epochs: Count = 20
    batch: Count = 128
    optimizer: Literal["sgd", "muon"] = Field(default="sgd", description="sgd with Nesterov momentum, or muon")
    learning_rate: Rate = Field(default=0.1, description="at the peak of the one cycle")
    rest_learning_rate: Rate = Field(default=2e-3, description="with muon: Adam's, for all but convolutions")
    warm_up: Share = Field(default=0.2, description="share of the steps up to the peak")
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    augment: Augmentation = Augmentation()
    cutout: Annotated[int, Field(ge=0, le=256)] = Field(
        default=0, description="side of a square of every image that is blanked"
    )
    average: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="decay of a moving average of the weights, which is what is kept; 0: none"
    )
    bfloat16: bool = Field(default=False, description="compute in bfloat16; parameters stay float32")
    flips: bool = Field(default=False, description="say the accuracy on images and their mirror images together, too")
    checkpoint_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0


class Base(Section):
    """The network and its weights."""

    network: str = Field("", description="resnet20/32/44/56/110, resnet18/34/50/101/152 or vgg11/13/16/19")
    weights: Path | None = Field(None, description=".safetensors (or, with torch, .pth) state dict")
    classes: Classes = 10
    input_shape: tuple[Side, Side, Side] = (32, 32, 3)
    shortcut: Literal["A", "B"] | None = None
    normalization: NormalizationSection | None = Field(None, description="unset: what the weights' metadata say")
    training: BaseTraining = BaseTraining()

    @model_validator(mode="after")
    def _channels_agree(self) -> "Base":
        for name in ("mean", "std") if self.normalization else ():
            if len(getattr(self.normalization, name)) not in {1, self.input_shape[2]}:
                raise ValueError(
                    f"normalization.{name}: expected one number for each of {self.input_shape[2]} channels"
                )
        return self

    def architecture(self) -> Architecture:
        """Return the network's configuration.

        Raises:
            InputError: Neither the config nor the weights' metadata name it, or there is none of that name.
        """
        if not self.network:
            raise InputError(
                f"base.network: expected a name, or weights whose metadata say it, got neither ({self.weights})"
            )
        return architecture(self.network, classes=self.classes, input_shape=self.input_shape, shortcut=self.shortcut)

    def normalize(self) -> Normalization:
        """Return the library's record.

        Raises:
            InputError: Neither the config nor the weights' metadata say it.
        """
        if self.normalization is None:
            raise InputError(
                "base.normalization: expected mean and std, or weights whose metadata say them, got neither"
            )
        return self.normalization.build()


def _plain(name: str) -> str:
    """Check a name that candidates' names are made with: grid@4, grid+linear@4."""
    if not name or set(name) & {"@", "+"}:
        raise ValueError("expected a name without @ and +, which separate it from site and selector")
    return name


HeadName = Annotated[str, AfterValidator(_plain)]


class HeadSection(Section):
    """A kind of cache to train."""

    name: HeadName
    predictor: PredictorSpec = GridSpec()
    selector: SelectorSpec = SortedSelectorSpec()
    sites: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    selectors: tuple[SelectorSpec, ...] = Field(default=(), description="more selectors to try on the same predictor")
    cascaded: bool = Field(default=False, description="each also sees what the one at the site before says")

    @model_validator(mode="after")
    def _selectors_differ(self) -> "HeadSection":
        kinds = [spec.kind for spec in self.selectors]
        if len(set(kinds)) < len(kinds):
            raise ValueError(
                f"selectors: expected at most one of a kind, by which candidates are named, got {', '.join(kinds)}"
            )
        return self

    def build(self) -> Head:
        """Return the library's record."""
        predictor = functools.partial(build_predictor, self.predictor)
        return Head(
            name=self.name,
            predictor=predictor,
            selector=build_selector(self.selector),
            sites=self.sites,
            selectors=tuple((spec.kind, build_selector(spec)) for spec in self.selectors),
            cascaded=self.cascaded,
        )


class NetworkSection(Section):
    """A trained small network as a cache at site 0, with inputs and classes as the base's."""

    name: HeadName
    network: str = Field(description="as base.network")
    weights: Path
    trained_on: tuple[str, ...] = Field(description="as data.base_trained_on; none of it may be select or certify")
    shortcut: Literal["A", "B"] | None = None
    normalization: NormalizationSection | None = Field(None, description="that it was trained with; unset: the base's")

    def architecture(self, base: Base) -> Architecture:
        """Return the network's configuration, for inputs and classes of the base's."""
        return architecture(self.network, classes=base.classes, input_shape=base.input_shape, shortcut=self.shortcut)

    def normalize(self, base: Base) -> Normalization:
        """Return how its inputs were normalised when it was trained."""
        return self.normalization.build() if self.normalization else base.normalize()


class PredictorTraining(Section):
    """How predictors are trained."""

    epochs: Count = 5
    batch: Count = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-2
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    augment: Augmentation = Augmentation()
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="time for these passes: as many epochs as fit into it; unset: all"
    )

    def build(self, seed: int) -> FitConfig:
        """Return the library's record."""
        options = self.model_dump(exclude={"augment", "heads", "networks"})
        return FitConfig(**options, augment=self.augment.build(), seed=seed)


class Fit(PredictorTraining):
    """How caches are fitted."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 6.0
    folds: Annotated[int, Field(ge=2, le=20)] = 5
    heads: tuple[HeadSection, ...] = (HeadSection(name="grid"),)
    networks: tuple[NetworkSection, ...] = Field(default=(), description="small networks that come before the base")


class Planning(Section):
    """What is to be certified."""

    epsilon: Share = Field(default=0.02, description="largest share of requests that may disagree with the base")
    delta: Share = Field(default=0.05, description="risk that the certificate is wrong, or any of several")
    also: Annotated[tuple[Share, ...], Field(max_length=3)] = Field(
        default=(), description="further epsilons: a plan for each, named like 2%, all certified together"
    )
    max_sites: Count | None = None
    memory_share: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="bytes of all caches together, as a share of the base's"
    )
    worst_share: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="time of a request that no cache answers, as a multiple of the base's"
    )
    seconds: Annotated[float, Field(ge=0)] = Field(default=30.0, description="to search for the best composition")
    batch: Annotated[int, Field(ge=1, le=4096)] = Field(default=1, description="requests at once that latency is about")
    repeats: bool = Field(
        default=False, description="equal certify rows are requests that came again, drawn one by one, and not copies"
    )
    tuned: bool = Field(default=False, description="tune the network first, and plan with its times then; minutes more")

    @property
    def epsilons(self) -> dict[str, float]:
        """By name of the plan; one plan alone is called default."""
        if not self.also:
            return {"default": self.epsilon}
        return {f"{100 * epsilon:.6g}%": epsilon for epsilon in sorted({self.epsilon, *self.also})}


class Config(Section):
    """One experiment."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: Data
    base: Base
    fit: Fit = Fit()
    plan: Planning = Planning()
    measure_rounds: Annotated[int, Field(ge=3)] = Field(60, description="interleaved repeats of every timing")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the TOML file of an experiment with caches, see ``load``."""
    return load(Config, path, overrides)


def load(model: type[M], path: Path, overrides: Sequence[str] = ()) -> M:
    """Read a TOML file and apply ``--section.key value`` overrides.

    Args:
        model: What the file may say.
        path: The file.
        overrides: What the command line says.

    Raises:
        InputError: The file cannot be read, or a key or a value is not right; names the nearest key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config: cannot read {path}: {error}") from error
    for key, text in _pairs(overrides):
        _assign(values, key.split("."), _value(text))
    return _build(model, values)


def build_config(values: Mapping[str, Any]) -> Config:
    """Check a nested dictionary.

    Raises:
        InputError: See ``load``.
    """
    return _build(Config, values)


def _build(model: type[M], values: Mapping[str, Any]) -> M:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise InputError(
            "; ".join(_explain(model, e["loc"], e["type"], e["msg"], e["input"]) for e in errors)
        ) from error


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


def _explain(model: type[Section], loc: tuple[int | str, ...], kind: str, message: str, got: object) -> str:
    key = ".".join(map(str, loc))
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, _keys(model), n=1, cutoff=0.0)
        return f"config: unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
    if not loc:  # of the whole file: nobody wants to read all of it again
        return f"config: {message}"
    return f"config: {key}: {message}" + ("" if kind == "missing" else f", got {got!r}")


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    return [key for key, _, _ in describe_keys(model, prefix)]


def describe_keys(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """List every key of a model with its default and its description."""
    rows = []
    for name, field in model.model_fields.items():
        options = [
            a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type) and issubclass(a, Section)
        ]
        if options and field.annotation in (options[0], options[0] | None):
            rows += describe_keys(options[0], f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else str(field.default)
            rows.append((f"{prefix}{name}", default, field.description or ""))
    return rows
