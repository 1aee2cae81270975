"""The thin clients against servers that record their requests."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from benchmarks import targets
from benchmarks.driving import Reply, run
from gati_jax import InputError
from serve.engine.records import OverloadedError

IMAGES = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)


class FakeHttp:
    """Answers class = the image's first value, exit = 3, in pieces; an image that begins with 12 is refused, with 24
    fails, and with 36 closes the connection."""

    def __init__(self):
        self.tasks, self.heads, self.bodies = [], [], list[tuple[dict[str, Any], bytes]]()

    async def __call__(self, reader, writer):
        self.tasks.append(asyncio.current_task())
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(line.split(": ") for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(fields["Content-Length"]))
                size = int(fields["Inference-Header-Content-Length"])
                self.heads.append(head.split("\r\n")[0])
                self.bodies.append((json.loads(body[:size]), body[size:]))
                first = body[size]
                if first == 36:
                    break
                status = {12: "429 Too Many Requests", 24: "500 Oops"}.get(first, "200 OK")
                outputs = [{"name": "exit", "data": [3]}, {"name": "class_index", "data": [first]}]
                text = json.dumps({"outputs": outputs} if first not in (12, 24) else {"error": "odd"}).encode()
                writer.write(f"HTTP/1.1 {status}\r\nx-request-id: 1\r\nContent-".encode())
                await asyncio.sleep(0.001)
                writer.write(f"Length: {len(text)}\r\n\r\n".encode() + text[:5])
                await asyncio.sleep(0.001)
                writer.write(text[5:])
        except asyncio.IncompleteReadError:
            pass
        writer.close()
        await writer.wait_closed()


def test_http_requests_are_the_protocols_and_connections_are_kept():
    fake = FakeHttp()

    async def main():
        async with await asyncio.start_server(fake, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with targets.server(url, "a model", IMAGES, {"epsilon": 0.01}) as ask:
                assert await asyncio.gather(ask(0), ask(4)) == [Reply(0, 3), Reply(48, 3)]
                with pytest.raises(OverloadedError, match="odd"):
                    await ask(1)
                with pytest.raises(RuntimeError, match=r"HTTP 500: .*odd"):
                    await ask(2)
                assert len(fake.tasks) == 2
                with pytest.raises(ConnectionError):
                    await ask(3)
                assert await asyncio.gather(ask(0), ask(0)) == [Reply(0, 3)] * 2
                assert len(fake.tasks) == 3
            await asyncio.gather(*fake.tasks)

    run(main())
    assert set(fake.heads) == {"POST /v2/models/a%20model/infer HTTP/1.1"}
    header = next(header for header, body in fake.bodies if body == IMAGES[0].tobytes())  # two were sent at once
    assert header["parameters"] == {"epsilon": 0.01}
    (tensor,) = header["inputs"]
    assert (tensor["shape"], tensor["datatype"]) == ([1, 2, 2, 3], "UINT8")
    assert tensor["parameters"] == {"binary_data_size": 12}


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://localhost", "ftp://a:1", "grpc://:8001"])
def test_a_malformed_address_is_refused(url):
    with pytest.raises(InputError, match="url: expected"):
        targets.server(url, "model", IMAGES, {})


def test_images_of_a_type_that_the_protocol_lacks_are_refused():
    with pytest.raises(InputError, match="images: expected uint8 or float32, got complex64"):
        targets.server("http://localhost:1", "model", IMAGES.astype(np.complex64), {})


def test_grpc_requests_are_the_protocols():
    grpc: Any = pytest.importorskip("grpc")
    pb: Any = pytest.importorskip("serve.protocol.inference_pb2")
    asked = []

    async def infer(request, context):
        asked.append(request)
        first = request.raw_input_contents[0][0]
        if first == 12:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        if first == 24:
            await context.abort(grpc.StatusCode.INTERNAL, "odd")
        outputs = [
            pb.ModelInferResponse.InferOutputTensor(name=name, datatype="INT32") for name in ("exit", "class_index")
        ]
        return pb.ModelInferResponse(outputs=outputs, raw_output_contents=[np.int32(x).tobytes() for x in (3, first)])

    async def main():
        server = grpc.aio.server()
        method = grpc.unary_unary_rpc_method_handler(
            infer,
            request_deserializer=pb.ModelInferRequest.FromString,
            response_serializer=pb.ModelInferResponse.SerializeToString,
        )
        service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelInfer": method})
        server.add_generic_rpc_handlers((service,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        parameters = {"epsilon": 0.01, "timeout": 5, "plan": "2%", "odd": True}
        async with targets.server(f"grpc://127.0.0.1:{port}", "m", IMAGES, parameters) as ask:
            assert await asyncio.gather(ask(0), ask(4)) == [Reply(0, 3), Reply(48, 3)]
            with pytest.raises(OverloadedError, match="full"):
                await ask(1)
            with pytest.raises(grpc.aio.AioRpcError, match="odd"):
                await ask(2)
        await server.stop(None)

    run(main())
    request = next(
        one for one in asked if list(one.raw_input_contents) == [IMAGES[0].tobytes()]
    )  # two were sent at once
    assert request.model_name == "m"
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("images", "UINT8", [1, 2, 2, 3])
    assert [output.name for output in request.outputs] == ["class_index", "exit"]
    fields = {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in request.parameters.items()}
    assert fields == {"epsilon": 0.01, "timeout": 5, "plan": "2%", "odd": True}
