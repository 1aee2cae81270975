"""Send a server requests that no client would send, and see whether it goes on as before.

Three kinds take turns: requests made up from the OpenAPI description (schemathesis), HTTP/1.1 as bytes, and gRPC as
frames (both ``benchmarks.grammar``), each of the latter on a connection of its own. All come from the seed: request N
is the same whatever was sent before it. After each batch the server must answer live, give right answers over HTTP and
gRPC, have counted no 5xx and logged no error; the batch in which that is not so is named, so that ``--first`` and
``--requests`` can repeat it.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import grpc
import hypothesis
import numpy as np
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.core.result import Ok

import gati_jax
from gati_jax import InputError, data
from serve.protocol import inference_pb2 as pb
from train import cli
from train.config import build_config
from train.results import Record

from .grammar import END_STREAM, GOAWAY, HEADERS, RST, Model, Random, grpc_connection, http_request
from .process import INFER, LIVE, METRICS, MODEL, Server, serving

_log = logging.getLogger("benchmarks.fuzz")
EXAMPLE = "python -m benchmarks.fuzz --bundle runs/digits/caches/bundle --requests 100000 --seed 0"
BATCH = 2000
SCHEMA_SHARE, GRPC_SHARE = 0.1, 0.3
AT_ONCE = 200  # connections
SILENCE, SILENCE_AFTER = 2.0, 0.05  # seconds without a byte after which one is given up, and after an answer
OK = 200
HEAD = 9  # bytes of a frame's
_COUNTED = re.compile(r"^gati_requests_total\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Fuzz(Record):
    """What became of the requests."""

    seed: int
    first: int
    requests: int
    seconds: float
    kinds: dict[str, int]
    """Requests by kind."""
    counted: dict[str, int]
    """What the server counted, by protocol and HTTP's status; requests that are none are not among them."""
    problems: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    arguments = parser().parse_args(argv)
    bundle = gati_jax.load_bundle(arguments.bundle)
    config = build_config(bundle.provenance.config)
    images = data.load(config.data.name, config.data.splits.test, config.data.dir).images[:8]
    expected = np.asarray(gati_jax.infer_batch(bundle, images).class_index)
    with serving(arguments.bundle) as server:
        result = run(server, images, expected.tolist(), arguments.seed, arguments.first, arguments.requests)
    cli.report(result.as_json(), lambda _: show(result), out=arguments.out, as_json=arguments.json)
    if result.problems:
        raise InputError(f"server: expected no 5xx and right answers, got: {result.problems[0]}")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    p.add_argument("--requests", type=cli.positive, default=100_000, metavar="N", help="(default: 100000)")
    p.add_argument("--first", type=int, default=0, metavar="N", help="number of the first request (default: 0)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    return p


def run(server: Server, images: np.ndarray, expected: Sequence[int], seed: int, first: int, requests: int) -> Fuzz:
    """Send the requests in batches, and look after each."""
    model, started = Model(MODEL, images.shape[1:]), time.monotonic()
    kinds, problems, logged, until = Counter[str](), list[str](), 0, first + requests
    seen = counted(server.get(METRICS, admin=True)[1])
    for start in range(first, until, BATCH):
        numbers = range(start, min(start + BATCH, until))
        with contextlib.suppress(OSError):
            kinds += send(server.http, server.grpc, model, seed, numbers)
        if server.child.poll() is not None:
            problems.append(f"{name_of(numbers)}: it ended, exit code {server.child.returncode}: {server.last_words()}")
            break
        found = wrong(server.http, server.grpc, images, expected)
        now, lines = counted(server.get(METRICS, admin=True)[1]), server.log.read_text("utf-8", "replace").splitlines()
        found += [f"{now[key] - seen[key]} x {key}" for key in now if is_failure(key) and now[key] > seen[key]]
        found += [error_of(line) for line in lines[logged:] if is_error(line)]
        seen, logged = now, len(lines)
        problems += [f"{name_of(numbers)}: {one}" for one in found]
        done, seconds = numbers.stop - first, time.monotonic() - started
        _log.info("%d of %d, %.0f s, %d problems", done, requests, seconds, len(problems))
    return Fuzz(
        seed=seed,
        first=first,
        requests=sum(kinds.values()),
        seconds=time.monotonic() - started,
        kinds=dict(kinds),
        counted=dict(sorted(seen.items())),
        problems=tuple(problems),
    )


def name_of(numbers: range) -> str:
    """Return what to call a batch."""
    return f"requests {numbers.start} to {numbers.stop - 1}"


def send(http: int, rpc: int, model: Model, seed: int, numbers: range) -> Counter[str]:
    """Send requests of these numbers to the ports of a server; return how many of each kind."""
    whole, raw = list[int](), dict[int, list[bytes]]({http: [], rpc: []})
    for number in numbers:
        rng = Random(f"{seed}/{number}")
        kind = rng.random()
        if kind < SCHEMA_SHARE:
            whole.append(number)
        elif kind < SCHEMA_SHARE + GRPC_SHARE:
            raw[rpc].append(grpc_connection(rng, model))
        else:
            raw[http].append(http_request(rng, model))
    asyncio.run(_send_raw(raw))
    described = _send_described(http, seed, whole)
    return Counter({"schema": described, "http": len(raw[http]), "grpc": len(raw[rpc])})


async def _send_raw(raw: Mapping[int, Sequence[bytes]]) -> None:
    """Send each on a connection of its own, so many at once."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(port: int, sent: bytes) -> None:
        async with places:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:  # ``wrong`` will say so
                return
            writer.write(sent)
            got, patience = b"", SILENCE
            with contextlib.suppress(OSError, TimeoutError):  # it hangs up, or waits for more
                while data := await asyncio.wait_for(reader.read(65536), patience):
                    got += data
                    patience = SILENCE_AFTER if is_answered(got) else SILENCE
            writer.transport.abort()

    async with asyncio.TaskGroup() as group:
        for port, requests in raw.items():
            for sent in requests:
                group.create_task(one(port, sent))


def is_answered(got: bytes) -> bool:
    """Whether what has come holds an answer: one of HTTP/1.1, or a frame that ends a stream or the connection."""
    if got.startswith(b"HTTP/1"):
        return True
    while len(got) >= HEAD:
        kind, flags = got[3], got[4]
        if kind in {RST, GOAWAY} or (kind == HEADERS and flags & END_STREAM):
            return True
        got = got[HEAD + int.from_bytes(got[:3], "big") :]
    return False


def _send_described(port: int, seed: int, numbers: Sequence[int]) -> int:
    """Send requests that the server's own description allows, as many for each operation; return their number."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json") as page:
        schema = schemathesis.openapi.from_dict(json.load(page))
    operations, sent = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)], 0
    for operation in operations if numbers else ():

        @hypothesis.seed(f"{seed}/{numbers[0]}")
        @hypothesis.settings(
            max_examples=max(1, len(numbers) // len(operations)),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        )
        @hypothesis.given(case=operation.as_strategy())
        def ask(case: schemathesis.Case) -> None:
            nonlocal sent
            sent += 1
            with contextlib.suppress(OSError, UnicodeError):  # some cannot be put into a request
                case.call(base_url=f"http://127.0.0.1:{port}", timeout=30)

        ask()
    return sent


def wrong(http: int, rpc: int, images: np.ndarray, expected: Sequence[int]) -> list[str]:
    """Return what is wrong with a server that should be well: it is live, and answers are right by both transports."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{http}{LIVE}", timeout=10) as page:
            live = page.status == OK
        answers = [_ask_http(http, images), _ask_grpc(rpc, images)]
    except (OSError, grpc.RpcError) as error:
        return [f"no answer: {error!r}"]
    found = [] if live else ["not live"]
    return found + [f"classes {answer} instead of {list(expected)}" for answer in answers if answer != list(expected)]


def _ask_http(port: int, images: np.ndarray) -> list[int]:
    tensor = {"name": "images", "datatype": "UINT8", "shape": images.shape, "data": images.ravel().tolist()}
    body = json.dumps({"inputs": [tensor], "outputs": [{"name": "class_index"}]}).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{INFER}", body, timeout=30) as page:
        return json.load(page)["outputs"][0]["data"]


def _ask_grpc(port: int, images: np.ndarray) -> list[int]:
    request = pb.ModelInferRequest(model_name=MODEL, raw_input_contents=[images.tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=images.shape)
    request.outputs.add(name="class_index")
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        answer = pb.ModelInferResponse.FromString(call(request.SerializeToString(), timeout=30, wait_for_ready=True))
    return np.frombuffer(answer.raw_output_contents[0], np.int32).tolist()


def counted(page: bytes) -> Counter[str]:
    """Return the requests that a server has counted, by protocol and HTTP's status, from its metrics."""
    found = Counter[str]()
    for labels, value in _COUNTED.findall(page.decode()):
        named = dict(_LABEL.findall(labels))
        found[f"{named['protocol']} {named['code']}"] += int(float(value))
    return found


def is_failure(key: str) -> bool:
    """Whether requests of this protocol and status were failures of the server: it is never overloaded here."""
    return key.rpartition(" ")[2].startswith("5") and not key.endswith(" 504")


def is_error(line: str) -> bool:
    """Whether a line of the log tells of an error of ours; gRPC's own are about what it was sent.

    One of these ends its server, which ``serve.lifecycle`` replaces: asyncio reports it, too.
    """
    if "_server_main_loop" in line:
        return False
    try:
        read = json.loads(line)
        return read["level"] in {"error", "critical"} and not read["logger"].startswith(("grpc.", "stderr"))
    except (ValueError, KeyError, TypeError):
        return True  # no line of the log should be like that


def error_of(line: str) -> str:
    """Return the message of a line of the log, and the last line of its traceback."""
    try:
        read = json.loads(line)
        return ": ".join([read["message"], *read.get("exception", "").strip().splitlines()[-1:]])[:300]
    except (ValueError, KeyError, TypeError, AttributeError):
        return line[:300]


def show(result: Fuzz) -> None:
    """Print what was sent and counted, and what is wrong."""
    cli.show(f"{result.requests} requests in {result.seconds:.0f} s", ("kind", "requests"), result.kinds.items())
    cli.show("counted by the server", ("protocol and status", "requests"), result.counted.items())
    for problem in result.problems:
        print(problem)


if __name__ == "__main__":
    cli.run(main)
