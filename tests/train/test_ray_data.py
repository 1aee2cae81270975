"""Scoring on a Ray cluster of two nodes: the parts that one process writes."""

import warnings

import pyarrow.dataset as ds
import pytest

from gati_jax import InputError
from tests.train.test_score import ALL, folder, scores, whole

pytestmark = pytest.mark.ray
pytest.importorskip("ray")
__all__ = ["folder", "whole"]  # fixtures


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes with a processor each, all on this machine."""
    from ray.cluster_utils import Cluster  # noqa: PLC0415 (optional)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # JAX's, of a fork; Ray's is followed by an exec at once
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
    yield made.address
    made.shutdown()


def table(out):
    return ds.dataset(out, format="parquet", exclude_invalid_files=True).to_table()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_two_nodes_write_what_one_process_writes(cluster, folder, whole, tmp_path):
    (tmp_path / "part-00003-of-00008.parquet").write_bytes((whole[0] / "part-00003-of-00008.parquet").read_bytes())
    found = scores(folder, tmp_path, *ALL, "--ray", cluster)
    assert table(tmp_path).equals(table(whole[0]))
    assert {key: found[key] for key in ("n", "parts", "accuracy", "exits")} == {
        key: whole[1][key] for key in ("n", "parts", "accuracy", "exits")
    }
    assert not list(tmp_path.glob(".part-*"))


def test_an_address_without_a_cluster_is_one_line(folder, tmp_path):
    with pytest.raises(InputError, match=r"--ray: expected the address of a Ray cluster, got 127\.0\.0\.1:1"):
        scores(folder, tmp_path, *ALL, "--ray", "127.0.0.1:1")
