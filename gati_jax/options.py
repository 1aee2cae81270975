"""Options: one annotated field each, from which come the check, the config key, the command-line flag and its help.

An option is a field ``name: Annotated[type, Field(bounds, description=...)] = default`` of a frozen dataclass or of a
pydantic model. A dataclass of options can be a section of a config as it is.
"""

import dataclasses
import functools
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from .errors import InputError, printable

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def check_function_name(name: str) -> str:
    """Return the name of a function of the user's own, see ``gati_jax.imports``; it is not imported.

    Raises:
        ValueError: It has another form.
    """
    if not _FUNCTION.fullmatch(name):
        raise ValueError("expected package.module:function")
    return name


FunctionName = Annotated[str, AfterValidator(check_function_name)]
_TYPES = {int: "INTEGER", float: "NUMBER", bool: "true|false", str: "TEXT", Path: "PATH"}


class Strict(BaseModel):
    """A frozen record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Option(NamedTuple):
    """What a help text says of one option."""

    key: str
    """With its sections: ``fit.augment.pad``; N stands for a position in a list."""
    section: str
    """What the section is, in a line."""
    type: str
    default: str
    help: str


def check_options(record: Any) -> None:  # noqa: ANN401 (any dataclass)
    """Check the options of a frozen dataclass against their annotations, and set them as validated.

    For ``__post_init__``. Other fields are left alone.

    Args:
        record: The dataclass; a list where a tuple is expected becomes a tuple.

    Raises:
        InputError: Names the option, what was expected and what came.
    """
    model = _model(type(record))
    try:
        checked = model.model_validate({name: getattr(record, name) for name in model.model_fields})
    except ValidationError as error:
        raise InputError("; ".join(describe_error(e) for e in error.errors(include_url=False))) from error
    for name in model.model_fields:
        object.__setattr__(record, name, getattr(checked, name))


def describe_error(error: ErrorDetails) -> str:
    """Return one line for an error of pydantic: the key, what was expected and what came."""
    message = error["msg"].removeprefix("Value error, ")
    message = re.sub(r"^Input should be (?=greater|less)", "expected a number ", message)
    message = re.sub(r"^Input should be ", "expected ", message)
    key = "".join(f"{part}." for part in error["loc"])[:-1]
    if not key:  # of the whole record, which would be too long to repeat
        return message
    return f"{key}: {message}" + ("" if error["type"] == "missing" else f", got {printable(repr(error['input']))}")


def describe_options(record: type, prefix: str = "") -> Iterator[Option]:
    """Yield every option of a record and of its sections.

    Args:
        record: A dataclass or a pydantic model.
        prefix: The section's own key with a dot behind it.
    """
    section = (record.__doc__ or "").partition("\n")[0].replace("``", "")
    deeper: list[tuple[type, str]] = []
    for name, field in _model(record).model_fields.items():
        key = f"{prefix}{field.alias or name}"
        if nested := _record_in(field.annotation):
            deeper.append((nested, f"{key}."))
            continue
        kinds = _kinds_of(field.annotation)
        text = (field.description or "") + (f": {', '.join(kinds)}" if kinds else "")
        yield Option(key, section, _type_of(field.annotation), _default_of(field), text)
        if get_origin(field.annotation) is tuple and (item := _record_in(get_args(field.annotation)[0])):
            deeper.append((item, f"{key}.N."))
    for nested, below in deeper:
        yield from describe_options(nested, below)


@functools.cache
def _model(record: type) -> type[BaseModel]:
    """Return a pydantic model with a record's options."""
    if issubclass(record, BaseModel):
        return record
    hints = typing.get_type_hints(record, include_extras=True)
    options: dict[str, Any] = {
        field.name: (hints[field.name], ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(record)
        if get_origin(hints[field.name]) is Annotated
    }
    return create_model(record.__name__, __config__=ConfigDict(arbitrary_types_allowed=True), **options)


def _is_record(annotation: object) -> bool:
    return isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation))


def _record_in(annotation: Any) -> type | None:  # noqa: ANN401 (a type, or what stands for one)
    """Return the record that a section is made of: ``Record`` or ``Record | None``."""
    if get_origin(annotation) is Annotated:
        return _record_in(get_args(annotation)[0])
    if _is_record(annotation):
        return annotation
    options = [option for option in get_args(annotation) if option is not type(None)]
    optional = len(options) == 1 and type(None) in get_args(annotation)
    return options[0] if optional and _is_record(options[0]) else None


def _type_of(annotation: Any) -> str:  # noqa: ANN401
    """Name a type as a help text does."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _type_of(arguments[0])
    if get_origin(annotation) is Literal:
        return "|".join(map(str, arguments))
    if get_origin(annotation) is tuple:
        return f"[{_type_of(arguments[0])}, ...]"
    if arguments:
        return "|".join(dict.fromkeys(_type_of(option) for option in arguments if option is not type(None)))
    return "TABLE" if _is_record(annotation) else _TYPES.get(annotation, "VALUE")


def _kinds_of(annotation: Any) -> list[str]:  # noqa: ANN401
    """Name the records of a union by their ``kind``, where they have one."""
    if get_origin(annotation) in {Annotated, tuple}:
        return _kinds_of(get_args(annotation)[0])
    kinds = [_model(option).model_fields.get("kind") for option in get_args(annotation) if _is_record(option)]
    return [kind.default for kind in kinds if kind is not None]


def _default_of(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "unset"
    if kind := getattr(field.default, "kind", None):
        return f'{{kind = "{kind}"}}'
    text = TypeAdapter[Any](field.annotation or object).dump_json(field.default, exclude_defaults=True).decode()
    return re.sub(r'"(\w+)":', r"\1 = ", text)  # as TOML has it
