#!/usr/bin/env bash
# All that wants an NVIDIA GPU, one after another: tests, bases, bundles, the table for batches of 1 to 1024, the papers' gains.
# Not run yet: there was no GPU. Bases, bundles and reproductions that are there already are not made again, and a base whose
# training was cut off goes on from its checkpoint; tests, tuning, evaluation and every comparison run again.
# Where tests or the comparison with PyTorch's training fail, the rest goes on: runs/gpu/*.log say what was wrong.
#
#   DATA=../shared/data benchmarks/gpu_all.sh                                      hours
#   DATA=../shared/data BASES="cifar10_resnet18" benchmarks/gpu_all.sh             one network, minutes
#
# runs/gpu/seconds.tsv holds the wall time of every command; python -m benchmarks.trained runs/gpu prints what
# docs/results/performance.md is to say: accuracies, images/s, wall times, and the published gains beside ours.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data}
BASES=${BASES:-cifar10_resnet18 cifar10_resnet50 cifar100_resnet50 cifar100_resnet152 cifar10_vgg16 cifar100_resnet18 cifar10_resnet152 cifar100_vgg16}
PUBLISHED=" cifar10_resnet18 cifar10_resnet50 cifar100_resnet152 " # of which there are published GPU gains
BATCHES="1 8 32 128 512 1024"
export XLA_PYTHON_CLIENT_PREALLOCATE=false # contenders share the device
make setup EXTRAS=train,test,torch,bench,cuda
python=.venv/python3/bin/python
mkdir -p runs/gpu

timed() { # timed NAME COMMAND...: run it, and write its wall time down
  local name=$1 began=$SECONDS
  shift
  "$@"
  printf '%s\t%d\n' "$name" $((SECONDS - began)) >>runs/gpu/seconds.tsv
}

logged() { # logged NAME COMMAND...: run it with its output in runs/gpu/NAME.log too; its failure stops nothing
  local log=runs/gpu/$1.log
  shift
  "$@" 2>&1 | tee "$log" || echo "failed, see $log: $*" >&2
}

table() { # table CONFIG_NAME WEIGHTS: bundle, tuning, evaluation, contenders
  local name=$1 weights=$2 out=runs/gpu/$1
  [ -e "$out/caches/bundle" ] || timed "$name caches" $python -m train.caches --config "configs/$name.toml" \
    --out "$out/caches" --data.dir "$DATA/tfds" --base.weights "$weights"
  timed "$name tune" $python -m train.tune --bundle "$out/caches/bundle" --tiles 1 8 32 128
  timed "$name evaluate" $python -m train.evaluate --bundle "$out/caches/bundle" --out "$out/eval" --batches $BATCHES
  timed "$name compare" $python -m benchmarks.compare --bundle "$out/caches/bundle" --batches $BATCHES \
    --out "benchmarks/results/$name-gpu.json" \
    --contenders "gati-jax full" "gati-jax cascade" "jax.jit full" "torch eager full" "torch.compile full"
  $python -m benchmarks.table "benchmarks/results/$name-gpu.json" \
    --reference "torch.compile full" "torch eager full" "jax.jit full" >"$out/table.md"
  $python -m benchmarks.front "benchmarks/results/$name-gpu.json" --out "docs/figures/$name-gpu.svg"
}

# --- Tests ------------------------------------------------------------------------------------------------------------
# They compare with float32; a GPU's convolutions would keep ten bits of what they multiply (TF32).
JAX_DEFAULT_MATMUL_PRECISION=highest logged tests $python -m pytest -q -m "not slow" tests/runtime tests/caches tests/models tests/fitting tests/train/test_recipe.py

# --- Training beside PyTorch ------------------------------------------------------------------------------------------
for network in resnet18 resnet50; do
  logged "training-$network" $python -m benchmarks.training --network $network --batch 256 --steps 50 --bfloat16 \
    --beside "torch eager, channels last" "torch.compile" --out "benchmarks/results/training-$network-gpu.json"
done

# --- Bases, bundles, tables -------------------------------------------------------------------------------------------
for name in $BASES; do
  base=runs/gpu/$name/base
  [ -e "$base/base.json" ] || timed "$name base" $python -m train.base --config "configs/$name.toml" --out "$base" \
    --data.dir "$DATA/tfds"
  table "$name" "$base/base.safetensors"
  if [[ $PUBLISHED == *" $name "* && ! -e runs/gpu/$name/reproduce/reproduction.json ]]; then
    timed "$name reproduce" $python -m train.reproduce --config "configs/$name.toml" --out "runs/gpu/$name/reproduce" \
      --data.dir "$DATA/tfds" --base.weights "$base/base.safetensors" --plan.tuned true
  fi
done
table cifar10_resnet56 "$DATA/weights/resnet56-cifar10.safetensors"
if [ -e runs/gpu/cifar10_resnet18/base/base.safetensors ]; then
  $python -m train.zoo --weights runs/gpu/cifar10_resnet18/base/base.safetensors --out models-zoo
fi

$python -m benchmarks.trained runs/gpu
