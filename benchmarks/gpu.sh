#!/usr/bin/env bash
# All that wants an NVIDIA GPU, one after another: the tests, then the table of docs/performance.md for batches of 1 to 1024.
#
#   DATA=../shared/data benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data}
make setup EXTRAS=train,test,torch,bench,cuda
python=.venv/python3/bin/python
$python -m pytest -q -m "not slow" tests/runtime tests/caches tests/models

for network in resnet18 resnet56; do
  out=runs/gpu/$network
  [ -e "$out/bundle" ] || $python -m train.caches --config "configs/cifar10_$network.toml" --out "$out" \
    --data.dir "$DATA/tfds" --base.weights "$DATA/weights/$network-cifar10.safetensors"
  $python -m train.tune --bundle "$out/bundle" --tiles 1 8 32 128
  $python -m train.evaluate --bundle "$out/bundle" --out "$out/eval" --batches 1 8 32 128 512 1024
  $python -m benchmarks.compare --bundle "$out/bundle" --batches 1 8 32 128 512 1024 --out "benchmarks/results/$network-gpu.json" \
    --contenders "gati-jax full" "gati-jax cascade" "jax.jit full" "torch eager full" "torch.compile full"
  $python -m benchmarks.front "benchmarks/results/$network-gpu.json" --out "docs/figures/$network-gpu.svg"
done
