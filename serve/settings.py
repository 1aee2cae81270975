"""The command line of ``python -m serve``; only the token comes from the environment, where ``ps`` does not show it."""

import argparse
import dataclasses
import ipaddress
import math
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from gati_jax import InputError

TOKEN = "GATI_TOKEN"  # noqa: S105 (the name of the variable)
_EXAMPLE = """\
examples:
  python -m serve --bundle runs/digits/caches/bundle
  curl localhost:8000/v2/models/gati

  GATI_TOKEN=... python -m serve --bundle DIR --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
"""
_LEVELS = ("debug", "info", "warning", "error")
_DIGITS = 12
_DAY = 86400
_LAYERS = ("exact", "nearest", "refit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the server was told."""

    bundle: Path
    name: str = "gati"
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    max_body: int = 32 * 2**20
    """Bytes of a request."""
    capacity: int = 256
    """Images on their way at once; more are refused."""
    max_wait_ms: float = 2.0
    timeout: float = 60.0
    """Seconds that a request may take."""
    grace: float = 2.0
    """Seconds between readiness turning 503 and the sockets closing."""
    drain: float = 30.0
    """Seconds to finish what was admitted."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token: str | None = None
    log_level: str = "info"
    overlap: bool = False
    """Whether to overlap lookups with the next span where that is expected to pay."""
    reference: bool = False
    """Whether to run the arithmetic that was certified even where the bundle has been tuned for this device."""
    json: bool = False
    adapt: bool = False
    """Whether to follow the traffic, see ``serve.adaptive``."""
    adapt_dir: Path | None = None
    """Of versions; None: beside the bundle."""
    adapt_share: float = 0.1
    """Of the time, for trials and refits."""
    adapt_epsilon: float | None = None
    """What to promise; None: as certified."""
    adapt_without: tuple[str, ...] = ()
    """Layers to leave out."""

    def __post_init__(self) -> None:
        """Check what belongs together.

        Raises:
            InputError: It does not.
        """
        if self.http_port == self.grpc_port != 0:
            raise InputError(f"--grpc-port: expected another port than --http-port's, got {self.grpc_port} for both")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert: expected together with --tls-key, got one of them")
        if self.tls_cert is not None and self.tls_key is not None:
            try:
                ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(self.tls_cert, self.tls_key)
            except (OSError, ssl.SSLError) as error:
                raise InputError(f"--tls-cert: expected a certificate and its key in PEM files, got {error}") from None
        for name in ("adapt_dir", "adapt_share", "adapt_epsilon", "adapt_without"):
            if not self.adapt and getattr(self, name) != _DEFAULTS[name]:
                raise InputError(f"--{name.replace('_', '-')}: expected together with --adapt, got it alone")
        token = self.token
        if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
            raise InputError(f"{TOKEN}: expected printable ASCII characters without spaces, got something else")

    @property
    def versions(self) -> Path:
        """Where adaptation keeps what it serves."""
        bundle = self.bundle.absolute()
        return self.adapt_dir or bundle.with_name(f"{bundle.name}-adapt")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < _DIGITS and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text}")
        return int(text)

    return read


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _DAY:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to {_DAY}, got {text}")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text}")
    return value


def _name(text: str) -> str:
    if (
        not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", text) or text == "stats"
    ):  # /v2/models/stats is all models' statistics
        raise argparse.ArgumentTypeError(
            f"expected letters, digits, dots, dashes and underscores, and not 'stats', got {text}"
        )
    return text


def _level(text: str) -> str:
    if text not in _LEVELS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(_LEVELS)}, got {text}")
    return text


_port = _whole(0, 65535)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Settings)}
_OPTIONS: tuple[tuple[str, str, Callable[[str], object], str], ...] = (
    ("name", "NAME", _name, "what clients call the model"),
    ("host", "HOST", str, "address to listen at; others than this machine's own need a token and TLS to be safe"),
    ("http_port", "N", _port, "0 takes a free one"),
    ("grpc_port", "N", _port, "0 takes a free one"),
    ("max_body", "BYTES", _whole(1024, 2**31 - 1), "largest request"),
    ("capacity", "N", _whole(1, 2**16), "images on their way at once; more are refused"),
    ("max_wait_ms", "MS", _seconds, "waiting that counts as much as the whole gain of a step"),
    ("timeout", "S", _seconds, "what a request may take"),
    ("grace", "S", _seconds, "between SIGTERM, when readiness turns 503, and the closing of the sockets"),
    ("drain", "S", _seconds, "to finish what was admitted, after that"),
    ("tls_cert", "FILE", Path, "certificate chain"),
    ("tls_key", "FILE", Path, "its private key"),
    ("adapt_dir", "DIR", Path, "of adaptation's versions (default: BUNDLE-adapt, beside the bundle)"),
    ("adapt_share", "S", _share, "of the time, for trials and refits"),
    ("adapt_epsilon", "E", _share, "the disagreement to promise (default: as certified)"),
    ("log_level", "LEVEL", _level, f"{', '.join(_LEVELS)}; debug tells of every request"),
)


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
        InputError: Something is not what was expected.
    """
    p = _Parser(
        prog="python -m serve",
        description="Serve a bundle: the Open Inference Protocol (KServe v2) over HTTP and gRPC.",
        epilog=f"{_EXAMPLE}\nenvironment:\n  {TOKEN}  clients must show this bearer token on everything but health",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    p.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="folder written by train.caches")
    for name, metavar, kind, text in _OPTIONS:
        default = _DEFAULTS[name]
        told = text if default is None else f"{text} (default: {default})"
        p.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, default=default, help=told)
    p.add_argument(
        "--overlap", action="store_true", help="run on before it is known who leaves, where that is expected to pay"
    )
    p.add_argument("--reference", action="store_true", help="the certified arithmetic, even where the bundle is tuned")
    p.add_argument("--adapt", action="store_true", help="follow the traffic: watch, close, try again, refit")
    p.add_argument(
        "--adapt-without", nargs="+", choices=_LAYERS, default=(), metavar="LAYER", help=f"some of {', '.join(_LAYERS)}"
    )
    p.add_argument("--json", action="store_true", help="print the addresses as JSON on standard output")
    arguments = p.parse_args(argv)
    arguments.adapt_without = tuple(arguments.adapt_without)
    return Settings(**vars(arguments), token=environ.get(TOKEN))
