"""From a bundle on disk to clients: the answers are those of the library."""

import asyncio
import json

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
import tritonclient.utils
from tritonclient.http import aio

import gati_jax
from gati_jax import InputError
from serve.assemble import assemble
from serve.settings import Settings
from tests.serve import fake


@pytest.fixture(scope="module")
def served(residual, tmp_path_factory):
    """A bundle, and the ports where it is served."""
    path = tmp_path_factory.mktemp("served") / "bundle"
    gati_jax.save_bundle(path, residual.chain, residual.caches, residual.plan, residual.certificate)
    parts = assemble(Settings(bundle=path, capacity=64, reference=True, program_cache="off"))
    entry = parts.service.models.find("gati")
    loaded, backend = entry.start()
    entry.serve(loaded, backend)
    assert backend.engine.statistics().batches == (1,)
    backend.grow()
    assert backend.engine.statistics().batches == (1, 2, 4, 8)
    with fake.sockets(parts.service, parts.metrics) as ports:
        yield gati_jax.load_bundle(path), ports, parts
    assert backend.engine.stop(60)


def pixels(n):
    return np.random.default_rng(5).integers(0, 256, (n, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("transport", ["http", "grpc"])
@pytest.mark.parametrize("prepared", [False, True])
def test_every_answer_is_that_of_infer_batch(served, transport, prepared):
    bundle, ports, _ = served
    images = np.asarray(bundle.chain.prepare(pixels(24))) if prepared else pixels(24)
    expected = gati_jax.infer_batch(bundle, images, numerics="reference")
    assert len(set(np.asarray(expected.exit).tolist())) > 1
    module = tritonclient.http if transport == "http" else tritonclient.grpc
    with module.InferenceServerClient(f"127.0.0.1:{ports[transport == 'grpc']}") as client:
        given = module.InferInput("images", list(images.shape), "FP32" if prepared else "UINT8")
        result = client.infer("gati", [given.set_data_from_numpy(images)])
        assert result
    for name in ("class_index", "exit"):
        np.testing.assert_array_equal(result.as_numpy(name), getattr(expected, name))
    for name in ("score", "logits"):
        found = np.asarray(result.as_numpy(name), float)
        np.testing.assert_allclose(found, getattr(expected, name), rtol=1e-4, atol=1e-5)


def test_an_input_without_finite_logits_is_an_error_here_and_there(served):
    """Its class would be the first, under a certificate that speaks of other inputs."""
    bundle, ports, _ = served
    images = np.array(bundle.chain.prepare(pixels(3)))
    images[1] = 3e38
    with pytest.raises(InputError, match="images: expected inputs with finite logits, got NaN or infinity for 1"):
        gati_jax.infer_batch(bundle, images)
    with pytest.raises(InputError, match="image: expected inputs with finite logits"):
        gati_jax.infer(bundle, images[1])
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{ports[0]}") as client:
        given = tritonclient.http.InferInput("images", list(images.shape), "FP32").set_data_from_numpy(images)
        refused = pytest.raises(tritonclient.utils.InferenceServerException, match="got NaN or infinity for image 1")
        with refused as error:
            client.infer("gati", [given])
        assert error.value.status() == "400"
        given = tritonclient.http.InferInput("images", [1, 8, 8, 3], "FP32").set_data_from_numpy(images[:1])
        assert client.infer("gati", [given])


def test_the_config_says_how_pixels_become_float_inputs(served):
    """A client that sends floats in 0 .. 1 gets answers of a base that never saw such inputs."""
    bundle, ports, _ = served
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{ports[0]}") as client:
        config = client.get_model_config("gati")
    assert config
    how = json.loads(config["parameters"]["normalization"]["string_value"])
    found = (pixels(3) * how["scale"] - how["mean"]) / how["std"]
    np.testing.assert_allclose(found, bundle.chain.prepare(pixels(3)), rtol=1e-5, atol=1e-6)


def test_of_many_concurrent_requests_none_is_lost_or_mixed_up(served):
    """2,000 requests of one or two images by 32 clients; logits of random images differ by far more than arithmetic."""
    bundle, ports, _ = served
    images = pixels(200)
    expected = gati_jax.infer_batch(bundle, images, numerics="reference")
    rng = np.random.default_rng(0)
    wanted = [rng.integers(0, len(images), rng.integers(1, 3)) for _ in range(2000)]

    async def client(connection, requests):
        for rows in requests:
            given = aio.InferInput("images", [len(rows), 8, 8, 3], "UINT8").set_data_from_numpy(images[rows])
            result = await connection.infer("gati", [given])
            np.testing.assert_array_equal(result.as_numpy("exit"), np.asarray(expected.exit)[rows])
            np.testing.assert_allclose(
                np.asarray(result.as_numpy("logits"), float), np.asarray(expected.logits)[rows], rtol=1e-4, atol=1e-4
            )
            answered.append(len(rows))

    async def clients():
        async with aio.InferenceServerClient(f"127.0.0.1:{ports[0]}", conn_limit=32) as connection:
            await asyncio.gather(*(client(connection, wanted[k::32]) for k in range(32)))

    answered: list[int] = []
    asyncio.run(clients())
    assert sum(answered) == sum(map(len, wanted))
    assert len(answered) == 2000


def test_epsilon_zero_is_answered_by_the_base(served):
    bundle, ports, _ = served
    with tritonclient.http.InferenceServerClient(f"127.0.0.1:{ports[0]}") as client:
        given = tritonclient.http.InferInput("images", [4, 8, 8, 3], "UINT8").set_data_from_numpy(pixels(4))
        result = client.infer("gati", [given], parameters={"epsilon": 0.0})
        assert result
    np.testing.assert_array_equal(np.asarray(result.as_numpy("exit")), len(bundle.chain))
    assert result.get_response()["parameters"] == {"plan": "base", "epsilon": 0.0, "delta": 0.0}
    logits = bundle.chain(bundle.chain.prepare(pixels(4)))
    np.testing.assert_allclose(np.asarray(result.as_numpy("logits"), float), logits, rtol=1e-4, atol=1e-5)


def test_statistics_and_metrics_know_the_steps(served):
    _, _, parts = served
    (stats,) = parts.service.statistics("").model_stats
    assert stats.execution_count == sum(batch.compute_infer.count for batch in stats.batch_stats) > 0
    assert stats.inference_stats.compute_infer.ns > 0
    page = parts.metrics.page().decode()
    assert f'gati_bundle_info{{model="gati",version="{stats.version}"}} 1.0' in page


def test_an_empty_folder_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="bundle"):
        assemble(Settings(bundle=tmp_path))
