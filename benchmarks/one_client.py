"""Ask a server by one client library, and print its version and the classes as JSON.

``benchmarks.clients`` runs this file by an interpreter that has the library, so it imports nothing of this project:
``python one_client.py NAME HTTP_PORT GRPC_PORT MODEL < IMAGES.json``.
"""

import asyncio
import importlib
import importlib.metadata
import json
import sys
import urllib.request
from collections.abc import Callable
from typing import Any, NamedTuple


class Question(NamedTuple):
    """What is asked, and where."""

    http: int
    grpc: int
    model: str
    images: Any
    """uint8[n, *input]."""


def triton(question: Question, module: str, port: int) -> list[int]:
    """Ask by a blocking client of Triton's."""
    client = importlib.import_module(module)
    given = client.InferInput("images", list(question.images.shape), "UINT8").set_data_from_numpy(question.images)
    with client.InferenceServerClient(f"127.0.0.1:{port}") as connected:
        return connected.infer(question.model, [given]).as_numpy("class_index").tolist()


def triton_aio(question: Question, module: str, port: int) -> list[int]:
    """Ask by a client of Triton's for asyncio."""
    client = importlib.import_module(module)

    async def ask() -> list[int]:
        given = client.InferInput("images", list(question.images.shape), "UINT8").set_data_from_numpy(question.images)
        async with client.InferenceServerClient(f"127.0.0.1:{port}") as connected:
            return (await connected.infer(question.model, [given])).as_numpy("class_index").tolist()

    return asyncio.run(ask())


def kserve(question: Question, *, rest: bool) -> list[int]:
    """Ask by a client of KServe's."""
    library = importlib.import_module("kserve")

    async def ask() -> list[int]:
        given = library.InferInput("images", list(question.images.shape), "UINT8")
        given.set_data_from_numpy(question.images, binary_data=True)
        request = library.InferRequest(model_name=question.model, infer_inputs=[given])
        if rest:
            client = library.InferenceRESTClient(config=library.RESTConfig(protocol="v2"))
            answer = await client.infer(f"http://127.0.0.1:{question.http}", request, model_name=question.model)
            await client.close()
        else:
            client = library.InferenceGRPCClient(url=f"127.0.0.1:{question.grpc}")
            answer = await client.infer(request)
            await client.close()
        return next(one.as_numpy() for one in answer.outputs if one.name == "class_index").tolist()

    return asyncio.run(ask())


def mlserver(question: Question) -> list[int]:
    """Ask with MLServer's types and codecs; it has no client of its own."""
    codecs, types = (importlib.import_module(f"mlserver.{name}") for name in ("codecs", "types"))
    request = types.InferenceRequest(inputs=[codecs.NumpyCodec.encode_input("images", question.images)])
    body = request.model_dump_json().encode()
    url = f"http://127.0.0.1:{question.http}/v2/models/{question.model}/infer"
    with urllib.request.urlopen(urllib.request.Request(url, body, {"content-type": "application/json"})) as answer:
        read = types.InferenceResponse.model_validate_json(answer.read())
    output = next(one for one in read.outputs if one.name == "class_index")
    return codecs.NumpyCodec.decode_output(output).ravel().tolist()


CLIENTS: dict[str, tuple[str, Callable[[Question], list[int]]]] = {
    "tritonclient.http": ("tritonclient", lambda q: triton(q, "tritonclient.http", q.http)),
    "tritonclient.http.aio": ("tritonclient", lambda q: triton_aio(q, "tritonclient.http.aio", q.http)),
    "tritonclient.grpc": ("tritonclient", lambda q: triton(q, "tritonclient.grpc", q.grpc)),
    "tritonclient.grpc.aio": ("tritonclient", lambda q: triton_aio(q, "tritonclient.grpc.aio", q.grpc)),
    "KServe InferenceRESTClient": ("kserve", lambda q: kserve(q, rest=True)),
    "KServe InferenceGRPCClient": ("kserve", lambda q: kserve(q, rest=False)),
    "MLServer's codecs": ("mlserver", mlserver),
}
"""By name: the package, and how it asks."""


def main() -> None:
    """Ask."""
    name, http, grpc, model = sys.argv[1:]
    package, ask = CLIENTS[name]
    version = importlib.metadata.version(package)
    numpy = importlib.import_module("numpy")
    question = Question(int(http), int(grpc), model, numpy.array(json.load(sys.stdin), "uint8"))
    print(json.dumps({"version": version, "classes": ask(question)}))


if __name__ == "__main__":
    main()
