"""The server's settings: one record for the flags of ``python -m serve``, their checks and their help.

Only the token is no flag: it comes from the environment, where ``ps`` does not show it.
"""

import argparse
import ipaddress
import re
import ssl
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from gati_jax import InputError

TOKEN = "GATI_TOKEN"  # noqa: S105 (the name of the variable)
_EXAMPLE = """\
examples:
  python -m serve --bundle runs/digits/caches/bundle
  curl localhost:8000/v2/models/gati

  GATI_TOKEN=... python -m serve --bundle DIR --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
"""
_METAVARS = {int: "N", float: "X", Path: "PATH"}
_FORMER_LAYERS = {"points": "nearest", "repeats": "exact"}


def _check_name(name: str) -> str:
    if (
        not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name) or name == "stats"
    ):  # /v2/models/stats is all models' statistics
        raise ValueError("expected letters, digits, dots, dashes and underscores, and not 'stats'")
    return name


def _rename_layers(layers: Any) -> Any:  # noqa: ANN401 (checked by the validator that follows)
    return tuple(_FORMER_LAYERS.get(layer, layer) for layer in layers)


Name = Annotated[str, AfterValidator(_check_name)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(ge=0, le=86400)]
Layers = Annotated[tuple[Literal["nearest", "exact", "refit"], ...], BeforeValidator(_rename_layers)]


class Settings(BaseModel):
    """What the server is started with."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bundle: Path = Field(description="folder written by train.caches")
    name: Name = Field(default="gati", description="the model's name in requests")
    host: str = Field(
        default="127.0.0.1", description="address to listen at; one that other machines can reach needs a token and TLS"
    )
    http_port: Port = Field(default=8000, description="0 takes a free one")
    grpc_port: Port = Field(default=8001, description="0 takes a free one")
    max_body: int = Field(default=32 * 2**20, ge=1024, le=2**31 - 1, description="bytes of the largest request")
    capacity: int = Field(
        default=256,
        ge=1,
        le=2**16,
        description="images in flight; more are refused (429). Memory: this times the activations at sites of caches",
    )
    max_wait_ms: Seconds = Field(
        default=2.0, description="age that counts as much as the whole gain of a step; 0 is first come, first served"
    )
    timeout: Seconds = Field(default=60.0, description="seconds that a request may take, and its body to arrive")
    grace: Seconds = Field(
        default=2.0, description="seconds from SIGTERM, when readiness turns 503, to the closing of the sockets"
    )
    drain: Seconds = Field(default=30.0, description="seconds, after that, to finish the requests in flight")
    tls_cert: Path | None = Field(default=None, description="certificate chain, in PEM; together with --tls-key")
    tls_key: Path | None = Field(default=None, description="its private key")
    token: str | None = Field(default=None, repr=False)
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="debug, info, warning or error; debug logs every request"
    )
    overlap: bool = Field(
        default=False,
        description="dispatch the next stage before the last one's hits are known, where that is expected to pay",
    )
    reference: bool = Field(
        default=False, description="run the certified arithmetic even where a tuning was checked against it"
    )
    json_output: bool = Field(default=False, alias="json", description="print the addresses as JSON on standard output")
    adapt: bool = Field(default=False, description="follow the traffic: watch, close, try again, refit")
    adapt_dir: Path | None = Field(default=None, description="folder of adaptation's versions (default: BUNDLE-adapt)")
    adapt_share: float = Field(default=0.1, gt=0, lt=1, description="share of the time for trials and refits")
    adapt_epsilon: float | None = Field(
        default=None, gt=0, lt=1, description="the disagreement to promise (default: as certified)"
    )
    adapt_without: Layers = Field(default=(), description="parts to leave out: nearest, exact, refit")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.http_port == self.grpc_port != 0:
            raise InputError(f"--grpc-port: expected another port than --http-port's, got {self.grpc_port} for both")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert: expected together with --tls-key, got one of them")
        if self.tls_cert is not None and self.tls_key is not None:
            try:
                ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.tls_cert, self.tls_key)
            except (OSError, ssl.SSLError) as error:
                raise InputError(f"--tls-cert: expected a certificate and its key in PEM files, got {error}") from None
        for name, field in type(self).model_fields.items():
            if name.startswith("adapt_") and not self.adapt and getattr(self, name) != field.default:
                raise InputError(f"{_flag(name)}: expected together with --adapt, got it alone")
        token = self.token
        if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
            raise InputError(f"{TOKEN}: expected printable ASCII characters without spaces, got something else")
        return self

    @property
    def versions(self) -> Path:
        """The folder where adaptation keeps what it serves."""
        bundle = self.bundle.absolute()
        return self.adapt_dir or bundle.with_name(f"{bundle.name}-adapt")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"arguments: {message} (see --help)")


def parse(argv: Sequence[str] | None, environ: Mapping[str, str]) -> Settings:
    """Read the command line.

    Args:
        argv: Its words; None for the process's.
        environ: Where the token is.

    Raises:
        InputError: An option is not what was expected.
    """
    parser = _Parser(
        prog="python -m serve",
        description="Serve a bundle: the Open Inference Protocol (KServe v2) over HTTP and gRPC.",
        epilog=f"{_EXAMPLE}\nenvironment:\n  {TOKEN}  clients must show this bearer token on everything but health",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in _options().items():
        parser.add_argument(_flag(name), help=_help(field), **_how(field))
    try:
        return Settings(**vars(parser.parse_args(argv)), token=environ.get(TOKEN))
    except ValidationError as error:
        raise InputError(_sentence(error)) from None


def _options() -> dict[str, FieldInfo]:
    """Return every field that is a flag, by the name that its flag has."""
    return {field.alias or name: field for name, field in Settings.model_fields.items() if name != "token"}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _type_of(field: FieldInfo) -> Any:  # noqa: ANN401 (a type, or what typing has for one)
    """Return the type of a value that is given; an optional field is left out to say None."""
    annotation = field.annotation
    return get_args(annotation)[0] if get_origin(annotation) is types.UnionType else annotation


def _how(field: FieldInfo) -> dict[str, Any]:
    """Return how argparse reads an option; it leaves values as text, which the record checks."""
    kind = _type_of(field)
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is tuple:
        return {"nargs": "+", "metavar": "NAME"}
    return {"metavar": _METAVARS.get(kind, "NAME"), "required": field.is_required()}


def _default(field: FieldInfo) -> str:
    return "" if field.is_required() or field.default in {None, False, ()} else str(field.default)


def _help(field: FieldInfo) -> str:
    default = _default(field)
    return f"{field.description} (default: {default})" if default else str(field.description)


def _sentence(error: ValidationError) -> str:
    """Say which option is not what was expected, from the field's type and bounds."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return str(cause)  # of several options together
    name = str(first["loc"][0])
    expected = str(cause) if cause else f"expected {_expected(_options()[name])}"
    return f"{_flag(name)}: {expected}, got {str(first['input'])[:100]}"


def _expected(field: FieldInfo) -> str:
    kind = _type_of(field)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"some of {', '.join(get_args(get_args(kind)[0]))}"
    bounds = {
        key: getattr(part, key) for part in field.metadata for key in ("ge", "gt", "le", "lt") if hasattr(part, key)
    }
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    between = f"from {low} to {high}" if "ge" in bounds else f"between {low} and {high}"
    return f"{'a whole number' if kind is int else 'a number'} {between}"
