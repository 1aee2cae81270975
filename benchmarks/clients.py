"""Ask a server by every client that is installed, and compare the answers with ``infer``'s.

Client libraries are looked for in this interpreter and in those of ``--venvs``, because some of them need other
versions of the same packages; tools for the command line, in the path.
"""

import base64
import contextlib
import importlib.metadata
import json
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import json_format

import gati_jax
from gati_jax import InputError, data
from serve.protocol import inference_pb2 as pb
from train import cli
from train.config import build_config
from train.results import Record

from .one_client import CLIENTS
from .process import INFER, MODEL, Server, serving
from .table import markdown

EXAMPLE = "python -m benchmarks.clients --bundle runs/digits/caches/bundle --page docs/reference/clients.md"
SECONDS = 120.0  # that a client may take
METHOD = "inference.GRPCInferenceService/ModelInfer"
COLUMNS = ("client", "version", "protocol", "result")
NOT_RUN = "not run: not installed here"
PAGE = """\
# Clients

Programs of others that have asked a server of this project, each by the script that can do so again:

```bash
{command}
```

{table}

*Right answers* are the classes of `infer` for {images} test images in one request. Tools that only count are sent the
same request many times; the result is what they report. The server ran on {date} with Python {python} and grpcio
{grpcio}; `--venvs` names a folder of virtual environments, for client libraries that exclude one another.
"""
WRK = """\
wrk.method, wrk.body = "POST", io.open("{body}"):read("a")
wrk.headers["Content-Type"] = "application/json"
wrong = 0
function setup(thread) threads = threads or {{}}; table.insert(threads, thread) end
function response(status, headers, body)
  if status ~= 200 or not string.find(body, '"data": {classes}', 1, true) then wrong = wrong + 1 end
end
function done(summary)
  local sum = 0
  for _, thread in ipairs(threads) do sum = sum + thread:get("wrong") end
  io.write(string.format("answers %d wrong %d\\n", summary.requests, sum))
end
"""
LOCUST = """\
import locust
body = open({body!r}).read()
class Client(locust.HttpUser):
    @locust.task
    def ask(self):
        headers = {{"content-type": "application/json"}}
        with self.client.post({path!r}, body, headers=headers, catch_response=True) as answer:
            if answer.json()["outputs"][0]["data"] != {classes}:
                answer.failure("another class")
"""


class ClientResult(Record):
    """A line of the table."""

    client: str
    version: str
    protocol: str
    result: str


class Asked(NamedTuple):
    """A server, the images that it is asked for, their classes, and a folder with files for tools."""

    server: Server
    images: np.ndarray
    classes: list[int]
    folder: Path

    @property
    def url(self) -> str:
        """Where an inference is asked for over HTTP."""
        return f"http://127.0.0.1:{self.server.http}{INFER}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the clients."""
    p = cli.parser(str(__doc__), EXAMPLE, out=False)
    p.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    p.add_argument("--venvs", type=Path, metavar="DIR", help="folder of further virtual environments")
    p.add_argument("--images", type=cli.positive, default=4, metavar="N", help="in a request (default: 4)")
    p.add_argument("--page", type=Path, metavar="FILE", help="also write the result as a page of the documentation")
    arguments = p.parse_args(argv)
    bundle = gati_jax.load_bundle(arguments.bundle)
    config = build_config(bundle.provenance.config)
    images = data.load(config.data.name, config.data.splits.test, config.data.dir).images[: arguments.images]
    if images.dtype != np.uint8:
        raise InputError(f"bundle: expected images of uint8, got {images.dtype}")
    classes = np.asarray(gati_jax.infer_batch(bundle, images).class_index).tolist()
    with serving(arguments.bundle) as server, tempfile.TemporaryDirectory() as folder:
        asked = Asked(server, images, classes, Path(folder))
        rows = [*libraries(asked, interpreters(arguments.venvs)), *tools(asked, interpreters(arguments.venvs))]
    if arguments.page:
        arguments.page.write_text(page(rows, EXAMPLE, len(images)), encoding="utf-8")
    cli.report({"rows": [row.as_json() for row in rows]}, lambda _: show(rows), out=None, as_json=arguments.json)


def interpreters(venvs: Path | None) -> list[str]:
    """Return this interpreter and those of a folder of virtual environments."""
    return [sys.executable, *(str(found) for found in sorted(venvs.glob("*/bin/python") if venvs else ()))]


def libraries(asked: Asked, pythons: Sequence[str]) -> list[ClientResult]:
    """Ask by each client library."""
    rows, given = list[ClientResult](), json.dumps(asked.images.tolist())
    words = (str(asked.server.http), str(asked.server.grpc), MODEL)
    for name, (package, _) in CLIENTS.items():
        protocol = "gRPC" if "grpc" in name.lower() else "HTTP"
        python = python_with(package, pythons)
        if python is None:
            rows.append(ClientResult(client=name, version="-", protocol=protocol, result=NOT_RUN))
            continue
        script = str(Path(__file__).with_name("one_client.py"))
        done = run([python, script, name, *words], given)
        try:
            answer = json.loads(done.splitlines()[-1])
            result, version = judge(answer["classes"], asked.classes), answer["version"]
        except (ValueError, IndexError, KeyError, TypeError):
            result, version = f"FAILS: {last(done)}", "?"
        rows.append(ClientResult(client=name, version=version, protocol=protocol, result=result))
    return rows


def python_with(package: str, pythons: Sequence[str]) -> str | None:
    """Return the first interpreter that has a package."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    found = (python for python in pythons if run([python, "-c", code])[:1].isdigit())
    return next(found, None)


def run(command: Sequence[str], given: str = "") -> str:
    """Return what a command prints, errors included."""
    try:
        done = subprocess.run(  # noqa: S603 (the clients that this script is for)
            command,
            input=given,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS:g} s"
    return done.stdout


def judge(classes: Any, expected: Sequence[int]) -> str:  # noqa: ANN401 (of a client)
    """Compare answers."""
    return "right answers" if classes == list(expected) else f"FAILS: classes {classes} instead of {list(expected)}"


def last(text: str) -> str:
    """Return the last line of what a command has printed, fit for a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:150].replace("|", "/") if lines else "no output"


class Tool(NamedTuple):
    """A program for the command line, and how its output is judged."""

    client: str
    protocol: str
    version: Sequence[str]
    """The words that make it print its version."""
    words: Sequence[str]
    """``{url}``, ``{grpc}``, ``{http}`` and ``{folder}`` are replaced."""
    judge: Callable[[str, Sequence[int]], str | None]
    """Returns the result from its output and the classes; None for a failure."""


def tools(asked: Asked, pythons: Sequence[str]) -> list[ClientResult]:
    """Ask by each tool."""
    write_files(asked)
    places = {"url": asked.url, "folder": str(asked.folder), "path": INFER}
    places |= {"grpc": f"127.0.0.1:{asked.server.grpc}", "host": f"http://127.0.0.1:{asked.server.http}"}
    python, rows = python_with("locust", pythons), list[ClientResult]()
    for tool in TOOLS:
        program = [python, "-m", "locust"] if tool.client == "locust" else [shutil.which(tool.client.split()[0])]
        if not program[0]:
            rows.append(ClientResult(client=tool.client, version="-", protocol=tool.protocol, result=NOT_RUN))
            continue
        command = [str(word) for word in program]
        printed = run([*command, *tool.version])
        version = re.search(r"\d+(\.\d+)+", printed)
        done = run([*command, *(word.format(**places) for word in tool.words)])
        result = tool.judge(done, asked.classes) or f"FAILS: {last(done)}"
        found = version[0] if version else packaged(tool.client.split()[0])
        rows.append(ClientResult(client=tool.client, version=found, protocol=tool.protocol, result=result))
    return rows


def packaged(program: str) -> str:
    """Return the version of a program's Debian package, for one that does not tell its own."""
    found = re.search(
        r"\d+(\.\d+)+", run(["dpkg-query", "-W", "-f", "${Version}", program]) if shutil.which("dpkg") else ""
    )
    return found[0] if found else "?"


def write_files(asked: Asked) -> None:
    """Write what the tools read."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": asked.images.shape, "data": asked.images.ravel().tolist()}
    body = json.dumps({"inputs": [tensor], "outputs": [{"name": "class_index"}]})
    request = pb.ModelInferRequest(model_name=MODEL, raw_input_contents=[asked.images.tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=asked.images.shape)
    request.outputs.add(name="class_index")
    message, path = request.SerializeToString(), asked.folder / "body.json"
    classes = json.dumps(asked.classes)
    files = {"body.json": body, "wrk.lua": WRK.format(body=path, classes=classes)}
    files |= {"locustfile.py": LOCUST.format(body=str(path), path=INFER, classes=classes)}
    files |= {"grpc.json": json_format.MessageToJson(request)}
    for name, text in files.items():
        (asked.folder / name).write_text(text, encoding="utf-8")
    (asked.folder / "grpc.bin").write_bytes(bytes(1) + struct.pack(">I", len(message)) + message)


def by_curl(text: str, classes: Sequence[int]) -> str | None:
    """Judge JSON."""
    with contextlib.suppress(ValueError, LookupError):
        return judge(json.loads(text)["outputs"][0]["data"], classes)
    return None


def by_grpcurl(text: str, classes: Sequence[int]) -> str | None:
    """Judge a message as JSON, whose tensors are bytes in base64."""
    with contextlib.suppress(ValueError, LookupError):
        raw = base64.b64decode(json.loads(text)["rawOutputContents"][0])
        return judge(np.frombuffer(raw, np.int32).tolist(), classes)
    return None


def by_count(pattern: str, failures: str = "(?!)") -> Callable[[str, Sequence[int]], str | None]:
    """Judge the number of good answers, in the first group; where the second pattern is found, there were others."""

    def judged(text: str, _: Sequence[int]) -> str | None:
        found = re.search(pattern, text)
        return (
            f"{int(found[1])} answers, all of them good"
            if found and int(found[1]) and not re.search(failures, text)
            else None
        )

    return judged


H2LOAD = (r"(\d+) succeeded, 0 failed, 0 errored", r"status codes: .*[1-9]\d* [345]xx")
GRPC_CALLS = ("-n", "400", "-c", "4", "-m", "8", "-H", "content-type: application/grpc", "-H", "te: trailers")
JSON_BODY = ("-H", "content-type: application/json")
TOOLS = (
    Tool("curl", "HTTP", ("--version",), ("-sS", *JSON_BODY, "--data", "@{folder}/body.json", "{url}"), by_curl),
    Tool(
        "grpcurl",
        "gRPC, by reflection",
        ("--version",),
        ("-plaintext", "-d", "@{folder}/grpc.json", "{grpc}", METHOD),
        by_grpcurl,
    ),
    Tool(
        "hey",
        "HTTP",
        ("-h",),
        ("-n", "400", "-c", "8", "-m", "POST", "-T", "application/json", "-D", "{folder}/body.json", "{url}"),
        by_count(r"\[200\]\s+(\d+) responses", r"\[[1345]\d\d\]|Error distribution"),
    ),
    Tool(
        "wrk",
        "HTTP",
        ("-v",),
        ("-t1", "-c8", "-d3s", "-s", "{folder}/wrk.lua", "{url}"),
        by_count(r"answers (\d+) wrong 0", "Socket errors"),
    ),
    Tool(
        "h2load --h1",
        "HTTP",
        ("--version",),
        ("--h1", "-n", "400", "-c", "8", *JSON_BODY, "-d", "{folder}/body.json", "{url}"),
        by_count(*H2LOAD),
    ),
    Tool(
        "h2load",
        "gRPC",
        ("--version",),
        (*GRPC_CALLS, "-d", "{folder}/grpc.bin", "http://{grpc}/" + METHOD),
        by_count(*H2LOAD),
    ),
    Tool(
        "locust",
        "HTTP",
        ("--version",),
        ("-f", "{folder}/locustfile.py", "--headless", "-u", "4", "-r", "4", "-t", "4s", "-H", "{host}", "--json"),
        by_count(r'"num_requests": (\d+)', r'"num_failures": [1-9]'),
    ),
)


def page(rows: Sequence[ClientResult], command: str, images: int) -> str:
    """Return the page of the documentation."""
    table = markdown(COLUMNS, [(row.client, row.version, row.protocol, row.result) for row in rows])
    versions = {name: importlib.metadata.version(name) for name in ("grpcio",)} | {"python": platform.python_version()}
    date = datetime.now(UTC).date().isoformat()
    return PAGE.format(command=command, table="\n".join(table), images=images, date=date, **versions)


def show(rows: Sequence[ClientResult]) -> None:
    """Print the table."""
    cli.show("clients", COLUMNS, [(row.client, row.version, row.protocol, row.result) for row in rows])


if __name__ == "__main__":
    cli.run(main)
