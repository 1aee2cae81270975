"""The published memory figures, from arithmetic."""

from train.reproduce.memory import published_memory


def test_the_papers_memory_comes_out_of_the_arithmetic_but_for_its_k_means():
    resnet18 = [shape for shape in ((32, 32, 64), (16, 16, 128), (8, 8, 256), (4, 4, 512)) for _ in range(2)]
    rows = {row.what: row for row in published_memory(resnet18)}
    for what in ("raw k-NN", "reduced k-NN"):
        assert rows[what].mb == rows[what].published_mb
    for what in ("k-means", "k-means, ResNet-50"):
        assert 2 * rows[what].mb == rows[what].published_mb
    assert rows["key networks"].mb == 960  # which the paper does not count
