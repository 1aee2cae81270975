"""The papers' figures that a reproduction is held against: GATI (arXiv:2101.07344), Freeze Inference (2002.02645)."""

PREDICTORS = {  # of GATI's released tables: agreement with ResNet-18 on CIFAR-10 behind blocks 1 to 8, in percent
    "fc": (55.1, 60.7, 78.6, 85.3, 94.5, 99.2, 99.95, 100.0),
    "pool": (55.2, 68.3, 78.3, 84.6, 92.5, 99.0, 99.95, 100.0),
    "conv": (57.6, 66.0, 75.9, 82.6, 93.3, 98.3, 99.9, 100.0),
}
GAIN = {"CPU": 1.72, "GPU": 1.28}  # in mean latency at 97 % of the base's accuracy, ResNet-18 on CIFAR-10
# Of Freeze Inference, ResNet-18 on CIFAR-10: share of requests that save half of the blocks, share that leaves before
# the output, agreement with the base. The oracle knows when a k-NN cache is right.
FREEZE: dict[str, dict[str, float | None]] = {
    "knn": {"half_share": 0.20, "before_output_share": 0.95, "agreement": 0.9748},
    "kmeans": {"half_share": 0.33, "before_output_share": None, "agreement": 0.9285},
    "oracle": {"half_share": 0.9158},
}
FREEZE_MEMORY = {"knn": "2,500 (reduced)", "kmeans": "12.5"}  # MB of 2^20 bytes
NUMBERS = 2 * (32 * 32 * 64 + 16 * 16 * 128 + 8 * 8 * 256 + 4 * 4 * 512)  # that leave the eight blocks of ResNet-18
MEMORY: tuple[tuple[str, float | None, dict[str, int]], ...] = (  # of Freeze: what, MB as published, the arithmetic
    # The published figures come out for the 35,000 and the 5,000 images together; k-means at half of what is published.
    ("raw k-NN", 37_500.0, {"points": 40_000, "numbers in all blocks": NUMBERS, "bytes": 4}),
    ("reduced k-NN", 2_500.0, {"points": 40_000, "numbers": 1024, "blocks": 8, "bytes": 8}),
    ("k-means", 12.5, {"centres": 100, "numbers": 1024, "blocks": 8, "bytes": 8}),
    ("k-means, ResNet-50", 25.0, {"centres": 100, "numbers": 1024, "blocks": 16, "bytes": 8}),
    ("key networks", None, {"numbers in all blocks": NUMBERS, "units": 1024, "bytes": 4}),
)
NO_NETWORK = "there is no trained network for it here"
OTHERS = (  # figures that nothing here has measured: which, published, why not
    ("ResNet-50, CIFAR-10: latency gain at 97 %, CPU", "1.95", NO_NETWORK),
    ("ResNet-50, CIFAR-10: latency gain at 97 %, GPU", "1.63", NO_NETWORK),
    ("ResNet-152, CIFAR-100: latency gain at 97 %, CPU", "1.24", NO_NETWORK),
    ("ResNet-152, CIFAR-100: latency gain at 97 %, GPU", "1.21", NO_NETWORK),
    ("VGG-16, speech commands: latency gain at 97 %, CPU", "1.96", NO_NETWORK),
    ("VGG-16, speech commands: latency gain at 97 %, GPU", "1.54", NO_NETWORK),
    ("ResNet-18, CIFAR-100: oracle, half of the blocks saved for", "55 %", NO_NETWORK),
    ("ResNet-18, CIFAR-100: k-NN, half of the blocks saved for", "15 %", NO_NETWORK),
    ("ResNet-18, CIFAR-100: k-NN, frozen before the output", "44 %", NO_NETWORK),
    ("ResNet-18, CIFAR-100: k-NN, agreement with the base", "99.03 %", NO_NETWORK),
    ("ResNet-18, CIFAR-100: k-means, half of the blocks saved for", "19 %", NO_NETWORK),
    ("ResNet-18, CIFAR-100: k-means, agreement with the base", "88.86 %", NO_NETWORK),
    ("ResNet-50, CIFAR-10: k-means, half of the blocks saved for", "46 %", NO_NETWORK),
    ("ResNet-50, CIFAR-100: k-means, half of the blocks saved for", "26 %", NO_NETWORK),
    ("ResNet-50: k-means, memory, MB", "25", "arithmetic only, see freeze.md"),
    ("ResNet-18: k-NN on raw activations, memory, MB", "37,500", "arithmetic only, see freeze.md"),
)
