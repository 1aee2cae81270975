"""Requests that no client would send, made from a seed: HTTP/1.1 as bytes, and gRPC as the frames of HTTP/2.

Both begin with a valid request, in which parts are replaced by others that a grammar allows there or nearly allows;
then bytes are changed. So most of them get past the first check that could refuse them, and fail at a later one.
"""

import base64
import gzip
import json
import math
import random
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from serve.protocol import inference_pb2 as pb

Random = random.Random
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
_PREFIX, _MORE = 127, 128  # of HPACK's integers
END_STREAM, END_HEADERS, PADDED = 1, 4, 8
_SERVICES = {
    "inference.GRPCInferenceService": (
        *("ModelInfer", "ModelStreamInfer", "ServerLive", "ServerReady", "ServerMetadata"),
        *("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex"),
    ),
    "grpc.health.v1.Health": ("Check", "Watch"),
    "grpc.reflection.v1.ServerReflection": ("ServerReflectionInfo",),
}


class Model(NamedTuple):
    """The model that requests ask for."""

    name: str
    shape: tuple[int, ...]
    """Of one uint8 image."""


def _chance(rng: Random, share: float) -> bool:
    return rng.random() < share


def http_request(rng: Random, model: Model) -> bytes:
    """Return the bytes of one connection: a request, sometimes two."""
    made = _one_http(rng, model)
    if _chance(rng, 0.1):
        made += _one_http(rng, model)
    return _damaged(rng, made) if _chance(rng, 0.2) else made


def _one_http(rng: Random, model: Model) -> bytes:
    infer = f"/v2/models/{model.name}/infer"
    body, headers = _body(rng, model)
    method = _mostly(
        rng, "POST", ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW", "post", "G\0", "")
    )
    target = _mostly(rng, infer, (*_pages(model.name), *_odd_targets(infer), "/" + "x" * rng.choice((300, 40_000))))
    version = _mostly(rng, "HTTP/1.1", ("HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.1 ", "HTTP/9", "", "\t"), 0.1)
    if _chance(rng, 0.15):
        body, chunked = _chunked(rng, body), True
        headers.append(
            ("Transfer-Encoding", _mostly(rng, "chunked", ("gzip, chunked", "xchunked", "identity", ""), 0.3))
        )
    else:
        chunked = False
    if not chunked or _chance(rng, 0.1):
        n = len(body)
        lengths = (str(n + 1), str(max(0, n - 1)), "-1", "1e3", f"+{n}", f"{n}, {n}", str(2**63), "9" * 40, "", "0x10")
        headers.append(("Content-Length", _mostly(rng, str(n), lengths, 0.1)))
    headers += [_odd_header(rng) for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 2, rng.choice((3, 20, 150)))))]
    rng.shuffle(headers)
    end = _mostly(rng, "\r\n", ("\n", "\r", "\r\n "), 0.03)
    lines = [f"{method} {target} {version}", "Host: localhost", *(f"{name}: {value}" for name, value in headers)]
    return (end.join(lines) + end * 2).encode("utf-8", "surrogateescape") + body


def _pages(name: str) -> tuple[str, ...]:
    model = f"/v2/models/{name}"
    ends = ("", "/ready", "/config", "/stats", "/versions/1/infer", "/versions/x", "/infer?a=b", "/infer/", "/generate")
    pages = (
        "/",
        "/v2",
        "/v2/",
        "/v2/health/live",
        "/v2/health/ready",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/v2/models/stats",
    )
    return (*pages, *(model + end for end in ends), "/v2/repository/index")


def _odd_targets(infer: str) -> tuple[str, ...]:
    odd = (
        "*",
        "//",
        "/..",
        "/v2/../v2",
        "/%2e%2e/%2fetc/passwd",
        "/%00",
        "/%zz",
        "/\udcff\udcfe",
        "/v2/models/%F0%9F",
        "?",
    )
    return (
        *odd,
        f"http://evil{infer}",
        f"//evil{infer}",
        f"{infer}#x",
        infer.upper(),
        infer.replace("/", "%2F"),
        "evil:80",
    )


def _odd_header(rng: Random) -> tuple[str, str]:
    long = "x" * rng.choice((10, 200, 5000, 40_000))
    return rng.choice(
        (
            ("Expect", "100-continue"),
            ("Connection", rng.choice(("close", "keep-alive", "upgrade", "upgrade, http2-settings", ","))),
            ("Upgrade", rng.choice(("websocket", "h2c", "x"))),
            ("Content-Encoding", rng.choice(("gzip", "deflate", "br", "gzip, gzip", "identity", long))),
            ("Inference-Header-Content-Length", rng.choice(("0", "1", "-1", "99999", "1.5", "", "9" * 30, "\udcb2"))),
            ("Content-Type", rng.choice(("application/json", "text/plain", long))),
            ("Authorization", rng.choice(("Bearer x", "Basic eDp5", "Bearer", long))),
            ("X-Request-Id", rng.choice(("a", long, "\udcff", "a\tb"))),
            ("traceparent", rng.choice(("00-" + "1" * 32 + "-" + "2" * 16 + "-01", "00-x", long))),
            ("Accept", rng.choice(("application/openmetrics-text;version=x", "*/*", long))),
            ("Host", rng.choice(("", "evil", "a" * 300))),
            (rng.choice(("", "a b", "\udce9", "a\0b", ":", long)), "x"),
            ("a", rng.choice(("\0", "\r", "b\r\n c", "b\n\tc", "\x7f", long))),
        )
    )


def _body(rng: Random, model: Model) -> tuple[bytes, list[tuple[str, str]]]:
    """Return a body and the headers that describe it; half are valid, but for what is changed afterwards."""
    count = rng.choice((1, 1, 1, 2, 5))
    size = count * math.prod(model.shape)
    tensor: dict[str, Any] = {"name": "images", "datatype": "UINT8", "shape": [count, *model.shape]}
    request: dict[str, Any] = {"inputs": [tensor]}
    if _chance(rng, 0.3):
        request |= {"parameters": {rng.choice(("epsilon", "deadline_ms", "timeout", "x")): _json(rng, 1)}}
    if _chance(rng, 0.3):
        outputs = ("class_index", "logits", "probabilities", "class_name", "score", "exit", "x")
        request |= {"outputs": [{"name": rng.choice(outputs), "parameters": {"binary_data": _chance(rng, 0.5)}}]}
    binary = _chance(rng, 0.5)
    tensor |= (
        {"parameters": {"binary_data_size": size}} if binary else {"data": [rng.randrange(17) for _ in range(size)]}
    )
    if _chance(rng, 0.3):
        _replace(rng, request)
    body, headers = json.dumps(request).encode("utf-8", "surrogatepass"), list[tuple[str, str]]()
    if binary:
        headers.append(("Inference-Header-Content-Length", str(len(body) + rng.choice((0, 0, 0, 0, 1, -1)))))
        body += rng.randbytes(max(0, size + rng.choice((0, 0, 0, 0, 1, -1, 1000))))
    if _chance(rng, 0.1):
        body, encoding = rng.choice(((gzip.compress(body, mtime=0), "gzip"), (zlib.compress(body), "deflate")))
        headers.append(("Content-Encoding", encoding))
    elif _chance(rng, 0.05):
        body = rng.choice(
            (b"", b"{}", b"null", b"[" * 5000, rng.randbytes(200), b'{"inputs": [' + b"{}," * 2000, b"\xff\xfe{}")
        )
    return body, headers


def _replace(rng: Random, request: dict[str, Any]) -> None:
    """Put any JSON in the place of any, in place."""
    spot: Any = request
    while True:
        key = rng.choice(list(spot)) if isinstance(spot, dict) else rng.randrange(len(spot))
        inner = spot[key]
        if not isinstance(inner, dict | list) or not inner or _chance(rng, 0.3):
            break
        spot = inner
    spot[key] = _json(rng, 3)


def _json(rng: Random, depth: int) -> Any:  # noqa: ANN401 (JSON)
    numbers = (0, -1, 1, 0.05, 1e308, -0.0, 2**31, 2**63, 2**64, -(2**70), 1e-400, float("inf"), float("nan"), 10**400)
    texts = ("", "images", "UINT8", "FP32", "BYTES", "é", "\0", "\ud800", "x" * 1000, "true")
    if not depth or _chance(rng, 0.6):
        return rng.choice((rng.choice(numbers), rng.choice(texts), None, False))
    inner = [_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    return inner if _chance(rng, 0.5) else {rng.choice(texts): one for one in inner}


def _chunked(rng: Random, body: bytes) -> bytes:
    parts, at = list[bytes](), 0
    while at < len(body):
        part = body[at : at + rng.choice((1, 7, 100, 5000))]
        at += len(part)
        size = _mostly(
            rng, f"{len(part):x}", (f"{len(part) + 1:x}", "-1", "", "f" * 17, f"{len(part):x};a=b", "0"), 0.02
        )
        parts.append(size.encode() + b"\r\n" + part + b"\r\n")
    parts.append(
        rng.choice(
            (b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\na: b\r\n\r\n", b"0\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"", b"0")
        )
    )
    return b"".join(parts)


def _mostly(rng: Random, usual: str, others: Sequence[str], share: float = 0.12) -> str:
    return rng.choice(others) if _chance(rng, share) else usual


def _damaged(rng: Random, data: bytes) -> bytes:
    """Change a few bytes: flip, insert, remove, repeat or cut."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if not made:
            break
        at, length = rng.randrange(len(made)), rng.choice((1, 1, 4, 50))
        kind = rng.choice(("flip", "insert", "remove", "repeat", "cut"))
        if kind == "flip":
            made[at] ^= 1 << rng.randrange(8)
        elif kind == "insert":
            made[at:at] = rng.randbytes(length)
        elif kind == "remove":
            del made[at : at + length]
        elif kind == "repeat":
            made[at:at] = made[at : at + length]
        elif _chance(rng, 0.3):
            del made[at:]
    return bytes(made)


def grpc_connection(rng: Random, model: Model) -> bytes:
    """Return the bytes of one connection: the preface, settings, and the frames of one or two calls."""
    frames = [frame(SETTINGS, 0, 0, _settings(rng))]
    for number in range(rng.choice((1, 1, 2))):
        frames += _call(rng, model, stream=2 * number + 1)
    frames += [_odd_frame(rng) for _ in range(rng.choice((0, 0, 1, 3)))]
    if _chance(rng, 0.1):
        first, rest = frames[:1], frames[1:]
        rng.shuffle(rest)
        frames = first + rest
    if _chance(rng, 0.1):
        frames.insert(rng.randrange(len(frames)), rng.choice(frames))
    if _chance(rng, 0.1):
        del frames[rng.randrange(len(frames))]
    made = b"".join(frames)
    if _chance(rng, 0.2):
        made = _damaged(rng, made)
    return (PREFACE if _chance(rng, 0.98) else _damaged(rng, PREFACE)) + made


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return a frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind & 255, flags & 255)) + struct.pack(">I", stream) + payload


def literal(name: str, value: str) -> bytes:
    """Return a header field as HPACK's literal without indexing and without Huffman's code."""
    parts = [text.encode("utf-8", "surrogateescape") for text in (name, value)]
    return b"\0" + b"".join(_integer(len(part)) + part for part in parts)


def _integer(value: int) -> bytes:
    """Return an integer with a prefix of seven bits, the first bit being 0."""
    if value < _PREFIX:
        return bytes((value,))
    made, value = bytearray((_PREFIX,)), value - _PREFIX
    while value >= _MORE:
        made.append(value % _MORE | _MORE)
        value //= _MORE
    return bytes((*made, value))


def _call(rng: Random, model: Model, stream: int) -> list[bytes]:
    service = _mostly(rng, "inference.GRPCInferenceService", tuple(_SERVICES), 0.3)
    method = _mostly(rng, _SERVICES[service][0], _SERVICES[service], 0.4)
    path = _mostly(rng, f"/{service}/{method}", ("", "/", "x", f"/{service}", f"/{service}/", "/" + "x" * 9000), 0.05)
    fields = [(":method", _mostly(rng, "POST", ("GET", "PUT", ""), 0.03)), (":scheme", "http"), (":path", path)]
    fields += [(":authority", "localhost"), ("te", _mostly(rng, "trailers", ("", "x"), 0.03))]
    fields.append(("content-type", _mostly(rng, "application/grpc", ("application/grpc+json", "text/plain", ""), 0.05)))
    fields += [_odd_field(rng) for _ in range(rng.choice((0, 0, 1, 2, rng.choice((3, 100)))))]
    if _chance(rng, 0.05):
        rng.shuffle(fields)
    block = b"".join(literal(name, value) for name, value in fields)
    frames = list[bytes]()
    if _chance(rng, 0.1):
        cut = rng.randrange(len(block))
        frames += [frame(HEADERS, 0, stream, block[:cut]), frame(CONTINUATION, END_HEADERS, stream, block[cut:])]
    else:
        frames.append(frame(HEADERS, END_HEADERS, stream, block))
    data = b"".join(_message(rng, model) for _ in range(rng.choice((1, 1, 1, 0, 2, 5))))
    parts = [data] if _chance(rng, 0.8) else [data[: len(data) // 2], data[len(data) // 2 :]]
    for i, part in enumerate(parts):
        ends = END_STREAM if i == len(parts) - 1 and _chance(rng, 0.95) else 0
        if _chance(rng, 0.05):
            frames.append(frame(DATA, ends | PADDED, stream, bytes((rng.choice((3, 255)),)) + part + bytes(3)))
        else:
            frames.append(frame(DATA, ends, stream, part))
    if _chance(rng, 0.1):
        frames.append(frame(RST, 0, stream, struct.pack(">I", rng.choice((0, 8, 99)))))
    return frames


def _odd_field(rng: Random) -> tuple[str, str]:
    long = "x" * rng.choice((10, 500, 20_000))
    return rng.choice(
        (
            ("grpc-timeout", rng.choice(("1S", "0n", "99999999H", "-1S", "1", "", "x", "10m"))),
            ("grpc-encoding", rng.choice(("gzip", "deflate", "identity", "br"))),
            ("authorization", rng.choice(("Bearer x", long))),
            ("x-request-id", rng.choice(("a", long, "\udcff"))),
            ("traceparent", rng.choice(("00-x", long))),
            ("a-bin", rng.choice((base64.b64encode(b"x").decode(), "!", "="))),
            (rng.choice(("A", ":x", "", "a b", "\udce9", long)), "x"),
            ("content-length", rng.choice(("0", "-1", "5"))),
        )
    )


def _message(rng: Random, model: Model) -> bytes:
    """Return a message with its prefix."""
    count, kind = rng.choice((1, 1, 3)), rng.randrange(8)
    request = pb.ModelInferRequest(model_name=_mostly(rng, model.name, ("", "x", "x" * 5000), 0.1))
    shape = (
        [count, *model.shape]
        if _chance(rng, 0.85)
        else [rng.choice((0, -1, 2**62, 3)) for _ in range(rng.randrange(9))]
    )
    tensor = request.inputs.add(name=_mostly(rng, "images", ("", "x"), 0.05), datatype="UINT8", shape=shape)
    tensor.datatype = _mostly(rng, "UINT8", ("FP32", "BYTES", "", "x"), 0.1)
    if _chance(rng, 0.7):
        request.raw_input_contents.append(
            rng.randbytes(max(0, count * math.prod(model.shape) + rng.choice((0, 0, 0, 0, 1, -1))))
        )
    else:
        tensor.contents.uint_contents.extend(rng.randrange(17) for _ in range(count * math.prod(model.shape)))
    if _chance(rng, 0.2):
        request.parameters[rng.choice(("epsilon", "deadline_ms", "x"))].double_param = rng.choice(
            (0.05, -1, float("nan"), 1e300)
        )
    if _chance(rng, 0.2):
        request.outputs.add(name=rng.choice(("logits", "class_name", "x")))
    body = request.SerializeToString()
    if kind == 0:
        body = _damaged(rng, body)
    elif kind == 1 and _chance(rng, 0.5):
        body = rng.choice((b"", rng.randbytes(100), b"\x0a" * 3000, bytes(100_000)))
    packed, compressed = (gzip.compress(body, mtime=0), 1) if _chance(rng, 0.05) else (body, 0)
    flag = compressed if _chance(rng, 0.97) else rng.choice((1, 2, 255))
    length = len(packed) if _chance(rng, 0.95) else rng.choice((0, len(packed) + 1, 2**31, 2**32 - 1))
    return bytes((flag,)) + struct.pack(">I", length) + packed


def _settings(rng: Random) -> bytes:
    if _chance(rng, 0.8):
        return b""
    pairs = [
        (rng.choice((1, 2, 3, 4, 5, 6, 9)), rng.choice((0, 1, 100, 2**14, 2**24, 2**31, 2**32 - 1)))
        for _ in range(rng.randrange(5))
    ]
    return b"".join(struct.pack(">HI", *pair) for pair in pairs)


def _odd_frame(rng: Random) -> bytes:
    stream = rng.choice((0, 1, 2, 3, 99, 2**31 - 1))
    return rng.choice(
        (
            frame(PING, rng.choice((0, 1)), stream, bytes(rng.choice((8, 8, 7)))),
            frame(WINDOW, 0, stream, struct.pack(">I", rng.choice((0, 1, 2**31 - 1)))),
            frame(PRIORITY, 0, stream, bytes(rng.choice((5, 4)))),
            frame(GOAWAY, 0, stream, bytes(rng.choice((8, 30)))),
            frame(SETTINGS, rng.choice((0, 1)), stream, _settings(rng)),
            frame(PUSH, END_HEADERS, stream, bytes(10)),
            frame(CONTINUATION, END_HEADERS, stream, literal("a", "b")),
            frame(rng.randrange(10, 256), rng.randrange(256), stream, rng.randbytes(rng.randrange(50))),
            frame(DATA, 0, stream, bytes(rng.choice((0, 5, 16_385)))),
        )
    )
