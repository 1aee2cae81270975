"""The options of ``python -m serve.ray``: its own, and those of the server for each replica."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gati_jax import InputError
from gati_jax.options import describe_error, describe_options

from ..settings import Settings
from ..settings import parse as parse_server

_EXAMPLE = """\
examples:
  python -m serve.ray --bundle runs/digits/caches/bundle --replicas 2
  python -m serve.ray --bundle runs/digits/caches/bundle --replicas 2 --adapt --adapt-without refit
  python -m serve.ray --bundle /shared/bundle --host 0.0.0.0 --replicas 4 --max-replicas 16 --address auto

All other options are those of python -m serve (see its --help), and hold for each replica: --capacity is of one."""
_ALONE = ("tls_cert", "json_output")
Replicas = Annotated[int, Field(ge=1, le=10_000)]


class RayOptions(BaseModel):
    """How many replicas there are, and where."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    replicas: Replicas = Field(default=1, description="engines, each in a process of its own; the least of them")
    max_replicas: Replicas | None = Field(
        default=None, description="as many where requests queue (default: always the same number)"
    )
    target_requests: float = Field(
        default=8.0, gt=0, le=2**16, description="requests in a replica above which another one is started"
    )
    cpus: float = Field(default=1.0, gt=0, le=4096, description="processors that the cluster reserves for a replica")
    gpus: float = Field(default=0.0, ge=0, le=64, description="GPUs that the cluster reserves for a replica")
    address: str | None = Field(
        default=None, description="of a running cluster, or auto (default: a cluster of this machine alone)"
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise InputError(f"--max-replicas: expected --replicas ({self.replicas}) at least, got {self.max_replicas}")
        return self

    @property
    def most(self) -> int:
        """Replicas at once, with one that is being replaced."""
        return (self.max_replicas or self.replicas) + 1


class Parsed(NamedTuple):
    """A command line."""

    ray: RayOptions
    server: Settings


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options that ``python -m serve`` does not have."""
    made = argparse.ArgumentParser(
        prog="python -m serve.ray",
        description="Serve a bundle by replicas on a Ray cluster, behind one address (HTTP).",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for option in describe_options(RayOptions):
        default = "" if option.default == "unset" else f" (default: {option.default})"
        flag = f"--{option.key.replace('_', '-')}"
        made.add_argument(flag, metavar=option.type.upper(), help=f"{option.help}{default}")
    return made


def parse(argv: Sequence[str] | None, environ: Mapping[str, str]) -> Parsed:
    """Read a command line.

    Raises:
        InputError: An option is not what was expected, or replicas cannot have it.
    """
    own, rest = parser().parse_known_args(argv)
    try:
        options = RayOptions(**vars(own))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            raise InputError(describe_error(first)) from None
        name = str(first["loc"][0])
        text = describe_error({**first, "loc": (name,)})
        raise InputError(f"--{name.replace('_', '-')}{text.removeprefix(name)}") from None
    server = parse_server(rest, environ)
    for name in _ALONE:
        if getattr(server, name) != Settings.model_fields[name].default:
            flag = name.removesuffix("_output").replace("_", "-")
            raise InputError(f"--{flag}: expected a server of its own (python -m serve), got it for replicas")
    _check_adapt(server)
    return Parsed(options, server)


def _check_adapt(server: Settings) -> None:
    if not server.adapt:
        return
    if "refit" not in server.adapt_without:
        raise InputError("--adapt: expected it together with --adapt-without refit for replicas, got it without")
    if len(server.bundle) > 1 or server.overlap:
        got = "--overlap" if server.overlap else f"{len(server.bundle)} of them"
        raise InputError(f"--adapt: expected one bundle for replicas, and no --overlap, got {got}")
