"""The comparison's bookkeeping by hand, a full network behind the real engine, and thin clients of fake servers."""

import asyncio
import itertools
import json
import time
from typing import Any

import numpy as np
import pytest

from benchmarks import serving, targets
from benchmarks.driving import Reply, run
from benchmarks.load import Load, load_of, measure, parser
from benchmarks.onnx_runner import BUCKETS, FullRunner
from benchmarks.onnx_runner import measure as measure_buckets
from gati_jax import InputError
from serve.engine.engine import Engine
from serve.engine.records import Job, OverloadedError, Step


def first_value(images):
    """A network whose class is the image's first value."""
    return np.eye(10, dtype=np.float32)[images.reshape(len(images), -1)[:, 0]]


def test_a_full_network_answers_every_row_at_its_last_exit():
    runner = FullRunner(first_value, depth=8, stage_ms=dict.fromkeys(BUCKETS, (1.0,)), name="full")
    assert (runner.routes[0].exits, runner.routes[0].leave) == ((8,), (1.0,))
    jobs = tuple(Job(image=np.full((2, 2, 3), i, np.uint8), route=0, arrived=0.0) for i in (3, 1, 4))
    result = runner.dispatch(Step(0, 0, 4, jobs)).result()
    assert result.class_index.tolist() == [3, 1, 4]
    assert result.logits.shape == (3, 10)
    assert result.hit.all()
    assert np.isposinf(result.score).all()


def test_a_failure_is_the_steps():
    def broken(images):
        raise MemoryError(f"{len(images)} images are too many")

    runner = FullRunner(broken, depth=1, stage_ms={1: (1.0,)})
    with pytest.raises(MemoryError):
        runner.dispatch(Step(0, 0, 1, (Job(image=np.zeros(2, np.uint8), route=0, arrived=0.0),))).result()


def test_buckets_are_timed_in_turns_and_the_first_is_left_out():
    asked, now = [], itertools.count(0)
    clock = lambda: next(now) * 0.001 * (1000 if len(asked) <= len(BUCKETS) else 1)  # noqa: E731
    result = measure_buckets(lambda images: asked.append(len(images)), np.zeros((5, 2)), rounds=3, clock=clock)  # pyright: ignore[reportArgumentType] (a fake)
    assert asked == list(BUCKETS) * 4
    assert result == {bucket: (pytest.approx(1.0),) for bucket in BUCKETS}


def test_load_on_the_real_engine_gets_the_right_answers():
    images = np.repeat(np.arange(10, dtype=np.uint8)[:, None], 4, 1)
    engine = Engine(FullRunner(first_value, depth=8, stage_ms=dict.fromkeys(BUCKETS, (1.0,))))
    engine.start()
    ask = targets.in_process(engine, images, route=0, clock=time.monotonic)
    expected = np.array([*range(9), 0])  # the last is wrong
    for load in (
        Load(kind="poisson", rate=500, seconds=0.4, warm_up=0, slo_ms=1e4),
        Load(kind="closed", clients=7, seconds=0.2, warm_up=0, slo_ms=1e4),
        Load(kind="bursty", rate=500, seconds=0.4, warm_up=0, slo_ms=1e4),
    ):
        result = asyncio.run(measure(ask, load, images=10, expected=expected))
        assert result["answered"] == result["requests"] > 50
        assert result["exits"] == {8: result["answered"]}
        assert result["goodput_share"] == 1
        assert 0.6 < result["agreement"] < 1
    assert engine.stop(5.0)


class Fake:
    """A contender that records its loads, ``factor`` times as slow as the full network."""

    def __init__(self, factor, good=1.0, log=None):
        self.factor, self.good, self.log = factor, good, [] if log is None else log

    def ask(self, line):
        load = Load(**json.loads(line))
        self.log.append((load.kind, load.seed, load.rate, load.slo_ms))
        rate = load.rate or 100.0 / self.factor
        share = 1.0 if rate <= 50 * self.good else 0.5
        return {
            "mean_ms": 10.0 * self.factor * (1 + load.seed), "p99_ms": 20.0 * self.factor, "throughput": rate,
            "goodput": rate * share, "goodput_share": share, "rate": rate, "agreement": 1.0, "generator_cores": 0.1,
            "late_share": 0.0, "exits": {"8": 5}, "invalid_because": ["late"] * (self.factor == 3),
        }  # fmt: skip


def test_ratios_criteria_and_goodput_follow_by_hand(monkeypatch, capsys):
    monkeypatch.setattr(serving, "PAUSE_SECONDS", 0.0)
    workers = {"cascade": Fake(0.4, 2.0), "full": Fake(1.0), "onnx": Fake(3, 1.5)}
    given = ["--bundle", "b", "--rounds", "3", "--shares", "0.25", "0.5", "0.75", "1", "1.1"]
    result = serving.compare(workers, serving.parser().parse_args(given))  # pyright: ignore[reportArgumentType] (fakes)
    cascade, full, onnx = result["rows"]
    assert result["slo_ms"] == 40.0  # 10, 20 and 30 ms alone: twice the median
    assert (cascade["mean_ratio"], cascade["p99_ratio"], cascade["mean_spread"]) == (0.4, pytest.approx(0.4), 0)
    assert full["rate"] == 80.0
    # Rates 25, 50, 75, 100, 110; all good up to 50 times a factor, then half.
    assert (full["goodput"], full["highest_rate"]) == (pytest.approx(55), 50.0)
    assert (onnx["goodput"], onnx["highest_rate"]) == (75.0, 75.0)
    assert (cascade["goodput"], cascade["highest_rate"]) == (100.0, 100.0)
    assert [(round(one["measured"], 2), one["holds"]) for one in result["criteria"]] == [
        (0.4, True), (0.4, True), (1.82, True), (1.33, True),
    ]  # fmt: skip
    assert (full["invalid_because"], onnx["invalid_because"]) == ([], ["late"])
    assert workers["cascade"].log == workers["full"].log == workers["onnx"].log  # the same arrivals for all
    assert {slo for kind, _, _, slo in workers["full"].log if kind == "poisson"} == {40.0}
    serving.show(result | {"network": "resnet18", "machine": "here"})
    text = capsys.readouterr().out
    assert "holds, but see below: goodput, to onnx's: 1.33 (at least 1.2)" in text
    assert "not valid, onnx: late" in text


def test_a_criterion_that_is_missed_fails():
    workers = {"cascade": Fake(0.6), "full": Fake(1.0)}
    args = serving.parser().parse_args(["--bundle", "b", "--rounds", "1", "--shares", "0.5"])
    criteria = serving.compare(workers, args)["criteria"]  # pyright: ignore[reportArgumentType] (fakes)
    assert [one["holds"] for one in criteria] == [False, False, False]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--search", "10"], "--search: expected --slo-ms"),
        (["--clients", "3", "--save-trace", "t.json"], "--save-trace: expected --rate"),
        (["--clients", "3", "--burst", "5"], "--burst: expected --rate or --search"),
        (["--rate", "-1"], "expected a number above 0"),
        (["--rate", "1", "--clients", "1"], "not allowed with"),
        ([], "one of the arguments --rate --trace --clients --search is required"),
    ],
)
def test_command_lines_that_make_no_sense_are_refused(given, complaint):
    with pytest.raises(InputError, match=complaint):
        load_of(parser().parse_args(["--url", "u", "--data", "digits", *given]))


def test_a_command_line_becomes_a_load():
    given = ["--url", "u", "--data", "digits", "--rate", "20", "--burst", "4", "--parameter", "epsilon=0.01"]
    arguments = parser().parse_args([*given, "--parameter", "plan=2%"])
    assert load_of(arguments) == Load(kind="bursty", rate=20.0, burst=4.0, trace="", clients=1)
    assert arguments.parameter == [("epsilon", 0.01), ("plan", "2%")]


# Clients


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
    first = [IMAGES[0].tobytes()]
    request = next(one for one in asked if list(one.raw_input_contents) == first)  # two were sent at once
    assert request.model_name == "m"
    (tensor,) = request.inputs
    assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("images", "UINT8", [1, 2, 2, 3])
    assert [output.name for output in request.outputs] == ["class_index", "exit"]
    fields = {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in request.parameters.items()}
    assert fields == {"epsilon": 0.01, "timeout": 5, "plan": "2%", "odd": True}
