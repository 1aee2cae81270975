"""The server's settings: one record for the flags of ``python -m serve``, their checks and their help.

Only the token is no flag: it comes from the environment, where ``ps`` does not show it.
"""

import argparse
import ipaddress
import itertools
import re
import ssl
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gati_jax import InputError
from gati_jax.files import resolved
from gati_jax.options import FunctionName, Option, describe_error, describe_options

TOKEN = "GATI_TOKEN"  # noqa: S105 (the name of the variable)
REPOSITORY_TOKEN = "GATI_REPOSITORY_TOKEN"  # noqa: S105
_SECRETS = {"token": TOKEN, "repository_token": REPOSITORY_TOKEN}
MOST_BUNDLES = 32
_EXAMPLE = """\
examples:
  python -m serve --bundle runs/digits/caches/bundle
  curl localhost:8000/v2/models/gati

  python -m serve --bundle digits=runs/digits/caches/bundle --bundle r56=runs/r56/bundle
  GATI_TOKEN=... python -m serve --bundle DIR --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
"""
_NO_DEFAULT = {"required", "unset", "false", "[]"}
_FORMER_LAYERS = {"points": "nearest", "repeats": "exact"}


def _check_name(name: str) -> str:
    if (
        not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name) or name == "stats"
    ):  # /v2/models/stats is all models' statistics
        raise ValueError("expected letters, digits, dots, dashes and underscores, and not 'stats'")
    return name


def _rename_layers(layers: Any) -> Any:  # noqa: ANN401 (checked by the validator that follows)
    return tuple(_FORMER_LAYERS.get(layer, layer) for layer in layers)


def _list_bundles(given: Any) -> Any:  # noqa: ANN401 (checked by the validator that follows)
    return (str(given),) if isinstance(given, str | Path) else given


Name = Annotated[str, AfterValidator(_check_name)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(ge=0, le=86400)]
Patience = Annotated[float, Field(ge=0.1, le=86400)]
Bundles = Annotated[tuple[str, ...], BeforeValidator(_list_bundles)]
Layers = Annotated[tuple[Literal["nearest", "exact", "refit"], ...], BeforeValidator(_rename_layers)]


class Settings(BaseModel):
    """What the server is started with."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bundle: Bundles = Field(description="folder of the bundle; of several, NAME=DIR for each")
    chain: FunctionName | None = Field(
        default=None, description="package.module:function that returns the network, for a bundle of one of your own"
    )
    name: Name = Field(default="gati", description="the model's name in requests, if it is the only one")
    host: str = Field(
        default="127.0.0.1", description="address to listen at; one that other machines can reach needs a token and TLS"
    )
    http_port: Port = Field(default=8000, description="0 takes a free one")
    grpc_port: Port = Field(default=8001, description="0 takes a free one")
    admin_port: Port = Field(
        default=8002, description="health and metrics alone, in a thread of their own; 0 takes a free one"
    )
    max_body: int = Field(default=32 * 2**20, ge=1024, le=2**31 - 1, description="bytes of the largest request")
    max_bodies: int = Field(
        default=256 * 2**20,
        ge=1024,
        le=2**40,
        description="bytes of bodies in memory, of all requests; more are refused (429)",
    )
    capacity: int = Field(
        default=256,
        ge=1,
        le=2**16,
        description="images in flight; more are refused (429). Memory: this times the activations at sites of caches. "
        "Several bundles divide them",
    )
    max_wait_ms: Seconds = Field(
        default=2.0, description="age that counts as much as the whole gain of a step; 0 is first come, first served"
    )
    timeout: Seconds = Field(
        default=60.0, description="seconds that a request may take, from its first byte; its body must be there by then"
    )
    idle_timeout: Patience = Field(default=10.0, description="seconds without a byte after which a body is given up")
    header_bytes: int = Field(
        default=32 * 2**10,
        ge=1024,
        le=2**20,
        description="bytes of a request's path and headers, or of gRPC's metadata",
    )
    header_count: int = Field(default=100, ge=10, le=10_000, description="headers of a request")
    header_timeout: Patience = Field(
        default=10.0, description="seconds from a request's first byte to its last header, and of a TLS handshake"
    )
    keep_alive: Patience = Field(
        default=75.0, description="seconds that a connection may be idle; longer than a load balancer keeps it"
    )
    connections: int = Field(
        default=1024, ge=1, le=2**16, description="connections at once, of HTTP and of gRPC; further ones are closed"
    )
    grpc_streams: int = Field(
        default=1024,
        ge=1,
        le=2**16,
        description="requests at once on a gRPC connection; further ones wait in the client",
    )
    grace: Seconds = Field(
        default=2.0, description="seconds from SIGTERM, when readiness turns 503, to the closing of the sockets"
    )
    drain: Seconds = Field(
        default=20.0,
        description="seconds, after that, to finish the requests in flight; Kubernetes kills 30 s after SIGTERM",
    )
    tls_cert: Path | None = Field(default=None, description="certificate chain, in PEM; together with --tls-key")
    tls_key: Path | None = Field(default=None, description="its private key")
    token: str | None = Field(default=None, repr=False)
    repository_token: str | None = Field(default=None, repr=False)
    no_page: bool = Field(default=False, description="leave out the page at /, and the addresses below /page")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="debug logs every request"
    )
    access_log: bool = Field(
        default=False, description="log a line for each request: client, path, status, bytes and milliseconds"
    )
    overlap: bool = Field(
        default=False,
        description="dispatch the next stage before the last one's hits are known, where that is expected to pay",
    )
    reference: bool = Field(
        default=False, description="run the certified arithmetic even where a tuning was checked against it"
    )
    bfloat16: bool = Field(
        default=False, description="run in bfloat16; only plans that were certified in it on this device answer"
    )
    backend: Literal["xla", "onnxruntime"] | None = Field(
        default=None, description="what runs the network (default: the faster one that the bundle was tuned for)"
    )
    program_cache: Path | Literal["off"] | None = Field(
        default=None,
        description="folder of compiled programs, for the next start (default: gati-jax/programs among the user's "
        "caches); off compiles all at each start",
    )
    ready: Literal["first", "all"] = Field(
        default="first",
        description="when requests are taken: once batches of the smallest size are compiled, or those of every size",
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
        for one, other in itertools.combinations(("http_port", "grpc_port", "admin_port"), 2):
            if (port := getattr(self, one)) == getattr(self, other) != 0:
                raise InputError(f"{_flag(other)}: expected another port than {_flag(one)}'s, got {port} for both")
        self._check_bundles()
        if self.max_bodies < self.max_body:
            raise InputError(f"--max-bodies: expected --max-body ({self.max_body}) at least, got {self.max_bodies}")
        return self

    def _check_bundles(self) -> None:
        pairs = [_split(word) for word in self.bundle]
        names = [name for name, _ in pairs]
        if not 1 <= len(pairs) <= MOST_BUNDLES:
            raise InputError(f"--bundle: expected 1 to {MOST_BUNDLES} of them, got {len(pairs)}")
        if len(pairs) > 1 and not all(names):
            raise InputError(f"--bundle: expected NAME=DIR for each of several, got {self.bundle[names.index('')]}")
        if len(set(names)) < len(names) or "stats" in names:
            raise InputError(f"--bundle: expected names that differ, and not 'stats', got {', '.join(names)}")
        if names[0] and self.name != type(self).model_fields["name"].default:
            raise InputError(f"--name: expected a bundle without a name of its own, got {self.name} and {names[0]}")
        if len(pairs) > 1 and (self.chain is not None or self.overlap):
            raise InputError(f"{'--overlap' if self.overlap else '--chain'}: expected one bundle, got {len(pairs)}")
        if self.capacity < len(pairs):
            raise InputError(f"--capacity: expected {len(pairs)} at least, one for each bundle, got {self.capacity}")

    @model_validator(mode="after")
    def _check_files(self) -> Self:
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
        self._check_versions()
        for key, variable in _SECRETS.items():
            token = getattr(self, key)
            if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
                raise InputError(f"{variable}: expected printable ASCII characters without spaces, got something else")
        return self

    def _check_versions(self) -> None:
        for name in self.bundles if self.adapt else ():
            versions = self.versions(name)
            if versions.exists() and not versions.is_dir():
                raise InputError(f"--adapt-dir: expected a folder, got the file {versions}")
            if any(resolved(versions).is_relative_to(resolved(bundle)) for bundle in self.bundles.values()):
                raise InputError(
                    f"--adapt-dir: expected a folder outside the bundle, which would not load any more, got {versions}"
                )

    @model_validator(mode="after")
    def _check_backend(self) -> Self:
        if self.backend == "onnxruntime" and (self.reference or self.adapt):
            other = "--reference" if self.reference else "--adapt"
            raise InputError(f"--backend: expected xla, for {other} needs the certified arithmetic, got {self.backend}")
        return self

    @model_validator(mode="after")
    def _check_bfloat16(self) -> Self:
        other = "--reference" if self.reference else "--adapt" if self.adapt else ""
        if self.bfloat16 and (other or self.backend == "onnxruntime"):
            raise InputError(f"--bfloat16: expected it without {other or '--backend onnxruntime'}, got both")
        return self

    @property
    def bundles(self) -> dict[str, Path]:
        """The folder of each model, by the name that clients know."""
        return {name or self.name: Path(folder) for name, folder in map(_split, self.bundle)}

    @property
    def places(self) -> int:
        """Images in flight of each bundle: the capacity is divided evenly, so that none can take it all."""
        return self.capacity // len(self.bundle)

    def versions(self, name: str) -> Path:
        """Return the folder where adaptation keeps what it serves of a model."""
        if self.adapt_dir is not None:
            return self.adapt_dir if len(self.bundle) == 1 else self.adapt_dir / name
        bundle = self.bundles[name].absolute()
        return bundle.with_name(f"{bundle.name}-adapt")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def _split(word: str) -> tuple[str, str]:
    """Return the name and the folder of ``NAME=DIR``; no name for a folder alone (``./a=b`` is one)."""
    found = re.fullmatch(r"([A-Za-z0-9_.-]{1,100})=(.+)", word, re.DOTALL)
    return (found[1], found[2]) if found else ("", word)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"arguments: {message} (see --help)")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser; it leaves values as text."""
    prog = sys.argv[0] if sys.argv[0] == "gati-jax serve" else "python -m serve"  # see ``gati_jax.commands``
    examples = _EXAMPLE.replace("python -m serve", prog)
    parser = _Parser(
        prog=prog,
        description="Serve a bundle: the Open Inference Protocol (KServe v2) over HTTP and gRPC.",
        epilog=f"{examples}\nenvironment:\n  {TOKEN}  clients must show this bearer token on everything but health"
        f"\n  {REPOSITORY_TOKEN}  those who load and unload models must show this one instead; without it, none may",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for option in describe_options(Settings):
        if option.key not in _SECRETS:
            parser.add_argument(_flag(option.key), **_how(option))
    return parser


def parse(argv: Sequence[str] | None, environ: Mapping[str, str]) -> Settings:
    """Read the command line.

    Args:
        argv: Its words; None for the process's.
        environ: Where the token is.

    Raises:
        InputError: An option is not what was expected.
    """
    try:
        secrets: dict[str, Any] = {key: environ.get(variable) for key, variable in _SECRETS.items()}
        return Settings(**vars(parser().parse_args(argv)), **secrets)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            raise InputError(describe_error(first)) from None  # of several options together
        name = str(first["loc"][0])
        text = describe_error({**first, "loc": (name,)})
        raise InputError(f"{_flag(name)}{text.removeprefix(name)}") from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _how(option: Option) -> dict[str, Any]:
    """Return how argparse reads an option; it leaves values as text, which the record checks."""
    default = option.default.strip('"')
    text = option.help if default in _NO_DEFAULT else f"{option.help} (default: {default})"
    if option.type == "true|false":
        return {"help": text, "action": "store_true"}
    if option.type.startswith("["):
        metavar = "DIR" if option.key == "bundle" else "NAME"
        return {"help": text, "nargs": "+", "action": "extend", "metavar": metavar, "required": default == "required"}
    return {"help": text, "metavar": option.type, "required": option.default == "required"}
